"""pytest -m gpu: what only an NVIDIA GPU can show; all of it is skipped, and says so, without one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from featuresets import ALONE, frozen_tree, make, save_encoder
from test_engine import merged, plain, stages
from test_train import logged, losses, run_and_go_on

from pvtcap import doctor, packing
from pvtcap import train as training
from pvtcap.captioner import Captioner
from pvtcap.checkpoint import Checkpoint
from pvtcap.config import ModelConfig, batch_plan
from pvtcap.configfile import parse
from pvtcap.decoder import Decoder
from pvtcap.dist import World
from pvtcap.errors import MachineError
from pvtcap.featureformat import decode
from pvtcap.libraryerrors import explaining
from pvtcap.packing import Rows
from pvtcap.shardset import ShardReader, ShardSet
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches
from pvtcap.text import CaptionTokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("default"),  # DeepSpeed's, which elsewhere come up in processes of their own
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU on this machine"),
]
__all__ = ["plain"]  # a fixture


@pytest.fixture(autouse=True)
def float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions round to TF32 by torch's default, which no CPU does."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def world() -> Iterator[World]:
    with World.start() as world:
        assert world.device.type == "cuda"
        yield world


def test_the_model_gives_the_loss_and_gradients_that_it_gives_on_a_cpu(plain: dict[str, Any]) -> None:
    config = parse(plain, "test")
    sources = Sources.open(config.data)
    tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 100)
    view = View(config.data, tokenizer, config.text.max_tokens)
    cpu = World(0, 1, 0, torch.device("cpu"))
    batch = next(train_batches(sources, view, batch_plan(config.data, 1), cpu, seed=0, first_step=0))
    found = {}
    for device in ("cpu", "cuda"):
        model = Captioner(config, tokenizer.size).to(device).train()
        model.encoder.eval()  # it drops whole branches in training, by random numbers that devices do not share
        loss = model(batch.to(torch.device(device)))
        loss.backward()
        norms = {name: one.grad.double().norm().item() for name, one in model.trainable().items()}
        found[device] = float(loss.detach()), norms
    assert found["cuda"][0] == pytest.approx(found["cpu"][0], rel=1e-5)
    assert found["cuda"][1] == pytest.approx(found["cpu"][1], rel=1e-3, abs=1e-5)


def test_the_vocabulary_is_widened_in_training_alone_and_the_losses_stay() -> None:
    decoder = Decoder(ModelConfig(decoder_layers=1), vocab_size=30_522).to("cuda", torch.bfloat16)
    hidden, labels = torch.randn(64, 768, device="cuda", dtype=torch.bfloat16), torch.arange(64, device="cuda")
    columns, losses = [], []
    for learning in (True, False):
        decoder.train(learning)
        columns.append(decoder.lm.cls(hidden).shape[1])
        losses.append(decoder._cross_entropies(hidden, labels).detach())
    assert columns == [30_528, 30_522]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_kernels_give_what_torch_gives(dtype: torch.dtype) -> None:
    """In 16 bits, of a row longer than a program's tile, one of three tokens, and of three captions."""
    from gpukernels import ours_of  # needs Triton

    from pvtcap import gpuloss, gpuresidual

    segments = torch.full((3, 94), -1, device="cuda")
    for row, lengths in zip(segments, ([4, 60, 30], [3], [7, 1, 9]), strict=True):
        row[: sum(lengths)] = torch.arange(len(lengths), device="cuda").repeat_interleave(
            torch.tensor(lengths, device="cuda")
        )
    rows = Rows.of(segments, (segments.flatten() >= 0).nonzero().squeeze(1))
    count, heads, width, patches = len(rows.slots_N), 12, 64, 144
    torch.manual_seed(0)
    tokens = [torch.randn(count, heads, width, device="cuda", dtype=dtype) for _ in range(3)]
    photos = [torch.randn(3, patches, heads, width, device="cuda", dtype=dtype) for _ in range(2)]
    norm = torch.nn.LayerNorm(heads * width).to("cuda", dtype)
    branch, residual = (one.view(1, count, -1) for one in tokens[:2])
    asked = torch.randn(count, heads, width, device="cuda", dtype=dtype)

    def found(attend: Any, given: list[torch.Tensor], kernels: bool) -> list[torch.Tensor]:
        learning = [(one if kernels else one.float()).detach().requires_grad_() for one in given]
        attended = attend(*learning)
        gradients = torch.autograd.grad(attended, learning, asked.view(attended.shape).to(attended.dtype))
        return [attended.detach(), *gradients]

    def normed(branch: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(branch + residual, norm.normalized_shape)

    for ours, theirs, given in (
        (ours_of("caption"), packing.attend_to_caption, tokens),
        (ours_of("photo"), packing.attend_to_photo, [tokens[0], *photos]),
    ):
        compare(found(lambda *three, run=ours: run(*three, rows, 0.0), given, True),
                found(lambda *three, run=theirs: run(*three, rows, 0.0), given, False))  # fmt: skip
    given = [branch, residual]
    compare(found(lambda *two: gpuresidual.add_and_norm(*two, norm, 0.0), given, True), found(normed, given, False))
    logits, labels = 3 * torch.randn(64, 30_528, device="cuda", dtype=dtype), torch.arange(64, device="cuda") * 400
    for smoothing in (0.0, 0.1):
        learning = [one.detach().requires_grad_() for one in (logits, logits.float())]
        losses = [
            gpuloss.cross_entropies(learning[0], labels, 30_522, smoothing),
            torch.nn.functional.cross_entropy(
                learning[1][:, :30_522], labels, reduction="none", label_smoothing=smoothing
            ),
        ]
        compare(*([loss.detach(), *torch.autograd.grad(loss.sum(), [given])]
                  for loss, given in zip(losses, learning, strict=True)))  # fmt: skip


def compare(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.float(), other, rtol=0.02, atol=0.01 * float(other.abs().max()))


def test_every_stage_and_precision_learns_the_same(world: World, plain: dict[str, Any]) -> None:
    grid = list(itertools.product(range(4), ("fp32", "bf16", "fp16")))
    variants = [{"zero": {"stage": stage}, "precision": precision} for stage, precision in grid]
    results = dict(zip(grid, stages(world, plain, variants), strict=True))
    alone = results[0, "fp32"]
    assert alone["losses"][-1] < alone["losses"][0]
    for (stage, precision), result in results.items():
        assert result["losses"][0] == pytest.approx(alone["losses"][0], rel=1e-5 if precision == "fp32" else 2e-2)
        assert result["losses"][-1] < result["losses"][0], (stage, precision)
        if precision != "fp16":  # which leaves out steps until its loss scale fits
            close = 1e-4 if precision == "fp32" else 2e-2
            assert result["losses"] == pytest.approx(alone["losses"], rel=close), (stage, precision)
            assert result["val_loss"] == pytest.approx(alone["val_loss"], rel=close), (stage, precision)


def test_offload_and_checkpointing_change_no_losses(world: World, plain: dict[str, Any]) -> None:
    variants: list[dict[str, Any]] = [
        {},
        {"zero": {"stage": 2, "offload": "optimizer"}},
        {"zero": {"stage": 3, "offload": "optimizer+parameters"}},
        {"train": {"activation_checkpointing": True}},
    ]
    usual, *others = stages(world, plain, variants)
    for variant, result in zip(variants[1:], others, strict=True):
        assert result["losses"] == pytest.approx(usual["losses"], rel=1e-4), variant
        assert result["val_loss"] == pytest.approx(usual["val_loss"], rel=1e-4), variant


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_resumed_run_repeats_the_unbroken_one(
    world: World, tree: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    tree["data"] |= {"micro_batch": 4, "workers": 1}
    tree["train"] |= {"val_every_steps": 3}
    tree |= {"checkpoint": {"every_steps": 3, "keep_last": 2}, "precision": precision}
    run_and_go_on(world, tree, [0, 2, 3])
    for stage in (0, 2, 3):
        whole, resumed = (losses(tmp_path / "run" / f"{name}-{stage}") for name in ("whole", "resumed"))
        assert list(resumed) == [4, 5, 6]
        # Not to the last digit: a GPU adds up the embedding's gradients in any order.
        assert resumed == pytest.approx(
            {step: whole[step] for step in resumed}, rel=1e-5 if precision == "fp32" else 1e-2
        )
    last = logged(tmp_path / "run" / "whole-2")[-1]
    assert 0 < last["memory/gpu_gib"] <= last["memory/gpu_reserved_gib"]


def test_features_made_on_a_gpu_are_those_of_a_cpu_and_train(world: World, shapes: Path, tmp_path: Path) -> None:
    save_encoder(tmp_path / "encoder.safetensors", 1)
    tree = {**frozen_tree(shapes, tmp_path), "run": {"dir": str(tmp_path / "run")}}
    for name, where in (("cpu", ALONE), ("gpu", world)):
        make(where, tree, str(shapes / "train"), str(tmp_path / name))
    stored = {}
    for name in ("cpu", "gpu"):
        shardset = ShardSet.open(tmp_path / name)
        assert shardset.manifest.features is not None
        with ShardReader(shardset) as reader:
            samples = [reader.read(0, index) for index in range(shardset.sizes[0])]
        stored[name] = np.stack([decode(one.photo, shardset.manifest.features, 0, one.key) for one in samples])
    assert stored["gpu"].dtype == np.float16
    np.testing.assert_allclose(stored["gpu"], stored["cpu"], rtol=2**-10, atol=2e-3)
    training.run(parse(merged(tree, {"data": {"train": str(tmp_path / "gpu")}}), "test"), world)
    found = losses(tmp_path / "run")
    assert found[max(found)] < found[min(found)]


def test_a_checkpoint_captions_the_same_on_both(world: World, tree: dict[str, Any], tmp_path: Path) -> None:
    tree["train"] |= {"steps": 30}
    training.run(parse(tree, "test"), world)
    checkpoint = Checkpoint.open(tmp_path / "run")
    tokenizer = checkpoint.tokenizer()
    photos = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8)
    how = checkpoint.config.evaluate
    on_cpu, on_gpu = (
        checkpoint.captioner(torch.device(device)).caption(photos.to(device), tokenizer, how)
        for device in ("cpu", "cuda")
    )
    assert on_gpu == on_cpu
    assert all(on_gpu)


def test_a_full_gpu_is_one_line_with_what_to_do(world: World, tree: dict[str, Any], tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-4)
    try:
        with pytest.raises(MachineError, match="the GPU's memory is full") as caught, explaining(tmp_path / "errors"):
            training.run(parse(tree, "test"), world)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "data.micro_batch" in str(caught.value)
    assert "OutOfMemoryError" in next((tmp_path / "errors").iterdir()).read_text()


def test_doctor_finds_the_gpu(tmp_path: Path) -> None:
    findings = {one.what: one for one in doctor.examine(tmp_path)}
    assert findings["GPU 0"].level == "ok"
    assert torch.cuda.get_device_name() in findings["GPU 0"].found
    assert findings["bf16"].level == findings["CUDA, NCCL"].level == "ok"


def test_compilation_changes_no_losses(world: World, plain: dict[str, Any]) -> None:
    usual, compiled = stages(world, plain, [{}, {"train": {"compile": True}}])
    assert compiled["losses"] == pytest.approx(usual["losses"], rel=1e-4)
    assert compiled["val_loss"] == pytest.approx(usual["val_loss"], rel=1e-4)
