"""What each rank knows of itself and rank 0 tells of all: its wait for data, its memory, its losses by source."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import psutil
import torch

GIB = 1 << 30
Losses = dict[int, tuple[float, int]]  # sum of the losses (nats) and number of labels, by source


@dataclass(frozen=True)
class RankReading:
    """Of one rank, over some steps. Bytes of GPU memory are the most since last asked; 0 without a GPU."""

    wait_seconds: float
    host_bytes: int
    gpu_bytes: int
    gpu_reserved_bytes: int
    losses: Losses = field(default_factory=dict)

    @classmethod
    def take(cls, wait_seconds: float, losses: Losses, device: torch.device) -> RankReading:
        host = psutil.Process().memory_info().rss  # of this process; those that decode are others
        if device.type != "cuda":
            return cls(wait_seconds, host, 0, 0, losses)
        gpu, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return cls(wait_seconds, host, gpu, reserved, losses)


def merged(parts: Sequence[Mapping[int, tuple[float, int]]]) -> Losses:
    """Sums over steps, or ranks."""
    total: defaultdict[int, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    for part in parts:
        for source, (loss, labels) in part.items():
            total[source] = total[source][0] + loss, total[source][1] + labels
    return dict(total)


def numbers(readings: Sequence[RankReading], seconds: float, names: Sequence[str]) -> dict[str, float]:
    """Scalars of all ranks together; ``seconds`` is the time that they cover, ``names`` those of the sources."""
    waits = [reading.wait_seconds / seconds for reading in readings]
    found = {
        "data/wait_share": sum(waits) / len(waits),
        "data/wait_share_worst": max(waits),
        "data/wait_worst_rank": waits.index(max(waits)),
        "memory/host_gib": max(reading.host_bytes for reading in readings) / GIB,
    }
    if any(reading.gpu_bytes for reading in readings):
        found["memory/gpu_gib"] = max(reading.gpu_bytes for reading in readings) / GIB
        found["memory/gpu_reserved_gib"] = max(reading.gpu_reserved_bytes for reading in readings) / GIB
    for source, (loss, labels) in sorted(merged([reading.losses for reading in readings]).items()):
        if labels:
            found[f"train/loss_of/{names[source]}"] = loss / labels
    return found
