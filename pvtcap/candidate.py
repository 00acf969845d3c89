"""A candidate: what a builder offers for a shard, and what is made of it, a sample ready to store or a reason why not.

    Candidate(key, image_id, captions, source, photo) ── prepare() ──▶ Prepared | SkippedItem

``prepare`` is a pure function of the candidate, so any process may do it; ``prepare_in_order`` lets several.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process

from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto, PhotoSource, close_zips, encode_photo, read_photo
from pvtcap.shardset import SkippedItem

_CHUNK = 16  # photos a worker is handed at a time: enough to hide the hand-over, little to hold in memory
_LONGEST_KEY = 90  # a plain tar header has 100 bytes for KEY.json


@dataclass(frozen=True, slots=True)
class Candidate:
    """A photo with its captions, as a builder found them; ``source`` names the dataset.

    ``key`` may be any text that is unique in the build: ``clean_key`` makes a file name of it. ``image_id`` is what a
    COCO results file will carry.
    """

    key: str
    image_id: int | str
    captions: tuple[str, ...]
    source: str
    photo: PhotoSource


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


def prepare(candidate: Candidate | SkippedItem, short_side_px: int | None, jpeg_quality: int) -> Prepared | SkippedItem:
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
        photo = encode_photo(read_photo(candidate.photo), short_side_px, jpeg_quality)
    except BadPhoto as error:
        return SkippedItem(key=key, reason=error.reason, detail=error.detail)
    text = {
        "image_id": candidate.image_id,
        "captions": captions,
        "width": photo.width,
        "height": photo.height,
        "source": candidate.source,
    }
    return Prepared(key, photo.jpeg, json.dumps(text, ensure_ascii=False).encode(), len(captions), empty)


def prepare_in_order(
    work: Iterator[Work], processes: int, short_side_px: int | None, jpeg_quality: int
) -> Generator[Result, None, None]:
    """Prepare candidates in ``processes`` processes, in order, looking ahead by a bounded number of chunks.

    With 0 or 1 processes this process does it. Raises ShardError when a worker dies.
    """
    chunks = iter(lambda: list(itertools.islice(work, _CHUNK)), [])
    task = partial(_prepare_chunk, short_side_px=short_side_px, jpeg_quality=jpeg_quality)
    if processes <= 1:
        for chunk in chunks:
            yield from task(chunk)
        close_zips()
        return
    # Spawned, not forked: whoever builds may hold threads (torch, rich) that do not survive a fork.
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=start_worker)
    pending: deque[Future[list[Result]]] = deque()
    try:
        for chunk in chunks:
            pending.append(pool.submit(task, chunk))
            if len(pending) > 2 * processes:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise ShardError(
            "a worker process died, for lack of memory perhaps",
            do="Run the same command again with fewer --processes: it goes on.",
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def clean_caption(caption: str) -> str:
    """One line, single spaces, no lone surrogates (JSON can carry them, UTF-8 cannot)."""
    return " ".join(caption.split()).encode("utf-8", "replace").decode()


def clean_key(key: str) -> str:
    """A key that is a file name: WebDataset splits names at the first dot, and a slash would be a folder."""
    clean = re.sub(r"[^A-Za-z0-9_-]", "_", key) or "_"
    if len(clean) > _LONGEST_KEY:
        clean = f"{clean[: _LONGEST_KEY - 13]}_{hashlib.sha256(key.encode('utf-8', 'replace')).hexdigest()[:12]}"
    return clean


def _prepare_chunk(chunk: list[Work], short_side_px: int | None, jpeg_quality: int) -> list[Result]:
    return [(number, key, prepare(item, short_side_px, jpeg_quality)) for number, key, item in chunk]


def start_worker() -> None:
    """What a worker process begins with: Ctrl-C is its parent's matter, and so is how long it lives."""
    # Ctrl-C reaches the whole process group; only the main process is to act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
