"""pytest tests/test_gpukernels.py: the kernels for GPUs, interpreted; test_gpu.py has them on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_give_what_torch_gives() -> None:
    pytest.importorskip("triton", reason="this torch came without Triton")
    checks = Path(__file__).with_name("gpukernels.py")
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", str(checks)]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "10 passed" in done.stdout
