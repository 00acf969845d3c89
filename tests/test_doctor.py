"""pytest tests/test_doctor.py"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pvtcap import doctor


def test_this_machine_can_train_and_scripts_may_read_why(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pvtcap", "doctor", "--json", "--folder", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = {one["what"]: one for one in json.loads(done.stdout)["findings"]}
    for name in ("torch", "deepspeed", "compiler", "DeepSpeed's op", "its speed", "open files", "hub cache"):
        assert findings[name]["level"] == "ok", findings[name]
    assert not (tmp_path / "runs").exists()  # it looks, and leaves nothing


def test_what_is_missing_is_bad_and_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(doctor, "_DISK_WANTED", 1 << 60)
    monkeypatch.setattr(doctor, "_PACKAGES", ("no-such-package",))
    findings = {one.what: one for one in doctor.examine(tmp_path)}
    assert findings["compiler"].level == findings["no-such-package"].level == "bad"
    assert "apt install g++" in findings["compiler"].do
    assert findings[f"disk of {tmp_path}"].level == "warning"
    assert all(one.do for one in findings.values() if one.level != "ok")


def test_a_read_only_folder_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.tempfile, "NamedTemporaryFile", refuse)
    (found,) = (one for one in doctor.examine(tmp_path) if one.what == "its speed")
    assert (found.level, found.found) == ("bad", "cannot write there: Permission denied")
