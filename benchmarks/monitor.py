"""What does watching cost? python benchmarks/monitor.py [--steps N]

Trains configs/shapes.yaml for --steps steps in one process, with its log, TensorBoard and console, and adds up the
seconds inside ``Monitor``'s methods. Steps are as short as they get (some 0.1 s), so the share is at its highest.
"""

from __future__ import annotations

import argparse
import runpy
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from results import Row, report

from pvtcap import train
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.monitor import Monitor

ROOT = Path(__file__).parents[1]


def timed(method: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def call(*args: Any, **more: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*args, **more)
        finally:
            spent.append(time.perf_counter() - started)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    spent: list[float] = []
    seconds: list[float] = []
    step = Monitor.step

    def remember(self: Monitor, number: int, stats: Any) -> None:
        seconds.append(stats.seconds)
        step(self, number, stats)

    for name in ("bad_samples", "step", "spike", "event", "say"):
        setattr(Monitor, name, timed(remember if name == "step" else getattr(Monitor, name), spent))
    with tempfile.TemporaryDirectory() as temporary:
        build = runpy.run_path(str(ROOT / "shards" / "shapes.py"))["main"]
        build(["--num-samples", "2000", "--out", f"{temporary}/shapes"])
        tree = yaml.safe_load((ROOT / "configs" / "shapes.yaml").read_text())
        tree["run"]["dir"] = f"{temporary}/run"
        tree["data"] |= {"train": f"{temporary}/shapes", "val": None}
        tree["train"] |= {"steps": args.steps, "val_every_steps": None, "log_every_steps": 1}
        tree["evaluate"] = {}
        with World.start() as world:
            train.run(parse(tree, "monitor"), world, resume="none")
    both = {"monitor": [sum(spent) / args.steps], "training": [sum(seconds) / args.steps]}
    row = Row.of("a step, logged each time", "s", both, goal=100.0, less_is_better=True)
    report("monitor", f"{args.steps} steps of configs/shapes.yaml", [row], {"options": vars(args)})
    print(f"{1 / row.ratio:.2%} of the step")


if __name__ == "__main__":
    main()
