"""The world of ranks. The only module that reads RANK and its kin, or picks a device and a backend.

    with World.start() as world:
        path = world.on_first_rank(lambda: find_latest())     # rank 0 decides, the others are told
        total = world.sum([loss, count])                      # sums are reduced apart and divided once

Collectives here carry small Python values on the CPU; gradients are DeepSpeed's business.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar

import torch
import torch.distributed as torch_dist

from pvtcap.errors import ConfigError, PvtcapError
from pvtcap.hostmemory import keep_freed_memory

T = TypeVar("T")

# DeepSpeed reads these even for one process.
_ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@dataclass(frozen=True)
class World:
    """Who this process is. ``rank`` and ``size`` count all processes, the local ones those of this machine."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    local_size: int = 1
    described: tuple[str, ...] = ()  # the environment variables that this process set for itself

    @classmethod
    def alone(cls, device: str | None = None) -> Self:
        """One process, no process group: for captioning, exporting and single-process tests."""
        return cls(0, 1, 0, torch.device(device) if device else _pick_device(0))

    @classmethod
    def start(cls, timeout_minutes: float = 30) -> Self:
        """Join the process group that torchrun or srun describes in the environment; alone, make one of one rank.

        Raises ConfigError where the environment describes half of one.
        """
        # launch/torchrun.py holds SIGTERM back until somebody listens; what does not is ended by it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        faulthandler.enable()  # a rank that dies in native code says where it was
        rank, size, local_rank = _place_of_this_rank()
        device = _pick_device(local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            keep_freed_memory()
        described = () if "RANK" in os.environ else tuple(_ALONE)
        store = None
        if described:
            os.environ.update(_ALONE)
            # Port 0: the kernel gives one as it is taken, and none can come between.
            store = torch_dist.TCPStore("127.0.0.1", 0, 1, is_master=True)  # type: ignore[attr-defined]
        os.environ.setdefault("DS_ACCELERATOR", "cuda" if device.type == "cuda" else "cpu")
        # gloo beside nccl: small values travel on the CPU without touching the GPU's stream.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        where: dict[str, Any] = {"store": store, "rank": 0, "world_size": 1} if store else {}
        torch_dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes), **where)
        return cls(rank, size, local_rank, device, int(os.environ.get("LOCAL_WORLD_SIZE", 1)), described)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # After an error the other ranks may never answer; leaving is all that is safe.
        if torch_dist.is_initialized() and kind is None:
            # DeepSpeed, where it was used, holds groups of its own, which the next World of this process must not meet.
            deepspeed = sys.modules.get("deepspeed.comm")
            (deepspeed if deepspeed and deepspeed.is_initialized() else torch_dist).destroy_process_group()
        for name in self.described:  # or the processes that come after this one would take themselves for ranks
            os.environ.pop(name, None)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in float64."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.size > 1:
            torch_dist.all_reduce(total)
        return [float(value) for value in total]

    def gather(self, value: T) -> list[T] | None:
        """Every rank's value on rank 0, in rank order; None elsewhere."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.is_first else None
        torch_dist.gather_object(value, gathered, dst=0)
        return gathered

    def broadcast(self, value: T) -> T:
        """Rank 0's value on every rank."""
        if self.size == 1:
            return value
        box = [value]
        torch_dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first_rank(self, decide: Callable[[], T]) -> T:
        """Run ``decide`` on rank 0 and give its result, or its PvtcapError, to all."""
        result: T | PvtcapError | None = None
        if self.is_first:
            try:
                result = decide()
            except PvtcapError as error:
                result = error
        result = self.broadcast(result)
        if isinstance(result, PvtcapError):
            result.told = not self.is_first
            raise result
        return result  # type: ignore[return-value]  # None only where decide() itself gives None


def _place_of_this_rank() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK; 0, 1 and 0 for a process that nobody calls a rank."""
    # Some containers have a WORLD_SIZE of 1 and nothing else.
    if "RANK" not in os.environ and os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1, 0
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    found["LOCAL_RANK"] = os.environ.get("LOCAL_RANK", "0")
    numbers = [int(value) if value.isdecimal() else -1 for name, value in found.items() if name != "MASTER_ADDR"]
    rank, size, port, local_rank = numbers
    if min(numbers) < 0 or rank >= size or port > 65535 or not found["MASTER_ADDR"]:
        raise ConfigError(
            "the environment calls this process a rank, and does not say of what",
            got=" ".join(f"{name}={value}" for name, value in found.items()),
            wanted="RANK below WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them",
            do="Start with launch/local.sh or slurm/train.sbatch; for one process, unset RANK and WORLD_SIZE.",
        )
    return rank, size, local_rank


def _pick_device(local_rank: int) -> torch.device:
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
