"""pytest tests/test_gpukernels.py: the kernels for GPUs, interpreted and compiled; test_gpu.py has them on one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_the_kernels_give_what_torch_gives() -> None:
    pytest.importorskip("triton", reason="this torch came without Triton")
    checks = Path(__file__).with_name("gpukernels.py")
    # NumPy warns of what the interpreter of older Tritons (3.3 to 3.5) does.
    passed_over = "ignore:Conversion of an array with ndim:DeprecationWarning"
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-W", passed_over]
    done = subprocess.run(
        [*command, str(checks)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert "10 passed" in done.stdout


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("element", ["bf16", "fp16"])
def test_the_kernels_compile_for_gpus_that_are_not_there(
    capability: int, element: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is interpreted is Python, which takes more than the compiler does."""
    triton = pytest.importorskip("triton", reason="this torch came without Triton")
    from triton.backends.compiler import GPUTarget

    from pvtcap import gpuattention, gpudropout, gpuloss, gpuresidual

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dropped = gpudropout.dropped(0.1)
    heads = {"heads": 12, "width": 64, "scale": 0.125, "dropped": dropped}
    rows = {"width": 768, "lanes": 1024, "dropped": dropped}
    pieces = {"pieces": 30_524, "smoothing": 0.1}
    kernels: list[tuple[Any, dict[str, int], dict[str, Any]]] = [
        (kernel, tiles, {**heads, "in_caption": in_caption})
        for in_caption in (True, False)
        for kernel, tiles in (
            (gpuattention._forward, gpuattention.FORWARD),
            (gpuattention._backward_queries, gpuattention.BACKWARD_QUERIES),
            (gpuattention._backward_keys, gpuattention.BACKWARD_KEYS),
        )
    ]
    kernels += [(gpuresidual._forward, gpuresidual.FORWARD, rows), (gpuresidual._backward, gpuresidual.BACKWARD, rows)]
    kernels += [(gpuloss._forward, gpuloss.TILE, pieces), (gpuloss._backward, gpuloss.TILE, pieces)]
    kinds = {
        **dict.fromkeys(("count", "blocks", "each", "columns"), "i32"),
        **dict.fromkeys(("starts", "key_starts", "firsts", "own", "seed"), "*i32"),
        **dict.fromkeys(("sums", "products", "losses", "means", "scales", "of_weight", "of_bias"), "*fp32"),
        "labels": "*i64",
        "eps": "fp32",
    }
    of_compiler = ("num_warps", "num_stages", "enable_fp_fusion")
    for kernel, tiles, fixed in kernels:
        options = {name: value for name, value in tiles.items() if name in of_compiler}
        constants = {**fixed, **{name: value for name, value in tiles.items() if name not in options}}
        signature = {name: kinds.get(name, f"*{element}") for name in kernel.arg_names} | dict.fromkeys(
            constants, "constexpr"
        )
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=places)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.asm["cubin"]
        assert made.metadata.shared < 100_000  # bytes: what the smallest of these GPUs has for a block
