"""pytest tests/test_benchmarks.py: what make bench prints, and that it starts files and options that exist."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT

FOLDER = ROOT / "benchmarks"


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "results", raising=False)
    import results  # type: ignore[import-not-found]

    return results  # type: ignore[no-any-return]


def test_ratio_is_of_medians_and_spread_of_the_one_that_differed_more(results: ModuleType) -> None:
    row = results.Row.of("speed", "photos/s", {"ours": [30, 10, 20], "theirs": [4, 5, 6]}, goal=3.5)
    assert (row.ours, row.theirs, row.ratio, row.spread, row.goal) == (20, 5, 4.0, 1.0, 3.5)
    time = results.Row.of("time", "s", {"ours": [2.0], "theirs": [8.0]}, less_is_better=True)
    assert (time.ratio, time.spread, time.goal) == (4.0, 0.0, None)


def test_a_report_is_a_table_and_a_file_that_holds_the_same(
    results: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(results, "FOLDER", tmp_path / "results")
    row = results.Row.of("a step", "captions/s", {"packed": [1234.5], "a row each": [0.5]}, goal=3.5)
    results.report("step", "8 photos", [row], {"options": {"photos": 8}})
    told = capsys.readouterr().out
    assert all(word in told for word in ("8 photos", "packed", "1,234", "a row each", "0.5", "2469.00", "3.5"))
    found = json.loads((tmp_path / "results" / "step.json").read_text())
    assert results.Row(**found["rows"][0]) == row
    assert found["options"] == {"photos": 8}
    assert "torch" in found["machine"]


def test_make_bench_starts_what_there_is(results: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "run", raising=False)
    import run  # type: ignore[import-not-found]

    for one in run.BENCHMARKS:
        text = (FOLDER / f"{one.name}.py").read_text()
        assert [option for option in re.findall(r"--[a-z0-9-]+", one.words) if f'"{option}"' not in text] == []
        assert set(re.findall(r"\{(\w+)\}", one.words)) == {*one.photos, *one.peers}
        assert set(one.peers) <= set(run.INSTALLED)


def test_results_in_the_repository_are_of_this_form(results: ModuleType) -> None:
    for file in sorted((FOLDER / "results").rglob("*.json")):
        found = json.loads(file.read_text())
        if "rows" in found and "machine" in found:
            assert [results.Row(**row) for row in found["rows"]], file
