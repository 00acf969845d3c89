"""What stands in the KEY.npy of a ShardSet of features: a sample's views, encoded and decoded. Pure functions.

Shapes: V views, E encoder width, h w rows and columns of patches.

    fp16    np.load gives float16 (V, E, h, w)
    int8    np.load gives records (V, E) of {scale: float16, values: int8 (h, w)}; a feature is scale * value, where
            scale is the channel's greatest absolute value / 127, rounded up

The header of the .npy is the same for all samples of a ShardSet, so reading compares it and parses nothing; a view is a
slice of the rest.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pvtcap.errors import ShardError
from pvtcap.shardformat import FeatureFormat

# Of photos to what the encoder is shown, but for the size: as ``pixels`` and ``encoder`` do it.
TRANSFORM = "upright RGB, squeezed to a square (antialiased bicubic, uint8), normalised by timm's mean and std"
SQUARE = 0  # the view that evaluation sees

_LEVELS = 127
_MOST = 512.0 * _LEVELS  # float16 holds little more, and a rounded scale times 127 must not go beyond it


def encode(views_VEhw: NDArray[np.float32], features: FeatureFormat, where: object) -> bytes:
    """The bytes of KEY.npy. Raises ShardError for features that are not finite, or beyond what float16 holds."""
    assert views_VEhw.shape == (len(features.views), *features.shape)
    most = np.abs(views_VEhw).max(axis=(2, 3))
    if not (most <= _MOST).all():
        got = "not a number" if np.isnan(most).any() else f"{most.max():.6g}"
        raise ShardError(
            "the encoder gives features that cannot be stored", where=where, got=got, wanted=f"at most {_MOST:g}"
        )
    record = _record(features)
    if features.dtype == "fp16":
        return _header(features) + views_VEhw.astype(record).tobytes()
    packed = np.empty(most.shape, record)
    packed["scale"] = scale = _scales(most)
    # A channel of zeros has scale 0, and any divisor will do.
    divisor = np.where(scale > 0, scale, 1).astype(np.float32)[:, :, None, None]
    packed["values"] = np.rint(views_VEhw / divisor).clip(-_LEVELS, _LEVELS)
    return _header(features) + packed.tobytes()


def decode(stored: bytes, features: FeatureFormat, view: int, where: object) -> NDArray[np.float16]:
    """One view, (E, h, w) float16. Raises ShardError when ``stored`` is not what ``features`` says."""
    header, record = _header(features), _record(features)
    channels, rows, columns = features.shape
    per_view = channels * (rows * columns if features.dtype == "fp16" else 1)
    wanted = len(header) + len(features.views) * per_view * record.itemsize
    if len(stored) != wanted or not stored.startswith(header):
        raise ShardError(
            "not the features that the manifest describes",
            where=where,
            got=f"{len(stored):,} bytes beginning {stored[: len(header)].strip()!r:.80}",
            wanted=f"{wanted:,} of {features.dtype}",
            do="Make the features again with 'pvtcap features'.",
        )
    found = np.frombuffer(stored, record, per_view, len(header) + view * per_view * record.itemsize)
    if features.dtype == "fp16":
        return found.reshape(features.shape)
    return (found["values"] * found["scale"].astype(np.float32)[:, None, None]).astype(np.float16)


def load(stored: bytes, features: FeatureFormat, view: int, where: object) -> Tensor:
    """One view as a tensor of its own, (E, h, w) float16: what a batch has in place of a photo."""
    return torch.from_numpy(np.array(decode(stored, features, view, where)))


def check_finite(stored: bytes, features: FeatureFormat, where: object) -> None:
    """Raises ShardError unless all views are there, and are numbers."""
    for view in range(len(features.views)):
        if not np.isfinite(decode(stored, features, view, where)).all():
            raise ShardError("features that are not finite", where=where, got=f"view {view}")


def _scales(most: NDArray[np.float32]) -> NDArray[np.float16]:
    """most / 127 in float16, rounded up so that no value is beyond 127 of them."""
    scale = (most / _LEVELS).astype(np.float16)
    return np.where(scale.astype(np.float32) * _LEVELS < most, np.nextafter(scale, np.float16(np.inf)), scale)


@lru_cache
def _record_of(dtype: str, rows: int, columns: int) -> np.dtype[Any]:
    return np.dtype("<f2") if dtype == "fp16" else np.dtype([("scale", "<f2"), ("values", "i1", (rows, columns))])


def _record(features: FeatureFormat) -> np.dtype[Any]:
    return _record_of(features.dtype, *features.shape[1:])


def _header(features: FeatureFormat) -> bytes:
    return _header_of(features.dtype, len(features.views), *features.shape)


@lru_cache
def _header_of(dtype: str, views: int, channels: int, rows: int, columns: int) -> bytes:
    """A .npy header of version 1.0, see numpy.lib.format, whose own writer pads it as its release pleases."""
    descr, shape = "'<f2'", f"({views}, {channels}, {rows}, {columns})"
    if dtype == "int8":
        descr, shape = f"[('scale', '<f2'), ('values', '|i1', ({rows}, {columns}))]", f"({views}, {channels})"
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"
    before = 10  # the magic, the version, and the length of what follows
    text += " " * (-(before + len(text) + 1) % 64) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode("ascii")
