"""pytest tests/test_train.py: whole runs through ``train.run``, their checkpoints, and going on from them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import RankFunction
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pvtcap import runlog
from pvtcap import train as training
from pvtcap.afterstep import due
from pvtcap.checkpoint import Checkpoint
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.engine import Engine
from pvtcap.errors import PvtcapError
from pvtcap.job import length, make_tokenizer, prepare
from pvtcap.sources import Sources
from pvtcap.train import dropout_seed


def logged(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    return [line for line in runlog.read(run) if line["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in logged(run)}


def val_losses(run: Path) -> dict[int, float]:
    return {line["step"]: line["val/loss"] for line in logged(run, "val")}


def run_and_go_on(world: World, tree: dict[str, Any], stages: list[int]) -> None:
    """An unbroken run at each ZeRO stage; then one begun from its middle checkpoint, as if stopped there."""
    for stage in stages:
        whole, resumed = (Path(tree["run"]["dir"]) / f"{name}-{stage}" for name in ("whole", "resumed"))
        for run in (whole, resumed):
            config = parse({**tree, "run": {"dir": str(run)}, "zero": {"stage": stage}}, "test")
            if run == resumed and world.is_first:
                shutil.copytree(whole / "checkpoints" / "step_00000003", run / "checkpoints" / "step_00000003")
                # What a save that was killed leaves behind is newer, and must not be chosen.
                shutil.copytree(whole / "checkpoints" / "step_00000006", run / "checkpoints" / "step_00000004.partial")
                (run / "checkpoints" / "step_00000005").mkdir()
            world.barrier()
            training.run(config, world)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.long), "fp16"])
def test_a_resumed_run_repeats_the_unbroken_one_to_the_last_digit(
    run_ranks: RankFunction, tree: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    # Dropout, augmentation, accumulation and two decoding processes: all that could differ does its part.
    tree["data"] |= {"micro_batch": 2, "workers": 1}
    tree["train"] |= {"val_every_steps": 3}
    tree |= {"checkpoint": {"every_steps": 3, "keep_last": 2}, "precision": precision}
    run_ranks("test_train:run_and_go_on", 2, tree=tree, stages=[0, 1, 2, 3])
    for stage in range(4):
        whole, resumed = (tmp_path / "run" / f"{name}-{stage}" for name in ("whole", "resumed"))
        assert list(losses(whole)) == [1, 2, 3, 4, 5, 6]
        assert losses(resumed) == {step: loss for step, loss in losses(whole).items() if step > 3}
        # The one of step 3 is not in its log: as if it had been stopped before it was made.
        assert val_losses(resumed) == {step: loss for step, loss in val_losses(whole).items() if step >= 3}
        end = "checkpoints/step_00000006/trainable.safetensors"
        assert (resumed / end).read_bytes() == (whole / end).read_bytes()
        left = sorted(path.name for path in (resumed / "checkpoints").iterdir())
        assert left == ["step_00000003", "step_00000005", "step_00000006"]


def test_a_run_leaves_what_its_watchers_look_for(run_ranks: RankFunction, tree: dict[str, Any], tmp_path: Path) -> None:
    run_ranks("test_train:run_once", 1, tree=tree | {"train": {**tree["train"], "val_every_steps": 3}})
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "deepspeed.json", "environment.json", "log.jsonl", "tensorboard", "checkpoints", "ledger",
        "lock",
    }  # fmt: skip
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss", "train/perplexity", "train/lr", "train/lr_encoder", "train/grad_norm",
        "speed/images_per_second", "speed/images_per_second_per_device", "speed/captions_per_second",
        "speed/captions_per_second_per_device", "speed/tokens_per_second", "speed/step_seconds",
        "speed/model_tflops_per_device", "data/wait_share", "data/wait_share_worst", "data/wait_worst_rank",
        "memory/host_gib", "val/loss", "val/perplexity", "val/seconds", "checkpoint/seconds",
    }  # fmt: skip
    assert [event.step for event in events.Scalars("val/loss")] == [0, 3, 6]
    shown = [event.value for event in events.Scalars("train/loss")]
    assert shown == pytest.approx(list(losses(run).values()), rel=1e-6)
    packages = json.loads((run / "environment.json").read_text())["packages"]
    assert {"torch", "deepspeed", "timm", "transformers"} <= packages.keys()
    manifest = Checkpoint.open(run).manifest
    assert (manifest.step, manifest.num_samples_seen, manifest.world_size) == (6, 48, 1)


def run_once(world: World, tree: dict[str, Any]) -> None:
    training.run(parse(tree, "test"), world)


def errors(world: World, tree: dict[str, Any]) -> dict[str, str]:
    """A run, then changes under which going on must be refused: what each is told."""
    run_once(world, tree)
    changes: dict[str, dict[str, Any]] = {
        "model": {"model": {**tree["model"], "decoder_width": 64}},
        "seed": {"run": {**tree["run"], "seed": 5}},
        "batch": {"data": {**tree["data"], "global_batch": 4}},
        "data": {"data": {**tree["data"], "train": tree["data"]["val"]}},
        "divide": {"data": {**tree["data"], "global_batch": 9, "micro_batch": 2}},
        "no data": {"data": {**tree["data"], "train": None}},
    }
    told = {}
    for name, change in changes.items():
        try:
            run_once(world, tree | change)
        except PvtcapError as error:
            told[name] = str(error)
    try:
        training.run(parse(tree, "test"), world, resume="none")
    except PvtcapError as error:
        told["none"] = str(error)
    return told


def test_checkpoints_by_the_clock(run_ranks: RankFunction, tree: dict[str, Any], tmp_path: Path) -> None:
    tree |= {"checkpoint": {"every_minutes": 1e-6, "keep_last": 9}}
    run_ranks("test_train:run_once", 2, tree=tree)
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == [f"step_{step:08d}" for step in range(1, 7)]


def test_going_on_as_another_run_is_refused_with_what_changed(run_ranks: RankFunction, tree: dict[str, Any]) -> None:
    (told,) = run_ranks("test_train:errors", 1, tree=tree | {"train": {**tree["train"], "steps": 1}})
    assert "got decoder_width=64; wanted decoder_width=32" in told["model"]
    assert "run.seed" in told["seed"]
    assert "data.global_batch" in told["batch"]
    assert "the training data" in told["data"]
    assert "multiple of micro_batch" in told["divide"]
    assert "no training data" in told["no data"]
    assert "already holds a run" in told["none"]
    assert all("\n" not in line for line in told.values())


def test_a_loss_that_is_not_finite_stops_all_ranks_and_names_the_samples(
    run_ranks: RankFunction, tree: dict[str, Any]
) -> None:
    results = run_ranks("test_train:explode", 2, tree=tree)
    (message, before, after), (other, *_) = results
    assert "the loss of step 1 is not finite; no weight was changed" in message
    assert len([key for key in message.split() if key.startswith("train-")]) == 4  # rank 0's half of the batch
    assert message == other
    assert before == after


def test_a_gradient_that_is_not_finite_stops_all_ranks_too(
    run_ranks: RankFunction, tree: dict[str, Any], tmp_path: Path
) -> None:
    for stage in (0, 2, 3):
        results = run_ranks("test_train:explode", 2, tree=tree | {"zero": {"stage": stage}}, in_backward=True)
        (message, before, after), (other, *_) = results
        assert "a gradient of step 1 is not finite; no weight was changed" in message
        assert message == other
        assert before == after
        told = json.loads((tmp_path / "run" / "not_finite.json").read_text())
        assert (told["step"], told["what"], len(told["keys"])) == (1, "a gradient", 4)


def explode(world: World, tree: dict[str, Any], in_backward: bool = False) -> list[Any]:
    """One training step with weights of which rank 0's give NaN: in the loss, or in a gradient alone."""
    from pvtcap.errors import TrainError
    from pvtcap.ledger import Ledger
    from pvtcap.stream import train_batches

    config = parse(tree, "test")
    job = prepare(config, world, "auto")
    if world.is_first and in_backward:
        job.model.projection.net.bias.register_hook(lambda gradient: gradient * float("nan"))
    engine = Engine(job.model, config, job.plan, world)
    if world.is_first and not in_backward:
        engine.model.projection.net.bias.data[0] = float("nan")
    before = checksum(engine)
    batches = train_batches(job.train, job.view, job.plan, world, seed=0, first_step=0)
    ledger = Ledger(config.run.dir, job.train, world, start_step=0, max_bad_fraction=0.0)
    try:
        training.train_step(engine, batches, ledger, job.plan, world, step=1, scale=1.0)
    except TrainError as error:
        return [str(error), before, checksum(engine)]
    return ["nothing was raised", before, before]


def checksum(engine: Engine) -> float:
    """Of all trainable weights, on all ranks; collective."""
    state = engine.trainable_state() or {}
    return engine.world.broadcast(sum(float(value.double().nansum()) for value in state.values()))


def test_every_place_of_a_run_has_its_own_dropout() -> None:
    places = [
        (seed, step, turn, rank) for seed in range(3) for step in range(20) for turn in range(3) for rank in range(4)
    ]
    assert len({dropout_seed(*place) for place in places}) == len(places)


def test_what_is_due_when() -> None:
    assert [step for step in range(8) if due(3, step, last=step == 7)] == [0, 3, 6, 7]
    assert not due(None, 7, last=True)


def test_epochs_become_steps_rounded_up(tree: dict[str, Any], shapes: Path) -> None:
    tree["train"] = {"what": "projection+decoder+encoder", "epochs": 2.1}
    assert length(parse(tree, "test"), train_samples=48) == 13
    tree["train"].pop("epochs")
    with pytest.raises(PvtcapError, match=r"Set train\.epochs or train\.steps"):
        length(parse(tree, "test"), train_samples=48)


def test_the_learned_vocabulary_covers_the_training_captions(tree: dict[str, Any]) -> None:
    config = parse(tree, "test")
    sources = Sources.open(config.data)
    tokenizer = make_tokenizer(config, sources)
    for captions in sources.captions():
        for caption in captions:
            assert tokenizer.decode(tokenizer.pack([[caption]], 24).tokens[0].tolist()) == caption
