"""Captions for a user's own photos: files, folders, members of tars."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from pvtcap import pixels
from pvtcap.checkpoint import Checkpoint
from pvtcap.config import EvaluateConfig
from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto
from pvtcap.photosource import MAX_PHOTO_BYTES, PhotoFile, read_photo
from pvtcap.tarwalk import Content, open_tar, walk_tar

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_photos(places: Sequence[Path]) -> Iterator[tuple[str, bytes]]:
    """(name, encoded bytes) of each photo; a folder gives those below it by name, a tar its members in order."""
    for place in places:
        if place.is_dir():
            below = [path for path in sorted(place.rglob("*")) if path.suffix.lower() in SUFFIXES]
            if not below:
                raise ShardError("no photo in this folder", where=place, wanted=", ".join(SUFFIXES))
            yield from ((str(path), _file(path)) for path in below)
        elif not place.is_file():
            raise ShardError("no such photo, folder or tar", where=place)
        elif place.suffix.lower() == ".tar":
            yield from _members(place)
        else:
            yield str(place), _file(place)


def caption_photos(
    checkpoint: Checkpoint, photos: Sequence[tuple[str, bytes]], how: EvaluateConfig, device: torch.device
) -> Iterator[tuple[str, bytes, str]]:
    """(name, encoded bytes, caption). All photos are decoded first: a bad one stops before anything is printed."""
    side_px = checkpoint.config.data.image_px
    squares = [pixels.whole(encoded, name, side_px) for name, encoded in photos]
    model, tokenizer = checkpoint.captioner(device), checkpoint.tokenizer()
    for start in range(0, len(photos), how.micro_batch):
        stop = start + how.micro_batch
        captions = model.caption(pixels.stacked(squares[start:stop]).to(device), tokenizer, how)
        for (name, encoded), text in zip(photos[start:stop], captions, strict=True):
            yield name, encoded, text


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
