"""pytest tests/test_flops.py: counted by formula and counted by torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pvtcap.batch import Batch
from pvtcap.captioner import Captioner
from pvtcap.config import TRAINABLE
from pvtcap.configfile import parse
from pvtcap.flops import StepFlops, counter, encoder_flops, peak_flops


@pytest.mark.parametrize("what", [what for what in TRAINABLE if "encoder" not in what])
@pytest.mark.parametrize("projection", ["conv3x3", "mlp"])
def test_a_step_needs_what_torch_counts(tree: dict[str, Any], tmp_path: Any, what: str, projection: str) -> None:
    tree["train"]["what"] = what
    tree["data"]["image_px"] = 64
    tree["model"] |= {"projection": projection, "decoder_width": 128, "decoder_feedforward": 512, "decoder_layers": 2,
                      "encoder_weights": str(tmp_path)}  # fmt: skip
    config = parse(tree, "test")
    model = Captioner(config, 1000).train()
    tokens = torch.randint(1, 1000, (3, 8))
    labels = tokens.clone()
    labels[:, :2] = -100
    photos = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    batch = Batch(photos, tokens, labels, *[torch.arange(8).expand(3, -1)] * 2, torch.ones_like(tokens), (), 3)
    with counter() as count:
        model(batch).backward()
    ours = StepFlops.of(config, 1000, prefix=2, features=False).total(photos=3, captions=0, labels=18)
    # A first layer has no gradient of its input to compute, and self-attention's small products are not counted.
    assert ours == pytest.approx(count.get_total_flops(), rel=0.06)


def test_joined_operations_are_counted_as_those_of_timms(tree: dict[str, Any]) -> None:
    encoder = Captioner(parse(tree, "test"), 1000).encoder.eval()
    photos = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    with counter() as usual:
        encoder(photos)  # with gradients
    with counter() as joined, torch.no_grad():
        encoder(photos)
    assert joined.get_total_flops() == usual.get_total_flops() > 0


def test_an_encoder_that_trains_costs_its_backward_pass(tree: dict[str, Any]) -> None:
    """By formula only: torch counts the gradients of depthwise convolutions as if they were dense ones."""
    trained, frozen = (
        StepFlops.of(
            parse(
                {
                    **tree,
                    "train": {**tree["train"], "what": what},
                    "model": {**tree["model"], "encoder_weights": "a file"},
                },
                "test",
            ),
            200,
            0,
            features=False,
        )
        for what in ("projection+decoder+encoder", "projection+decoder")
    )
    encoder, width, patches = encoder_flops(parse(tree, "test"))
    assert trained.photo - frozen.photo == pytest.approx(2 * encoder + 2 * patches * width * 32)


def test_features_cost_no_encoder(tree: dict[str, Any]) -> None:
    config = parse(tree, "test")
    shown, stored = (StepFlops.of(config, 200, prefix=0, features=features) for features in (False, True))
    assert stored.photo < shown.photo
    assert (stored.token, stored.label) == (shown.token, shown.label)


def test_what_a_device_can_do(tree: dict[str, Any]) -> None:
    config = parse(tree, "test")
    assert peak_flops(config, "x86_64") is None
    assert peak_flops(config, "NVIDIA H100 PCIe") == 51e12
    assert peak_flops(config, "NVIDIA H100 80GB HBM3") == 67e12
    tree["precision"] = "bf16"
    assert peak_flops(parse(tree, "test"), "NVIDIA H200") == 989e12
    tree["train"]["device_peak_tflops"] = 0.25
    assert peak_flops(parse(tree, "test"), "NVIDIA H200") == 0.25e12
