"""Kill a training run again and again, start it again each time, and see that it ends as if nothing had been.

    python tests/chaos.py --kills 20 [--sizes 1 2 4] [--seed 0] [--keep FOLDER]

Kills are SIGKILL (of all its processes, of one rank, of torchrun alone), SIGTERM and SIGUSR1, at random moments of
steps, evaluations and saves: two thirds of them wait for one of the latter two to begin. With ``--sizes`` each start
draws its number of ranks. Prints a table, and exits with 1 when the end is not the unbroken run's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.table import Table

from pvtcap import runlog

ROOT = Path(__file__).parents[1]
STEPS_A_KILL, EVERY = 14, 4
EVALUATE_EVERY = 28  # steps: as far as a kill waits for an evaluation to begin
SIGNALS = ("SIGKILL all", "SIGKILL rank", "SIGKILL torchrun", "SIGTERM", "SIGUSR1")
MOMENTS = ("any", "save", "evaluation")


def configuration(data: Path, run: Path, steps: int) -> dict[str, Any]:
    """Small, but with all that takes time or writes files. No dropout: it is drawn by rank."""
    from conftest import tiny_tree

    tree = tiny_tree(data, run)
    tree["model"] |= {"dropout": 0.0}
    tree["data"] |= {"workers": 1, "micro_batch": 1}
    tree["train"] |= {"steps": steps, "val_every_steps": 12}
    # AdamW turns rounding into whole steps where a gradient is almost nothing: small steps.
    tree["optim"] = {"lr": 1e-4, "warmup_steps": 5}
    tree["checkpoint"] = {"every_steps": EVERY, "keep_last": 2}
    tree["evaluate"] |= {"every_steps": EVALUATE_EVERY, "min_length": 0}
    return tree


@dataclass
class Outcome:
    """What the starts of a run were, and how they ended."""

    codes: list[int] = field(default_factory=list)
    kills: Counter[str] = field(default_factory=Counter)
    last_stderr: str = ""


def start(file: Path, ranks: int, log: Path) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "NPROC": str(ranks), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    with log.open("a") as out:
        return subprocess.Popen(
            [str(ROOT / "launch" / "local.sh"), "train", str(file)],
            env=environment, stdout=out, stderr=out, text=True, start_new_session=True,
        )  # fmt: skip


def tree_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    return []


def strike(process: subprocess.Popen[str], how: str, draw: random.Random) -> None:
    members = tree_of(process)
    if not members:
        return
    # What a rank starts has its environment, too: only torchrun's own children are ranks.
    environments = ((one, _environ(one)) for one in members[1:])
    ranks = [one for one, environment in environments if "LOCAL_RANK" in environment and _parent(one) == process.pid]
    if how == "SIGKILL all":
        victims, number = members, signal.SIGKILL
    elif how == "SIGKILL rank":
        victims, number = [draw.choice(ranks or members)], signal.SIGKILL
    else:
        victims, number = members[:1], getattr(signal, how.split()[0])
    for one in victims:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(number)


def _environ(process: psutil.Process) -> dict[str, str]:
    with contextlib.suppress(psutil.Error):
        return process.environ()
    return {}


def _parent(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return process.ppid()
    return 0


def moment_has_come(run: Path, moment: str) -> bool:
    """Whether it saves or evaluates just now."""
    signs = {"save": (run / "checkpoints", "*.partial"), "evaluation": (run / "eval", "*/parts")}
    return moment in signs and any(signs[moment][0].glob(signs[moment][1]))


def last_step(run: Path) -> int:
    """The last step in a log that is being written; -1: none."""
    return max((int(line["step"]) for line in runlog.read(run)[-1:]), default=-1)


def torment(run: Path, file: Path, kills: int, sizes: list[int], seed: int, say: Callable[[str], None]) -> Outcome:
    """Start, kill, start again, until the run has come to its end."""
    draw, outcome, log = random.Random(seed), Outcome(), run.with_suffix(".log")
    while True:
        ranks, struck = draw.choice(sizes), outcome.kills.total()
        process = start(file, ranks, log)
        if struck < kills:
            how, moment = draw.choice(SIGNALS), draw.choice(MOMENTS)
            before, delay = last_step(run), draw.uniform(0, 1.5)
            while process.poll() is None and last_step(run) == before:
                time.sleep(0.01)  # it starts
            # A moment that does not come is no reason to let it run to its end: the kills behind this one need steps.
            last = STEPS_A_KILL * struck + EVALUATE_EVERY
            until, now = time.monotonic() + (delay if moment == "any" else 30), "any"
            while process.poll() is None and last_step(run) < last and time.monotonic() < until:
                if moment_has_come(run, moment):
                    time.sleep(delay / 30)
                    now = moment
                    break
                time.sleep(0.001)
            if process.poll() is None:
                strike(process, how, draw)
                outcome.kills[how] += 1
                say(f"kill {struck + 1}: {how} of {ranks} ranks at {now}, step {last_step(run)}")
        outcome.codes.append(process.wait())
        if outcome.codes[-1] == 0:
            return outcome
        if len(outcome.codes) > 3 * kills + 5:
            raise SystemExit(f"it does not come to its end: {log}")


def differences(run: Path, unbroken: Path, same_sizes: bool) -> list[str]:
    """All in which the end is not the unbroken run's."""
    from pvtcap import audit

    found = []
    ends = [max((of / "checkpoints").glob("step_*")) / "trainable.safetensors" for of in (run, unbroken)]
    if ends[0].parent.name != ends[1].parent.name:
        found.append(f"ended at {ends[0].parent.name}, not {ends[1].parent.name}")
    if same_sizes and ends[0].read_bytes() != ends[1].read_bytes():
        found.append("other weights")
    ours, theirs = (_numbers(of) for of in (run, unbroken))
    if ours.keys() != theirs.keys():
        found.append(f"other points: {sorted(ours.keys() ^ theirs.keys())[:6]}")
    off = max((abs(ours[key] / theirs[key] - 1) for key in ours.keys() & theirs.keys() if theirs[key]), default=0.0)
    if off > (0.0 if same_sizes else 1e-5):
        found.append(f"losses off by {off:.1e}")
    if not (report := audit.audit(run)).is_clean:
        found.append(f"the audit: {report.gaps} {[epoch for epoch in report.epochs if not epoch.is_clean]}")
    allowed = {path.relative_to(unbroken) for path in unbroken.rglob("*")}
    stray = {path.relative_to(run) for path in run.rglob("*")} - allowed
    # Checkpoints of other steps may be the best; DeepSpeed's files are named by rank; each start has an event file.
    odd = [path for path in stray if not any(part in str(path) for part in ("deepspeed/", "events.out", "/step_"))]
    odd = [path for path in odd if path.parts[0] != "errors"]  # what ranks said of one that had gone
    odd += [path for path in stray if path.suffix in (".partial", ".old", ".universal") or "parts" in path.parts]
    return found + [f"stray: {path}" for path in odd]


def _numbers(run: Path) -> dict[tuple[str, int], float]:
    lines = runlog.read(run)
    losses = {("train", one["step"]): one["train/loss"] for one in lines if one["kind"] == "train"}
    return losses | {("val", one["step"]): one["val/loss"] for one in lines if one["kind"] == "val"}


def chaos(
    folder: Path, kills: int, sizes: list[int], seed: int, say: Callable[[str], None]
) -> tuple[Outcome, list[str]]:
    from conftest import build_shapes

    data = folder / "data"
    for split, number in (("train", 48), ("val", 11)):
        build_shapes(data / split, split, number, 20)
    files = {}
    for name in ("unbroken", "tormented"):
        files[name] = folder / f"{name}.yaml"
        steps = STEPS_A_KILL * kills + 2 * EVALUATE_EVERY
        files[name].write_text(yaml.safe_dump(configuration(data, folder / name, steps)))
    whole = start(files["unbroken"], 2, folder / "unbroken.log")
    if whole.wait() != 0:
        raise SystemExit((folder / "unbroken.log").read_text()[-3000:])
    outcome = torment(folder / "tormented", files["tormented"], kills, sizes, seed, say)
    wrong = differences(folder / "tormented", folder / "unbroken", sizes == [2])
    struck = outcome.kills.total()
    return outcome, wrong if struck == kills else [f"killed {struck} times, not {kills}", *wrong]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="+", default=[2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the runs; they are removed without")
    words = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = words.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcome, wrong = chaos(folder, words.kills, words.sizes, words.seed, console.print)
    table = Table(title=f"{outcome.kills.total()} kills, {len(outcome.codes)} starts, sizes {words.sizes}")
    table.add_column("kill")
    table.add_column("times", justify="right")
    for how in SIGNALS:
        table.add_row(how, str(outcome.kills[how]))
    console.print(table)
    console.print(f"exit codes: {dict(Counter(outcome.codes))}")
    console.print("\n".join(wrong) or "the end is the unbroken run's")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main()
