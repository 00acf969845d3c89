"""pytest tests/test_elastic.py: going on with another number of ranks and another ZeRO stage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RankFunction
from safetensors.torch import load_file
from test_train import logged, losses

from pvtcap import audit, checkpoint, stepfolders
from pvtcap import train as training
from pvtcap.config import ranks_in_words
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.errors import PvtcapError

FIRST, STEPS = 5, 55  # the bar is losses equal to 1e-5 over fifty steps
# ZeRO stages: what two ranks wrote, what goes on, on how many ranks
ALL = [(2, 2, 1), (2, 3, 4), (1, 0, 1), (0, 3, 1), (3, 1, 4), (3, 0, 1), (0, 0, 4), (0, 2, 2)]


def runs(world: World, tree: dict[str, Any], which: list[tuple[str, int]], steps: int) -> None:
    """A run in each folder at its ZeRO stage: from its checkpoint, if it has one."""
    tree = {**tree, "train": {**tree["train"], "steps": steps}}
    for folder, stage in which:
        training.run(parse({**tree, "run": {"dir": folder}, "zero": {"stage": stage}}, "test"), world)


@pytest.fixture
def steady(tree: dict[str, Any]) -> dict[str, Any]:
    """Without dropout, which is drawn by rank; accumulation makes up for ranks that are gone."""
    tree["model"] |= {"dropout": 0.0}
    tree["data"] |= {"micro_batch": 2}
    # AdamW turns rounding into whole steps where a gradient is almost nothing: small steps, few.
    # And the rate is the same however long the run, so that its first steps may be a run of their own.
    tree["optim"] = {"lr": 1e-4, "warmup_steps": FIRST, "min_lr_ratio": 1.0, "weight_decay": 0.05}
    tree["checkpoint"] = {"keep_last": 2}
    return tree


@pytest.mark.parametrize("changes", [ALL[:4], pytest.param(ALL[4:], marks=pytest.mark.long)], ids=["some", "others"])
def test_another_number_of_ranks_or_stage_goes_on_with_the_same_losses_and_samples(
    run_ranks: RankFunction, steady: dict[str, Any], tmp_path: Path, changes: list[tuple[int, int, int]]
) -> None:
    whole = {stage: tmp_path / f"whole-{stage}" for stage in sorted({before for before, _, _ in changes})}
    stages = [(str(run), stage) for stage, run in whole.items()]
    run_ranks("test_elastic:runs", 2, tree=steady, which=stages, steps=FIRST)
    changed = {change: tmp_path / "-".join(map(str, change)) for change in changes}
    begun = f"checkpoints/step_{FIRST:08d}"
    for (before, _, _), run in changed.items():
        shutil.copytree(whole[before] / begun, run / begun)
        shutil.copytree(whole[before] / "ledger", run / "ledger")
    run_ranks("test_elastic:runs", 2, tree=steady, which=stages, steps=STEPS)
    for ranks in (1, 2, 4):
        which = [(str(run), now) for (_, now, size), run in changed.items() if size == ranks]
        if which:
            run_ranks("test_elastic:runs", ranks, tree=steady, which=which, steps=STEPS)
    for (before, now, ranks), run in changed.items():
        expected = {step: loss for step, loss in losses(whole[before]).items() if step > FIRST}
        assert len(expected) == STEPS - FIRST
        assert losses(run) == pytest.approx(expected, rel=1e-5), (before, now, ranks)
        report = audit.audit(run)
        assert report.is_clean
        told = logged(run, "event")[0]["text"]
        assert f"with {ranks_in_words(ranks)}, ZeRO-{now}" in told
        assert ("was 2 ranks" in told) == ((before, 2) != (now, ranks))
        assert not list((run / "checkpoints").glob("*universal*"))
        assert consumed(run) == consumed(whole[before])


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.long)])
def test_in_16_bits_the_float32_weights_and_the_moments_go_along(
    run_ranks: RankFunction, steady: dict[str, Any], tmp_path: Path, precision: str
) -> None:
    """Against the unbroken run: apart by a small part of the way that the weights have gone since."""
    steady = {**steady, "precision": precision}
    changes = [(1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 3, 2), (3, 1, 2)]
    whole = {stage: tmp_path / f"whole-{stage}" for stage in (1, 2, 3)}
    stages = [(str(run), stage) for stage, run in whole.items()]
    run_ranks("test_elastic:runs", 2, tree=steady, which=stages, steps=FIRST)
    begun, end = f"checkpoints/step_{FIRST:08d}", f"checkpoints/step_{2 * FIRST:08d}"
    changed = {change: tmp_path / "-".join(map(str, change)) for change in changes}
    for (before, _, _), run in changed.items():
        shutil.copytree(whole[before] / begun, run / begun)
        shutil.copytree(whole[before] / "ledger", run / "ledger")
    run_ranks("test_elastic:runs", 2, tree=steady, which=stages, steps=2 * FIRST)
    for ranks in (1, 2):
        which = [(str(run), now) for (_, now, size), run in changed.items() if size == ranks]
        run_ranks("test_elastic:runs", ranks, tree=steady, which=which, steps=2 * FIRST)
    for (before, now, ranks), run in changed.items():
        start, goal, reached = (weights(one) for one in (whole[before] / begun, whole[before] / end, run / end))
        way = torch.linalg.vector_norm(goal - start)
        assert torch.linalg.vector_norm(reached - goal) < 0.2 * way, (before, now, ranks)


def weights(checkpoint: Path) -> torch.Tensor:
    state = load_file(checkpoint / "trainable.safetensors")
    return torch.cat([state[name].flatten() for name in sorted(state)])


def consumed(run: Path) -> list[Any]:
    """Of each stretch of steps, the shards with counts and hashes of the samples."""
    return [json.loads(line)["shards"] for line in (run / "ledger" / "consumed.jsonl").read_text().splitlines()]


def test_what_would_run_code_is_refused_before_anything_reads_it(
    run_ranks: RankFunction, steady: dict[str, Any], tmp_path: Path
) -> None:
    (told,) = run_ranks("test_elastic:poisoned", 1, tree=steady, folder=str(tmp_path / "run"))
    assert "refused: this file would run code" in told
    assert "os.system" in told or "posix.system" in told
    assert not (tmp_path / "ran").exists()


class Poison:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.system, (f"touch {self.mark}",)


def poisoned(world: World, tree: dict[str, Any], folder: str) -> str:
    runs(world, tree, [(folder, 2)], steps=1)
    found = stepfolders.latest(Path(folder) / "checkpoints")
    assert found is not None
    file = next((found / "deepspeed").glob("*optim_states.pt"))
    torch.save({"optimizer_state_dict": Poison(Path(folder).parent / "ran")}, file)
    # As one who can write the file could: with a manifest that agrees.
    manifest = json.loads((found / "manifest.json").read_text())
    entry = manifest["files"][f"deepspeed/{file.name}"]
    entry |= {"size_bytes": file.stat().st_size, "sha256": checkpoint.sha256_file(file)}
    (found / "manifest.json").write_text(json.dumps(manifest))
    try:
        runs(world, tree, [(folder, 2)], steps=2)
    except PvtcapError as error:
        return str(error)
    return "nothing was raised"
