"""What a run will be before it runs: batches, steps, memory a rank by ZeRO stage, checkpoints, the line to submit it.

No GPU, weights or network are needed: parameters are counted on torch's ``meta`` device.

Memory of one of n ranks, in bytes; P parameters train and F are frozen, each of w bytes (4, or 2 in 16 bits):

    weights      ZeRO 0-2: w (P + F)        ZeRO 3: w (P + F) / n, and w × P while a layer's are gathered, at worst
    master       ZeRO 0: 4 P if w is 2      ZeRO 1-3: 4 P / n, in fp32 too: DeepSpeed keeps a copy
    AdamW        ZeRO 0: 8 P                ZeRO 1-3: 8 P / n
    gradients    ZeRO 0: w P                ZeRO 1: w P + 4 P / n       ZeRO 2, 3: 4 P / n
    buffers      ZeRO 0: 0                  ZeRO 1-3: w min(P, 5e8), DeepSpeed's bucket for reducing them
    activations  of a micro-batch of B photos with T packed tokens each, L layers of width D, feed-forward D', V pieces:
                 B T L (20 D + 2 D') w for what each layer keeps, and 8 B T V for logits and their gradient in float32
    base         what Python, torch and DeepSpeed take by themselves: 0.6 GB of a rank's host memory

From DeepSpeed 0.19's stage_1_and_2.py and stage3.py; activations after Korthikanti et al., "Reducing Activation
Recomputation in Large Transformer Models", 2022, counted anew for this decoder. benchmarks/memory.py compares
them with what ranks really take; so far they are known to be a quarter low for ZeRO 1 and 2 on one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pvtcap import runlog
from pvtcap.captioner import Captioner
from pvtcap.config import BatchPlan, Config, batch_plan
from pvtcap.errors import PvtcapError
from pvtcap.job import length
from pvtcap.sources import Sources

BASE_BYTES = 600_000_000
_BUCKET = 500_000_000  # elements; DeepSpeed's default for reduce_bucket_size
_TOKENS_A_CAPTION = 14  # COCO's 10.5 words, prompt and end
_LEAD_S = 120  # slurm/train.sbatch's --signal
_DISK_BYTES_S = 500e6  # assumed where nothing has been measured


@dataclass(frozen=True)
class Memory:
    """Bytes a rank at one ZeRO stage."""

    weights: float
    master: float
    optimizer: float
    gradients: float
    buffers: float
    activations: float

    @property
    def total(self) -> float:
        """Of the device."""
        return self.weights + self.master + self.optimizer + self.gradients + self.buffers + self.activations


@dataclass(frozen=True)
class Plan:
    """All that ``pvtcap plan`` prints."""

    batches: BatchPlan
    trainable: int
    frozen: int
    total_steps: int | None
    why_no_steps: str | None
    num_shards: int | None
    memory: dict[int, Memory]
    checkpoint_bytes: int
    checkpoint_seconds: float
    measured: bool
    submit: str

    def to_json(self) -> dict[str, Any]:
        memory = {str(stage): {**vars(one), "total": one.total} for stage, one in self.memory.items()}
        return {**vars(self), "batches": vars(self.batches), "memory": memory}


def plan(config: Config, name: str, nodes: int, gpus_per_node: int) -> Plan:
    """Raises ConfigError where the global batch does not divide."""
    ranks = nodes * gpus_per_node
    batches = batch_plan(config.data, ranks)
    trainable, frozen = count_parameters(config)
    total_steps, shards, why = None, None, None
    try:
        sources = Sources.open(config.data)
        total_steps, shards = length(config, sources.num_samples), sum(map(len, sources.sizes))
    except PvtcapError as error:
        total_steps, why = config.train.steps, str(error)
    size = trainable * (16 if config.precision == "fp32" else 18)
    seconds = _measured_save(config.run.dir)
    return Plan(
        batches=batches,
        trainable=trainable,
        frozen=frozen,
        total_steps=total_steps,
        why_no_steps=why,
        num_shards=shards,
        memory={stage: memory(config, stage, ranks, trainable, frozen, batches.micro_batch) for stage in range(4)},
        checkpoint_bytes=size,
        checkpoint_seconds=size / _DISK_BYTES_S if seconds is None else seconds,
        measured=seconds is not None,
        submit=f"sbatch --nodes {nodes} --gpus-per-node {gpus_per_node} slurm/train.sbatch {name}",
    )


def count_parameters(config: Config) -> tuple[int, int]:
    """Those that train and those that are frozen; a vocabulary yet to be learned counts as large as it may get."""
    with torch.device("meta"):
        model = Captioner(config, _vocab_size(config))
    trainable = sum(parameter.numel() for parameter in model.trainable().values())
    return trainable, sum(parameter.numel() for parameter in model.parameters()) - trainable


def memory(config: Config, stage: int, ranks: int, trainable: int, frozen: int, micro_batch: int) -> Memory:
    """The formulas above."""
    width = 4 if config.precision == "fp32" else 2
    share = ranks if stage else 1
    weights = width * (trainable + frozen)
    if stage == 3:
        weights = weights // ranks + (width * trainable if ranks > 1 else 0)
    gradients = {0: width * trainable, 1: width * trainable + 4 * trainable / ranks}.get(stage, 4 * trainable / ranks)
    return Memory(
        weights=weights,
        master=4 * trainable / share if stage or width == 2 else 0,
        optimizer=8 * trainable / share,
        gradients=gradients,
        buffers=width * min(trainable, _BUCKET) if stage else 0,
        activations=_activations(config, micro_batch, width),
    )


def _activations(config: Config, micro_batch: int, width: int) -> float:
    model = config.model
    tokens = micro_batch * config.data.captions_per_photo * min(_TOKENS_A_CAPTION, config.text.max_tokens)
    kept = 20 * model.decoder_width + 2 * model.decoder_feedforward
    layers = 1 if config.train.activation_checkpointing else model.decoder_layers
    return float(tokens * (layers * kept * width + 8 * _vocab_size(config)))


def _vocab_size(config: Config) -> int:
    return config.text.vocab_size if config.text.vocab == "train" else 30_524  # BERT's and BLIP's two


def _measured_save(run: Path) -> float | None:
    """Median seconds of this run's checkpoints, if it has some."""
    seconds = [line["checkpoint/seconds"] for line in runlog.read(run) if line["kind"] == "checkpoint"]
    return median(seconds) if seconds else None


def print_plan(found: Plan, config: Config, console: Console) -> None:
    """As a person reads it."""
    cut = found.batches
    console.print(
        f"global batch {cut.global_batch} = {cut.micro_batch} × {cut.world_size} ranks × {cut.accumulation} accumulated"
    )
    steps = "?" if found.total_steps is None else f"{found.total_steps:,}"
    console.print(f"{steps} steps" + (f" ({found.why_no_steps})" if found.why_no_steps else ""))
    if found.num_shards is not None:
        readers = cut.world_size * max(1, config.data.workers)
        console.print(f"{found.num_shards:,} shards in {config.data.lanes} lanes for {readers} reading processes")
    console.print(f"{found.trainable:,} parameters train ({config.train.what}), {found.frozen:,} are frozen")
    table = Table(
        title=f"memory a rank in GB, {config.precision}, {cut.world_size} ranks (host: {BASE_BYTES / 1e9} more)"
    )
    for column in ("ZeRO", "weights", "master", "AdamW", "gradients", "buffers", "activations", "all"):
        table.add_column(column, justify="right")
    for stage, one in found.memory.items():
        parts = [one.weights, one.master, one.optimizer, one.gradients, one.buffers, one.activations, one.total]
        mark = " *" if stage == config.zero.stage else ""
        table.add_row(f"{stage}{mark}", *(f"{part / 1e9:.2f}" for part in parts))
    console.print(table)
    source = "measured" if found.measured else f"at {_DISK_BYTES_S / 1e6:.0f} MB/s"
    gigabytes, seconds = found.checkpoint_bytes / 1e9, found.checkpoint_seconds
    enough = "which leaves time" if found.checkpoint_seconds < _LEAD_S / 2 else "too long: raise --signal's number"
    console.print(
        f"a checkpoint: {gigabytes:.2f} GB, {seconds:.0f} s {source}; Slurm's signal comes {_LEAD_S} s before the end, "
        f"{enough}"
    )
    console.print(found.submit)
