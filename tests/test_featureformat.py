"""pytest tests/test_featureformat.py"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pvtcap.errors import ShardError
from pvtcap.featureformat import check_finite, decode, encode, load
from pvtcap.shardformat import FeatureFormat


def format_of(**changes: Any) -> FeatureFormat:
    values: dict[str, Any] = {
        "dtype": "fp16", "views": ["square", "augmented"], "shape": (5, 3, 4), "encoder": "pvt_v2_b0",
        "encoder_weights": "timm", "encoder_sha256": "0" * 64, "encoder_stages": 4, "image_px": 64,
        "transform": "as it is", "crop_min_area": 0.5, "flip_probability": 0.5, "seed": 0,
    }  # fmt: skip
    return FeatureFormat.model_validate(values | changes)


def drawn(seed: int = 0) -> NDArray[np.float32]:
    """Channels from tiny to large, and one of zeros."""
    values = np.random.default_rng(seed).normal(size=(2, 5, 3, 4)).astype(np.float32)
    return values * np.array([1e-6, 0, 1, 30, 9000], np.float32)[:, None, None]


def test_fp16_is_the_array_itself_and_numpy_reads_it() -> None:
    features, views = format_of(), drawn()
    stored = encode(views, features, "here")
    assert np.array_equal(np.load(io.BytesIO(stored), allow_pickle=False), views.astype(np.float16))
    for view in range(2):
        assert np.array_equal(decode(stored, features, view, "here"), views[view].astype(np.float16))
        assert np.array_equal(load(stored, features, view, "here").numpy(), views[view].astype(np.float16))


def test_int8_is_within_half_a_step_and_numpy_reads_it() -> None:
    features, views = format_of(dtype="int8"), drawn()
    stored = encode(views, features, "here")
    records = np.load(io.BytesIO(stored), allow_pickle=False)
    assert (records.shape, records["values"].dtype, records["scale"].dtype) == ((2, 5), np.int8, np.float16)
    assert np.abs(records["values"][:, 2:]).max(axis=(2, 3)).min() >= 126  # all levels are used
    scale = records["scale"].astype(np.float32)[:, :, None, None]
    theirs = records["values"] * scale
    assert (np.abs(theirs - views) <= scale * 0.501).all()
    for view in range(2):
        assert np.array_equal(decode(stored, features, view, "here"), theirs[view].astype(np.float16))
    assert len(stored) < 0.8 * len(encode(views, format_of(), "here"))


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_headers_are_aligned_and_the_largest_features_come_back(dtype: str) -> None:
    features, views = format_of(dtype=dtype), np.full((2, 5, 3, 4), 65000, np.float32)
    stored = encode(views, features, "here")
    assert stored.index(b"\n") % 64 == 63
    assert np.abs(decode(stored, features, 1, "here").astype(np.float32) - 65000).max() <= 65000 / 127
    check_finite(stored, features, "here")


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1e5])
def test_what_cannot_be_stored_is_named(dtype: str, bad: float) -> None:
    views = drawn()
    views[1, 2, 0, 3] = bad
    with pytest.raises(ShardError, match="cat: the encoder gives features that cannot be stored"):
        encode(views, format_of(dtype=dtype), "cat")


def test_other_bytes_are_refused_and_infinite_ones_found() -> None:
    features = format_of()
    stored = encode(drawn(), features, "here")
    for other in (stored[:-1], stored + b"0", b"", encode(drawn(), format_of(dtype="int8"), "here")):
        with pytest.raises(ShardError, match="cat: not the features that the manifest describes"):
            decode(other, features, 0, "cat")
    with pytest.raises(ShardError, match="cat: features that are not finite; got view 1"):
        check_finite(stored[:-2] + np.float16(np.inf).tobytes(), features, "cat")
