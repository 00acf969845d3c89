"""pytest tests/test_decoding_memory.py: photos are decoded over one another, and none shows in the next."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import simplejpeg
import torch
from numpy.typing import NDArray
from oddphotos import encoded, odd_photos, picture

from pvtcap import pixels

SIDE_PX = 48
# Below the side, as large (torch only copies then), odd, halved by the decoder, and tall.
SIZES = ((20, 30), (SIDE_PX, SIDE_PX), (91, 61), (640, 480), (50, 300))


def photos() -> list[bytes]:
    return [encoded(picture(size)) for size in SIZES] + list(odd_photos().values())


def squares() -> list[torch.Tensor]:
    draws = [pixels.CropDraw(0.3, 0.5, 0.2, flip) for flip in (0.1, 0.9)] + [pixels.CropDraw(1.0, 0, 0, 0.9)]
    crops = [pixels.augmented(raw, "here", SIDE_PX, 0.5, 0.5, draw) for raw in photos() for draw in draws]
    return crops + [pixels.whole(raw, "here", SIDE_PX) for raw in photos()]


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Each photo in memory of its own."""
    with monkeypatch.context() as patch:
        patch.setattr(pixels._desk, "memory", None)
        return squares()


def test_a_photo_stays_as_it_is_when_others_are_decoded(alone: list[torch.Tensor]) -> None:
    for found, wanted in zip(squares(), alone, strict=True):
        assert torch.equal(found, wanted)


def test_a_photo_at_full_size_is_the_callers() -> None:
    first, second = (encoded(picture(size)) for size in SIZES[2:4])
    photo = pixels.decode(first, "here")
    before = photo.clone()
    pixels.decode(second, "here")
    pixels.whole(second, "here", SIDE_PX)
    assert torch.equal(photo, before)


def test_threads_do_not_share_it(alone: list[torch.Tensor]) -> None:
    with ThreadPoolExecutor(4) as pool:
        for of_thread in pool.map(lambda _: squares(), range(8)):
            assert all(torch.equal(found, wanted) for found, wanted in zip(of_thread, alone, strict=True))


def test_a_photo_with_no_room_there_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, decode, given = encoded(picture((91, 61))), simplejpeg.decode_jpeg, []

    def spied(*args: object, buffer: object, **how: object) -> NDArray[np.uint8]:
        given.append(buffer is not None)
        photo: NDArray[np.uint8] = decode(*args, buffer=buffer, **how)
        return photo

    monkeypatch.setattr(simplejpeg, "decode_jpeg", spied)
    wanted = pixels.whole(raw, "here", SIDE_PX)
    for room_bytes in (91 * 61 * 3, 91 * 61 * 3 - 1):
        monkeypatch.setattr(pixels._desk, "memory", np.empty(room_bytes, np.uint8))
        assert torch.equal(pixels.whole(raw, "here", SIDE_PX), wanted)
    assert given == [True, True, False]
