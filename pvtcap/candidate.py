"""A candidate: what a builder offers for a shard, and what is made of it, a sample ready to store or a reason why not.

    Candidate(key, image_id, captions, source, photo) ── prepare() ──▶ Prepared | SkippedItem

``prepare`` is a pure function of the candidate, so any process may do it; ``prepare_in_order`` lets several.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from pvtcap.photo import BadPhoto
from pvtcap.photosource import PhotoSource, close_zips, read_photo
from pvtcap.processes import AGAIN, map_in_order
from pvtcap.shardset import SkippedItem
from pvtcap.storedphoto import Encoding, encode_photo, modules_for

_CHUNK = 16  # photos a worker is handed at a time: enough to hide the hand-over, little to hold in memory
_LONGEST_KEY = 90  # a plain tar header has 100 bytes for KEY.json


@dataclass(frozen=True, slots=True)
class Candidate:
    """A photo with its captions, as a builder found them; ``source`` names the dataset.

    ``key`` may be any text that is unique in the build: ``clean_key`` makes a file name of it. ``image_id`` is what a
    COCO results file will carry. ``url`` is stored too where it is known: owners ask where a photo came from.
    """

    key: str
    image_id: int | str
    captions: tuple[str, ...]
    source: str
    photo: PhotoSource
    url: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample ready to store: the bytes of KEY.jpg and KEY.json, and the captions that were left out of it."""

    key: str
    photo: bytes
    text: bytes
    num_captions: int
    skipped: tuple[SkippedItem, ...] = ()


# The number of a candidate, its key as the builder gave it, and itself or what became of it.
Work = tuple[int, str, Candidate | SkippedItem]
Result = tuple[int, str, Prepared | SkippedItem]


def prepare(candidate: Candidate | SkippedItem, encoding: Encoding) -> Prepared | SkippedItem:
    """Read, check and encode one candidate. What a builder skipped itself passes through."""
    if isinstance(candidate, SkippedItem):
        return candidate
    key = clean_key(candidate.key)
    captions = [clean_caption(caption) for caption in candidate.captions]
    empty = tuple(
        SkippedItem(key=f"{key}#{number}", reason="empty caption")
        for number, caption in enumerate(captions)
        if not caption
    )
    captions = [caption for caption in captions if caption]
    if not captions:
        return SkippedItem(key=key, reason="no caption", detail=f"{len(empty)} empty")
    try:
        photo = encode_photo(read_photo(candidate.photo), encoding)
    except BadPhoto as error:
        return SkippedItem(key=key, reason=error.reason, detail=error.detail)
    text = {
        "image_id": candidate.image_id,
        "captions": captions,
        "width": photo.width,
        "height": photo.height,
        "source": candidate.source,
        **({"url": candidate.url} if candidate.url else {}),
    }
    return Prepared(key, photo.jpeg, json.dumps(text, ensure_ascii=False).encode(), len(captions), empty)


def prepare_each(candidates: list[Candidate], encoding: Encoding) -> list[Prepared | SkippedItem]:
    """``prepare`` for several at a time, as a worker process is handed them."""
    return [prepare(candidate, encoding) for candidate in candidates]


def prepare_in_order(work: Iterator[Work], encoding: Encoding, processes: int) -> Generator[Result, None, None]:
    """Prepare candidates in ``processes`` processes, in order, looking ahead by a bounded number of chunks.

    With 0 or 1 processes this process does it. Raises ShardError when a worker dies.
    """
    chunks = iter(lambda: list(itertools.islice(work, _CHUNK)), [])
    task = partial(_prepare_chunk, encoding=encoding)
    with closing(map_in_order(task, chunks, processes, AGAIN, modules_for(encoding))) as results:
        for chunk in results:
            yield from chunk
    close_zips()


def clean_caption(caption: str) -> str:
    """One line, single spaces, no lone surrogates (JSON can carry them, UTF-8 cannot)."""
    return " ".join(caption.split()).encode("utf-8", "replace").decode()


def clean_key(key: str) -> str:
    """A key that is a file name: WebDataset splits names at the first dot, and a slash would be a folder."""
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", key) or "_"
    if len(clean) > _LONGEST_KEY:
        clean = f"{clean[: _LONGEST_KEY - 13]}_{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:12]}"
    return clean


def _prepare_chunk(chunk: list[Work], encoding: Encoding) -> list[Result]:
    return [(number, key, prepare(item, encoding)) for number, key, item in chunk]
