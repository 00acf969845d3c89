"""pytest tests/test_encoder.py: the encoder, frozen and learning, whole and in parts."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from smallmodel import model_of

from pvtcap import encoder
from pvtcap.encoder import Encoder, FeedForward
from pvtcap.errors import ConfigError


@pytest.fixture
def photos() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("name", "width"), [("pvt_v2_b0", 256), ("pvt_v2_b1", 512)])
def test_the_encoders_grid_and_width(name: str, width: int, photos: torch.Tensor) -> None:
    assert Encoder(name).eval()(photos).shape == (2, width, 1, 1)
    assert Encoder(name, stages=2).eval()(photos).shape[2:] == (4, 4)


@pytest.mark.parametrize("name", ["pvt_v2_b1", "pvt_v2_b2_li"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_frozen_encoder_gives_what_timms_gives(name: str, count: int, photos: torch.Tensor) -> None:
    ours = Encoder(name).eval()
    theirs = timm.create_model(name, num_classes=0).eval()
    theirs.load_state_dict(ours.pvt.state_dict())
    normalised = (photos[:count].float() - ours.mean) / ours.std
    with torch.no_grad():
        features, expected = ours(photos[:count]), theirs.forward_features(normalised)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    learning = ours.train()(photos[:count])
    assert learning.requires_grad
    torch.testing.assert_close(learning.detach(), expected, rtol=1e-4, atol=1e-5)  # no dropout in it, no drop path


# The first stage of four such photos is 16 rows of 40 places of 256 numbers, and a part has its neighbours' rows too.
@pytest.mark.parametrize(
    ("most", "first"), [(1, (1, 2 * 40)), (5 * 40 * 256, (1, 5 * 40)), (3 * 16 * 40 * 256, (3, 16 * 40))]
)
def test_a_frozen_encoder_gives_the_same_in_parts(
    most: int, first: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, photos = Encoder("pvt_v2_b0").eval(), torch.randint(0, 256, (4, 3, 64, 160), dtype=torch.uint8)
    parts, whole = [], FeedForward._convolved
    monkeypatch.setattr(FeedForward, "_convolved", lambda *call: parts.append(call[1].shape[:2]) or whole(*call))
    with torch.no_grad():
        expected = encoder(photos)
        assert parts[0] == (4, 16 * 40)
        parts.clear()
        monkeypatch.setattr("pvtcap.encoder._MOST_IN_CACHE", most)
        torch.testing.assert_close(encoder(photos), expected, rtol=1e-5, atol=1e-6)
    assert parts[0] == first


def test_an_encoder_that_is_not_one() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'pvt_v2_b1'"):
        Encoder("pvt_v2_b11")


@pytest.mark.parametrize(
    ("photos", "px", "sizes"),
    [
        (0, 32, [0]),
        (1, 384, [1]),
        (227, 384, [227]),
        (256, 384, [128, 128]),
        (512, 384, [128] * 4),
        (509, 384, [170, 170, 169]),
        (2, 10_000, [1, 1]),
    ],
)
def test_photos_reach_the_encoder_in_even_portions(photos: int, px: int, sizes: list[int]) -> None:
    portions = Encoder.portions(torch.empty((photos, 3, px, px), device="meta"))
    assert [len(one) for one in portions] == sizes


def test_portions_of_photos_give_what_all_of_them_give(
    tree: dict[str, Any], photos: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tree).eval()
    whole = model.patches(photos)
    monkeypatch.setattr(encoder, "_MOST_FEATURES", 1)
    assert len(Encoder.portions(photos)) == len(photos)
    torch.testing.assert_close(model.patches(photos), whole, rtol=1e-5, atol=1e-6)
