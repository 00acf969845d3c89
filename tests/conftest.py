"""What several test files need: a small ShardSet of shapes, a configuration that trains in seconds, and real ranks."""

from __future__ import annotations

import faulthandler
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from forkedranks import ForkedRanks

from pvtcap.config import Config
from pvtcap.configfile import parse

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports huggingface_hub
ROOT = Path(__file__).parents[1]


def build_shapes(out: Path, split: str, num_samples: int, samples_per_shard: int) -> Path:
    main = runpy.run_path(str(ROOT / "shards" / "shapes.py"))["main"]
    words = {"--split": split, "--num-samples": num_samples, "--samples-per-shard": samples_per_shard}
    options = [str(part) for pair in words.items() for part in pair]
    main([*options, "--image-px", "32", "--processes", "1", "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def authority() -> trustme.CA:
    """A certificate authority that nobody trusts unless told to."""
    return trustme.CA()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What would make the suite too long for every commit waits for ``make test-long``."""
    if not os.environ.get("PVTCAP_LONG"):
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="long: make test-long runs it"))


def pytest_sessionstart(session: pytest.Session) -> None:
    """DeepSpeed compiles its op at first use, and who else wants it waits: that is not for a test to do that kills what
    it starts, and would leave the lock to the others of xdist's.
    """
    if session.config.getoption("numprocesses", None) and not hasattr(session.config, "workerinput"):
        program = "from pvtcap.deepspeedops import load_cpu_communication as load; load()"
        environment = {**os.environ, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([sys.executable, "-c", program], env=environment, check=True, stdout=subprocess.DEVNULL)


def pytest_unconfigure(config: pytest.Config) -> None:
    """What keeps a finished suite from ending is told, and ended: CI would wait for its own limit, without a word."""
    if hasattr(config, "workerinput"):
        return  # it may have to wait for the other one of xdist's
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)  # threads and what waits for them
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(90)  # native code, when the interpreter is gone


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two ShardSets: train (48 photos, uneven shards of 20, 20 and 8) and val (11 photos, one shard)."""
    folder = tmp_path_factory.mktemp("shapes")
    build_shapes(folder / "train", "train", 48, 20)
    build_shapes(folder / "val", "val", 11, 20)
    return folder


def tiny_tree(shapes: Path, run: Path) -> dict[str, Any]:
    """The smallest configuration that has every part; a tree of plain values, as YAML would give it."""
    return {
        "run": {"dir": str(run)},
        "data": {
            "train": str(shapes / "train"),
            "val": str(shapes / "val"),
            "global_batch": 8,
            "captions_per_photo": 2,
            "image_px": 32,
            "workers": 0,
        },
        "text": {"vocab": "train", "vocab_size": 200, "prompt": "", "max_tokens": 24},
        "model": {
            "encoder": "pvt_v2_b0",
            "encoder_weights": "scratch",
            "encoder_stages": 2,
            "projection": "linear",
            "decoder": "scratch",
            "decoder_layers": 1,
            "decoder_width": 32,
            "decoder_heads": 2,
            "decoder_feedforward": 64,
            "decoder_positions": 32,
        },
        "train": {"what": "projection+decoder+encoder", "steps": 6, "log_every_steps": 1},
        "optim": {"lr": 2e-3, "warmup_steps": 2},
        "evaluate": {"num_beams": 2, "micro_batch": 4},
    }


@pytest.fixture
def tree(shapes: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_tree(shapes, tmp_path / "run")


@pytest.fixture
def config(tree: dict[str, Any]) -> Config:
    return parse(tree, "test")


RankFunction = Callable[..., list[Any]]


def torchrun(num_ranks: int, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run ``words`` under our torchrun with this many ranks, one thread each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests"), "CUDA_VISIBLE_DEVICES": ""}
    launcher = [sys.executable, str(ROOT / "launch" / "torchrun.py"), "--standalone", "--nproc-per-node"]
    command = [*launcher, str(num_ranks), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.fixture(scope="session")
def forked_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkedRanks]:
    with ForkedRanks(tmp_path_factory.mktemp("ranks") / "log") as forked:
        yield forked


@pytest.fixture
def run_ranks(forked_ranks: ForkedRanks, tmp_path: Path) -> RankFunction:
    """``run_ranks("test_engine:losses", 2, **arguments)``: call a function on real ranks; what each of them returned.

    The function takes a World and plain values, and gives plain values. A failure shows what the ranks printed.
    """

    def call(function: str, num_ranks: int, **arguments: Any) -> list[Any]:
        out = tmp_path / f"{function.replace(':', '-')}-{num_ranks}.json"
        failed = forked_ranks.call(function, num_ranks, arguments, out)
        assert not failed, failed
        results: list[Any] = json.loads(out.read_text())
        return results

    return call
