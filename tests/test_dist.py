"""pytest tests/test_dist.py"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch
from conftest import RankFunction

from pvtcap.dist import World
from pvtcap.errors import ConfigError


def talk(world: World) -> dict[str, Any]:
    """Every collective once; runs on each rank."""

    def fail() -> None:
        raise ConfigError("no such thing", where="here", do="Try another.")

    calls = []
    chosen = world.on_first_rank(lambda: calls.append(1) or f"rank {world.rank} chose")
    told = ""
    try:
        world.on_first_rank(fail)
    except ConfigError as error:
        told = f"{error} {error.told}"
    return {
        "rank": [world.rank, world.size, world.local_rank, str(world.device)],
        "sum": world.sum([world.rank + 1, 0.5]),
        "gathered": world.gather({"rank": world.rank}),
        "broadcast": world.broadcast(world.rank * 10),
        "chosen": chosen,
        "calls": len(calls),
        "told": told,
    }


def test_three_ranks_agree(run_ranks: RankFunction) -> None:
    results = run_ranks("test_dist:talk", 3)
    for rank, result in enumerate(results):
        assert result["rank"] == [rank, 3, rank, "cpu"]
        assert result["sum"] == [6, 1.5]
        assert result["gathered"] == ([{"rank": 0}, {"rank": 1}, {"rank": 2}] if rank == 0 else None)
        assert result["broadcast"] == 0
        assert result["chosen"] == "rank 0 chose"
        assert result["calls"] == (1 if rank == 0 else 0)
        # One mistake is one line on the terminal: the others know of it and stay silent.
        assert result["told"] == f"here: no such thing. Try another. {rank != 0}"


def test_alone_there_is_nobody_to_wait_for() -> None:
    world = World.alone("cpu")
    assert (world.rank, world.size, world.is_first, world.device) == (0, 1, True, torch.device("cpu"))
    assert world.gather(3) == [3]
    assert world.broadcast("x") == "x"
    assert world.sum([1.0, 2.5]) == [1.0, 2.5]


def test_a_process_group_of_one_leaves_the_environment_as_it_was() -> None:
    before = dict(os.environ)
    for _ in range(2):
        with World.start() as world:
            assert world.sum([2.0]) == [2.0]
            assert os.environ["LOCAL_RANK"] == "0"  # DeepSpeed asks for it
        assert not torch.distributed.is_initialized()
        assert set(os.environ.items() ^ before.items()) <= {("DS_ACCELERATOR", "cpu")}


@pytest.mark.parametrize(
    "changed",
    [
        *({"RANK": "one"}, {"RANK": "2"}, {"RANK": "-1"}, {"RANK": None}, {"WORLD_SIZE": None}, {"WORLD_SIZE": "2.0"}),
        *({"MASTER_ADDR": None}, {"MASTER_PORT": None}, {"MASTER_PORT": "99999"}, {"LOCAL_RANK": "cuda:0"}),
    ],
    ids=str,
)
def test_half_a_rank_is_a_mistake(changed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    """As where somebody starts ranks without torchrun, and forgets one of the variables."""
    whole = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in (whole | changed).items():
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    with pytest.raises(ConfigError, match="the environment calls this process a rank") as caught:
        World.start()
    for name, value in changed.items():
        assert f"{name}={value or ''}" in str(caught.value)
    assert not torch.distributed.is_initialized()


def test_a_world_size_of_one_alone_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with World.start() as world:
        assert (world.rank, world.size) == (0, 1)


def test_memory_that_a_rank_frees_stays_with_it() -> None:
    """Blocks that glibc would have mapped apart come from the heap, which is not trimmed: no page is zeroed twice."""
    code = """
        import resource, torch
        from pvtcap.hostmemory import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(16 * 2**20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        first, kept, _, settled = faults(), keep_freed_memory(), faults(), faults()
        print(first, kept, settled)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    first, kept, settled = done.stdout.split()
    assert kept == "True"
    assert int(settled) < int(first) / 100
