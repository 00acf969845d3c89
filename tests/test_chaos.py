"""pytest tests/test_chaos.py: a few kills; ``python tests/chaos.py --kills 20`` is the long one."""

from __future__ import annotations

from pathlib import Path

from chaos import chaos


def test_a_run_that_is_killed_now_and_then_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    outcome, wrong = chaos(tmp_path, kills=3, sizes=[2], seed=2, say=print)
    assert wrong == [], outcome
