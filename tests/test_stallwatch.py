"""pytest tests/test_stallwatch.py: processes that stall, alone and together; a whole run's is in test_chaos.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, threading, time
from pathlib import Path
from pvtcap.stallwatch import StallWatch
how, run = sys.argv[1], Path(sys.argv[2])
with StallWatch(run, 0, int(sys.argv[3]), minutes=0.5 / 60, answer_s=0.3) as watch:
    if how == "late":
        time.sleep(1.2)          # nothing is watched before the first beat
    watch.beat(7)
    if how == "paused":
        with watch.paused():
            time.sleep(1.5)
    if how == "slow":
        for _ in range(8):
            time.sleep(0.2)
            watch.beat()
    if how == "stuck":
        threading.Event().wait(60)
print("came to its end")
"""


def run(how: str, folder: Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", PROGRAM, how, str(folder), str(ranks)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_who_moves_now_and_then_is_left_alone(tmp_path: Path) -> None:
    for how in ("late", "paused", "slow"):
        done = run(how, tmp_path)
        assert (done.returncode, done.stdout, done.stderr) == (0, "came to its end\n", ""), how


def test_who_stalls_is_named_with_the_place_and_its_stack(tmp_path: Path) -> None:
    done = run("stuck", tmp_path)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "after step 7 (train.stall_minutes); rank 0 is at" in line
    assert "in wait" in json.loads((tmp_path / "stall" / "rank_0.json").read_text())["stack"]


def test_who_cannot_answer_is_to_blame(tmp_path: Path) -> None:
    done = run("stuck", tmp_path, ranks=3)
    assert done.returncode == 2
    assert "rank 1, 2 does not answer (stopped, or its machine is away)" in done.stderr
