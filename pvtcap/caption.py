"""Captions for a user's own photos: files, folders, members of tars, standard input; a batch at a time.

A photo that cannot be read has an error in place of a caption, and the others go on.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from torch import Tensor

from pvtcap import pixels
from pvtcap.api import Captioner
from pvtcap.config import EvaluateConfig
from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto
from pvtcap.photosource import MAX_PHOTO_BYTES, PhotoFile, read_photo
from pvtcap.tarwalk import Content, open_tar, walk_tar

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
STDIN = Path("-")


@dataclass(frozen=True)
class Captioned:
    """A photo's name, its encoded bytes, and either a caption with its score or what was wrong with it."""

    name: str
    photo: bytes
    caption: str | None
    score: float | None
    error: str | None = None

    def as_json(self) -> str:
        """One line: photo and caption and score, or photo and error."""
        values = {"caption": self.caption, "score": self.score} if self.error is None else {"error": self.error}
        return json.dumps({"photo": self.name, **values}, ensure_ascii=False)


def find_photos(places: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of each photo; a folder gives those below it by name, a tar its members in order.

    '-' is standard input: a photo, or lines that each name a photo, a folder or a tar. Raises ShardError at once
    where a place does not exist.
    """
    for place in places:
        if place != STDIN and not place.is_dir() and not place.is_file():
            raise ShardError("no such photo, folder or tar", where=place)
    return _photos(places)


def count_photos(places: Sequence[Path]) -> int | None:
    """How many photos ``find_photos`` will give, or None where only reading tells."""
    if any(place == STDIN or place.suffix.lower() == ".tar" for place in places):
        return None
    return sum(len(_below(place)) if place.is_dir() else 1 for place in places)


def _below(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]


def _photos(places: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    for place in places:
        if place == STDIN:
            yield from _standard_input()
        elif place.is_dir():
            below = _below(place)
            if not below:
                raise ShardError("no photo in this folder", where=place, wanted=", ".join(SUFFIXES))
            yield from ((str(path), _file(path)) for path in below)
        elif place.suffix.lower() == ".tar":
            yield from _members(place)
        else:
            yield str(place), _file(place)


def caption_photos(
    captioner: Captioner, photos: Iterable[tuple[str, bytes]], how: EvaluateConfig
) -> Iterator[Captioned]:
    """Captions in the photos' order, ``how.micro_batch`` of them in memory at a time."""
    photos = iter(photos)
    while batch := list(islice(photos, how.micro_batch)):
        squares: dict[int, Tensor] = {}
        errors: dict[int, str] = {}
        for number, (name, encoded) in enumerate(batch):
            try:
                squares[number] = pixels.whole(encoded, name, captioner.config.data.image_px)
            except ShardError as error:
                errors[number] = str(error)
        captions = captioner.caption_squares(pixels.stacked(list(squares.values())), how) if squares else []
        found = dict(zip(squares, captions, strict=True))
        for number, (name, encoded) in enumerate(batch):
            if number in errors:
                yield Captioned(name, encoded, None, None, errors[number])
            else:
                yield Captioned(name, encoded, found[number].text, found[number].score)


def _standard_input() -> Iterator[tuple[str, bytes]]:
    data = sys.stdin.buffer.read(MAX_PHOTO_BYTES + 1)
    if len(data) > MAX_PHOTO_BYTES:
        raise ShardError("too large", where="standard input", wanted=f"at most {MAX_PHOTO_BYTES:,} bytes")
    try:
        # No photo is text: JPEG and PNG are not UTF-8, the others have zeros.
        text = "" if b"\0" in data else data.decode("utf-8")
    except UnicodeDecodeError:
        text = ""
    if not text:
        yield "-", data
        return
    names = [line for line in text.splitlines() if line.strip()]
    yield from find_photos([Path(name) for name in names if name != str(STDIN)])


def _file(path: Path) -> bytes:
    try:
        return read_photo(PhotoFile(path))
    except BadPhoto as error:
        raise ShardError(error.reason, where=path, got=error.detail) from None


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    descriptor = open_tar(path)
    found = False
    try:
        for member in walk_tar(descriptor, path):
            if member.kind == "folder" or not member.name.lower().endswith(SUFFIXES):
                continue
            name = f"{path}:{member.name if member.name.isprintable() else ascii(member.name)}"
            if member.kind != "file":
                raise ShardError(f"a {member.kind}, not a photo", where=name, do="Leave it out of the tar.")
            if member.size > MAX_PHOTO_BYTES:
                raise ShardError("photo too large", where=name, got=f"{member.size:,} bytes", wanted=MAX_PHOTO_BYTES)
            found = True
            yield name, Content(descriptor, member).read()
    finally:
        os.close(descriptor)
    if not found:
        raise ShardError("no photo in this tar", where=path, wanted=", ".join(SUFFIXES))
