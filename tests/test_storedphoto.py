"""pytest tests/test_storedphoto.py: what a builder stores is the photo it was given, whoever decoded it."""

from __future__ import annotations

import io
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from oddphotos import encoded, odd_photos, picture
from PIL import Image
from test_pixels import psnr_db
from torch import from_numpy

from pvtcap.photo import BadPhoto
from pvtcap.storedphoto import EncodedPhoto, Encoding, encode_photo


def shown(stored: EncodedPhoto) -> NDArray[np.uint8]:
    image = Image.open(io.BytesIO(stored.jpeg))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (stored.width, stored.height))
    assert image.getexif().get(0x0112, 1) in (1, 9)  # 9 is none of the eight
    return np.array(image)


def by_pillow(raw: bytes, size: tuple[int, int], quality: int) -> NDArray[np.uint8]:
    """Pillow alone: decoded in full, turned by hand where the test turned it, resized, encoded, decoded."""
    whole = Image.open(io.BytesIO(raw)).convert("RGB")
    return np.array(Image.open(io.BytesIO(encoded(whole.resize(size, Image.Resampling.BICUBIC), quality=quality))))


@pytest.mark.parametrize("size", [(96, 72), (176, 128), (640, 480)])
@pytest.mark.parametrize("short_side_px", [24, 60])
def test_a_stored_photo_is_the_one_that_pillow_would_make(size: tuple[int, int], short_side_px: int) -> None:
    raw = encoded(picture(size), quality=95)
    stored = encode_photo(raw, Encoding(short_side_px, jpeg_quality=97))
    assert min(stored.width, stored.height) == short_side_px
    ours, pillows = shown(stored), by_pillow(raw, (stored.width, stored.height), 97)
    assert psnr_db(from_numpy(ours), from_numpy(pillows)) > 40
    if min(size) < 3 * short_side_px:  # not halved by the decoder: equal but for rounding, twice
        assert np.abs(ours.astype(int) - pillows).mean() < 0.5


@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "progressive", "grey", "orientation 6", "MPO"])
@pytest.mark.parametrize("short_side_px", [None, 48])
def test_the_fallback_stores_the_same(kind: str, short_side_px: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, encoding = odd_photos()[kind], Encoding(short_side_px, jpeg_quality=97)
    quick = encode_photo(raw, encoding)

    def refuse(*args: object, **how: object) -> None:
        raise ValueError("not by me")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)
    slow = encode_photo(raw, encoding)
    assert (slow.width, slow.height) == (quick.width, quick.height)
    assert np.abs(shown(slow).astype(int) - shown(quick)).max() <= 2


def test_every_kind_of_photo_is_stored_upright_and_scaled() -> None:
    for kind, raw in odd_photos().items():
        stored = encode_photo(raw, Encoding(short_side_px=30))
        turned = {*(f"orientation {n}" for n in range(5, 9)), "turned PNG", "XMP"}
        photo, sideways = shown(stored), kind in turned
        assert min(photo.shape[:2]) <= 30, kind
        if min(photo.shape[:2]) == 30:
            assert (photo.shape[0] > photo.shape[1]) == sideways, kind


@pytest.mark.parametrize(("side_px", "stored"), [(65_500, True), (65_501, False)])
def test_a_photo_longer_than_a_jpeg_can_be_is_a_bad_one(side_px: int, stored: bool) -> None:
    raw = encoded(Image.new("RGB", (2, side_px)), "PNG")
    if stored:
        assert shown(encode_photo(raw, Encoding())).shape == (side_px, 2, 3)
    else:
        with pytest.raises(BadPhoto, match=r"^photo too long"):
            encode_photo(raw, Encoding())


def test_who_scales_nothing_waits_for_no_torch() -> None:
    code = (
        "import sys; from pvtcap.storedphoto import Encoding, encode_photo; raw = sys.stdin.buffer.read();"
        "encode_photo(raw, Encoding(short_side_px=500)); assert 'torch' not in sys.modules;"
        "encode_photo(raw, Encoding(short_side_px=20)); assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], input=odd_photos()["4:2:0"], check=True, timeout=120)
