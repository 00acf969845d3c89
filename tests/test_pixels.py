"""pytest tests/test_pixels.py: whoever decodes a photo, it is the same photo, taken or refused alike."""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from oddphotos import encoded, odd_photos, picture, segment
from PIL import Image
from torch.nn import functional

from pvtcap import jpeg, pixels
from pvtcap import photo as photo_module
from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto, pillow_errors, upright_rgb

DATA = Path(__file__).parents[1].parent / "shared" / "data"
REAL = ("flickr8k/images", "coco/val2017", "broken/grayscale")
# Pillow and simplejpeg bring a libjpeg-turbo each. With those at hand all 5,136 real photos are equal to the last bit.
DECODERS_DIFFER_BY = 1


def by_pillow(raw: bytes) -> NDArray[np.uint8] | None:
    """(H, W, 3) as Pillow alone sees it; None if it refuses."""
    try:
        with pillow_errors(), Image.open(io.BytesIO(raw)) as image:
            return np.array(upright_rgb(image))
    except BadPhoto:
        return None


def by_us(raw: bytes) -> NDArray[np.uint8] | None:
    try:
        return pixels.decode(raw, "here").permute(1, 2, 0).numpy()
    except pixels.UndecodablePhoto:
        return None


def assert_alike(raw: bytes) -> None:
    ours, pillows = by_us(raw), by_pillow(raw)
    assert (ours is None) == (pillows is None)
    if ours is not None and pillows is not None:
        assert ours.shape == pillows.shape
        assert int(np.abs(ours.astype(int) - pillows).max()) <= DECODERS_DIFFER_BY


def bicubic(photo: torch.Tensor, side_px: int) -> torch.Tensor:
    """The plain way: (3, H, W) → (3, side, side), each colour's plane by itself in memory."""
    return functional.interpolate(photo[None].contiguous(), [side_px, side_px], mode="bicubic", antialias=True)[0]


def psnr_db(one: torch.Tensor, other: torch.Tensor) -> float:
    error = float(((one.double() - other.double()) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


@pytest.mark.parametrize("kind", odd_photos())
def test_every_kind_of_photo_looks_as_pillow_shows_it(kind: str) -> None:
    raw = odd_photos()[kind]
    assert_alike(raw)
    photo = pixels.decode(raw, "here")
    assert (photo.dtype, photo.shape[0]) == (torch.uint8, 3)
    for square in (pixels.whole(raw, "here", 64), pixels.augmented(raw, "here", 64, 0.5, 0.5, crop_of(0))):
        assert (square.shape, square.dtype) == ((3, 64, 64), torch.uint8)
    assert torch.equal(pixels.whole(raw, "here", 64), bicubic(photo, 64))


@pytest.mark.parametrize("folder", REAL)
def test_real_photos_are_the_same_by_both_decoders(folder: str) -> None:
    photos = sorted((DATA / folder).glob("*.jp*g"))[:40]
    if not photos:
        pytest.skip(f"no {folder} in shared/data")
    for photo in photos:
        assert_alike(photo.read_bytes())


def test_most_photos_never_reach_pillows_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the quick way could be closed, unseen."""

    def refuse(image: Image.Image) -> Image.Image:
        raise AssertionError("decoded by Pillow")

    monkeypatch.setattr(photo_module, "upright_rgb", refuse)
    for kind in ("4:4:4", "4:2:0", "progressive", "grey", "orientation 1", "orientation 3", "orientation 6", "MPO"):
        pixels.whole(odd_photos()[kind], "here", 32)
    with pytest.raises(AssertionError, match="decoded by Pillow"):
        pixels.whole(odd_photos()["CMYK"], "here", 32)


PLAIN = (
    "4:4:4",
    "4:2:2",
    "4:2:0",
    "progressive",
    "restarts",
    "RGB inside",
    "grey",
    "one pixel",
    "profile",
    "edited",
    "MPO",
)


def test_plain_jpegs_are_not_even_opened_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be turned or be no RGB is: EXIF, XMP, CMYK, and heads of which one cannot be sure."""
    sizes = {kind: Image.open(io.BytesIO(raw)).size for kind, raw in odd_photos().items()}
    assert {kind: jpeg.plain_size(raw) for kind, raw in odd_photos().items()} == {
        kind: size if kind in PLAIN else None for kind, size in sizes.items()
    }
    monkeypatch.setattr(Image, "open", None)
    for kind in PLAIN:
        pixels.whole(odd_photos()[kind], "here", 32)
    with pytest.raises(pixels.UndecodablePhoto):
        pixels.whole(odd_photos()["orientation 1"], "here", 32)


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_photos_are_upright_and_clear_ones_white(orientation: int) -> None:
    exif, raw = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(raw, "JPEG", exif=exif)
    decoded = pixels.decode(raw.getvalue(), "here").float()
    assert decoded.shape == ((3, 40, 30) if orientation == 6 else (3, 30, 40))
    first, last = (decoded[:, :, 0], decoded[:, :, -1]) if orientation == 6 else (decoded[:, 0], decoded[:, -1])
    darker, brighter = (first, last) if orientation == 1 else (last, first)
    assert brighter.mean() - darker.mean() > 150
    assert int(pixels.decode(odd_photos()["clear"], "here").min()) == 255


def draws(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def crop_of(seed: int) -> pixels.CropDraw:
    return pixels.CropDraw.of(draws(seed))


@pytest.mark.parametrize("kind", ["4:2:0", "PNG"])
@pytest.mark.parametrize("seed", range(6))
def test_a_crop_is_where_the_draw_says(kind: str, seed: int) -> None:
    raw, min_area = odd_photos()[kind], 0.3
    area, top, left, flip = draws(seed).random(4)
    scale = float(np.sqrt(min_area + (1 - min_area) * area))
    height, width = max(1, round(61 * scale)), max(1, round(90 * scale))
    y, x = round(top * (61 - height)), round(left * (90 - width))
    crop = pixels.decode(raw, "here")[:, y : y + height, x : x + width]
    expected = bicubic(crop.flip(2) if flip < 0.5 else crop, 48)
    assert torch.equal(pixels.augmented(raw, "here", 48, min_area, 0.5, crop_of(seed)), expected)


def test_a_draw_is_four_numbers_and_all_that_is_random() -> None:
    raw, draw = odd_photos()["4:2:0"], draws(5)
    first, second = (pixels.augmented(raw, "here", 32, 0.5, 0.5, pixels.CropDraw.of(draw)) for _ in range(2))
    assert not torch.equal(first, second)
    again = draws(5)
    again.random(4)
    assert torch.equal(pixels.augmented(raw, "here", 32, 0.5, 0.5, pixels.CropDraw.of(again)), second)
    unmoved = pixels.augmented(raw, "here", 32, 1.0, 0.0, crop_of(5))
    assert torch.equal(unmoved, pixels.whole(raw, "here", 32))
    mirrored = pixels.augmented(raw, "here", 32, 1.0, 1.0, crop_of(5)).flip(2)
    assert int((mirrored.int() - unmoved.int()).abs().max()) <= 1


def test_threads_do_not_change_a_pixel() -> None:
    raw, before = encoded(picture((640, 480))), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(pixels.augmented(raw, "here", 224, 0.5, 0.5, crop_of(0)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize(("side_px", "divisor"), [(64, 1), (40, 2), (32, 2), (20, 4), (10, 8), (4, 8)])
def test_large_photos_are_halved_by_the_decoder_with_pixels_to_spare(
    side_px: int, divisor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, shapes, decode = encoded(picture((171, 121))), [], simplejpeg.decode_jpeg

    def spied(*args: object, **how: object) -> NDArray[np.uint8]:
        photo: NDArray[np.uint8] = decode(*args, **how)
        shapes.append(photo.shape)
        return photo

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spied)
    pixels.whole(raw, "here", side_px)
    assert shapes == [(-(-121 // divisor), -(-171 // divisor), 3)]
    # A crop with a quarter of the area has half the sides, and so half the pixels to spare.
    pixels.augmented(raw, "here", side_px // 2, 0.25, 0.5, pixels.CropDraw(0, 0, 0, 0))
    assert shapes[1:] == shapes[:1]


def test_halving_cannot_be_seen() -> None:
    """On COCO's photos with even sides: 44 dB in the median and 40 at worst. JPEG at quality 90 by itself: 37."""
    photos = []
    for path in sorted((DATA / "coco" / "val2017").glob("*.jpg")):
        with Image.open(path) as image:
            if all(side % 16 == 0 for side in image.size):
                photos.append((path.read_bytes(), min(image.size)))
    if not photos:
        pytest.skip("no coco/val2017 in shared/data")
    found = []
    for raw, short_px in photos[:16]:
        side_px = short_px // 3
        found.append(psnr_db(pixels.whole(raw, "here", side_px), bicubic(pixels.decode(raw, "here"), side_px)))
    assert np.median(found) > 42
    assert min(found) > 38
    assert max(found) < float("inf")  # they were halved


def test_stacked_photos_are_a_batch_as_they_lie() -> None:
    photos = [pixels.whole(raw, "here", 32) for raw in odd_photos().values()] + [pixels.blank(32)]
    batch = pixels.stacked(photos)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch, torch.stack(photos))


def bomb(width: int, height: int) -> bytes:
    """A JPEG that says it is larger than it is."""
    raw = odd_photos()["4:2:0"]
    return raw.replace(struct.pack(">HH", 61, 90), struct.pack(">HH", height, width), 1)


def refused() -> Iterator[tuple[str, bytes, str]]:
    whole = encoded(picture((400, 300)))
    yield "empty", b"", "not a photo"
    yield "text", b"not a photo", "not a photo"
    yield "cut in the head", whole[:600], "truncated photo"
    yield "cut", whole[: len(whole) // 2], "truncated photo"
    yield "cut at a quarter", encoded(picture((400, 300)), progressive=True)[: len(whole) // 4], "truncated photo"
    yield "bomb", bomb(60_000, 60_000), "photo too large"
    yield "bomb that Pillow only warns of", bomb(10_000, 10_000), "photo too large"
    yield "cut PNG", odd_photos()["PNG"][:-400], "truncated photo"


@pytest.mark.parametrize(("raw", "reason"), [pytest.param(raw, why, id=name) for name, raw, why in refused()])
def test_what_is_not_a_whole_photo_is_named_and_can_be_counted(raw: bytes, reason: str) -> None:
    for attempt in (
        lambda: pixels.decode(raw, "shard 7, cat"),
        lambda: pixels.whole(raw, "shard 7, cat", 8),
        lambda: pixels.augmented(raw, "shard 7, cat", 8, 0.5, 0.5, crop_of(0)),
    ):
        with pytest.raises(pixels.UndecodablePhoto, match=r"^shard 7, cat: not a (readable )?photo") as caught:
            attempt()
        assert caught.value.reason == reason
        assert "\n" not in str(caught.value)
        assert str(caught.value).endswith("Leave it out, or give a JPEG, PNG or WebP file.")
        copy = pickle.loads(pickle.dumps(caught.value))
        assert type(copy) is pixels.UndecodablePhoto
        assert isinstance(copy, ShardError)
        assert (str(copy), copy.reason, copy.where) == (str(caught.value), reason, "shard 7, cat")


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damaged_photos_are_taken_or_refused_by_both_alike(data: st.DataObject) -> None:
    raw = bytearray(odd_photos()[data.draw(st.sampled_from(PLAIN))])
    for _ in range(data.draw(st.integers(1, 3))):
        # Most of a file is scan data; the head is where one byte decides how the rest is read.
        end = data.draw(st.sampled_from([min(700, len(raw)), len(raw)]))
        place = data.draw(st.integers(0, end - 1))
        match data.draw(st.sampled_from(["change", "cut", "remove", "insert", "note"])):
            case "change":
                raw[place] = data.draw(st.integers(0, 255))
            case "cut":
                del raw[max(2, place) :]
            case "remove":
                del raw[max(2, place) : max(2, place) + data.draw(st.integers(1, 40))]
            case "insert":
                raw[place:place] = data.draw(st.binary(min_size=1, max_size=20))
            case _:
                names = [b"Photoshop 3.0\0", b"Exif\0\0", b"XMP\0", b"ICC_PROFILE\0", b"Adobe"]
                blocks = data.draw(st.lists(st.sampled_from([b"8BIM", b"\x03\xed", b"\0", b"\0\0\0\x10", b"\1\1"])))
                raw[2:2] = segment(
                    data.draw(st.integers(0xE0, 0xEF)), data.draw(st.sampled_from(names)) + b"".join(blocks)
                )
    size = by_header(bytes(raw))
    if size is None or size[0] * size[1] < 4_000_000:  # a flipped bit can make a photo of 80 megapixels, right but slow
        assert_alike(bytes(raw))


def by_header(raw: bytes) -> tuple[int, int] | None:
    try:
        with pillow_errors(), Image.open(io.BytesIO(raw)) as image:
            return image.size
    except BadPhoto:
        return None
