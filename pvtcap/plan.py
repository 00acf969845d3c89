"""What a run will be before it runs: batches, steps, memory a rank by ZeRO stage, speed, checkpoints, how to submit it.

No GPU, weights or network are needed: the model is built without values (``dryrun``), and what cannot be known here,
such as the size of data that lies elsewhere, is said instead of guessed. ``rankmemory`` has the formulas of memory,
``scaling`` those of speed.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from pvtcap import dryrun, runlog, scaling
from pvtcap.config import BatchPlan, Config, batch_plan, ranks_in_words
from pvtcap.engine import deepspeed_dict
from pvtcap.errors import PvtcapError
from pvtcap.flops import StepFlops, peak_flops
from pvtcap.job import length
from pvtcap.rankmemory import RankMemory, Sizes, rank_memory
from pvtcap.sources import Sources

_SAMPLED = 512  # captions looked at for their length
_WORDS = re.compile(r"\w+|[^\w\s]")
_PIECES_A_WORD = 1.1  # BERT's, of COCO's and Flickr's captions
_CAPTION_WORDS = 12  # where no caption can be looked at: COCO's mean, 10.5 words and the full stop
_LONGEST_ROW = 1.25  # of a batch of eight, to the mean one; measured on Flickr8k
_LEAD_S = 120  # slurm/train.sbatch's --signal
_DISK_BYTES_S = 500e6  # assumed where nothing has been measured
_GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """All that ``pvtcap plan`` prints."""

    batches: BatchPlan
    nodes: int
    trainable: int
    frozen: int
    total_steps: int | None
    why_no_steps: str | None
    num_shards: int | None
    row_tokens: int
    memory: tuple[RankMemory, ...]
    speed: scaling.Estimate
    checkpoint_bytes: int
    checkpoint_seconds: float
    measured: bool
    submit: str

    def to_json(self) -> dict[str, Any]:
        memory = {str(one.stage): {**asdict(one), "peak": one.peak} for one in self.memory}
        return {**asdict(self), "memory": memory}


def plan(config: Config, name: str, nodes: int, gpus_per_node: int) -> Plan:
    """Raises ConfigError where the global batch does not divide."""
    ranks = nodes * gpus_per_node
    batches = batch_plan(config.data, ranks)
    total_steps, shards, why, features, sources = config.train.steps, None, None, None, None
    pieces = _CAPTION_WORDS * _PIECES_A_WORD
    try:
        sources = Sources.open(config.data)
    except PvtcapError as error:
        why = str(error)
    else:
        total_steps, shards = length(config, sources.num_samples), sum(map(len, sources.sizes))
        features = sources.shardsets[0].manifest.features
        pieces = _caption_pieces(sources)
    model = dryrun.meta_captioner(config, _vocab_size(config))
    sizes = Sizes.of(model)
    row_tokens = _row_tokens(config, pieces)
    step = dryrun.step_bytes(
        model,
        photos=batches.micro_batch,
        image_px=config.data.image_px,
        tokens=row_tokens,
        labels=batches.micro_batch * (row_tokens - _prefix(config) + config.data.captions_per_photo),
        features=None if features is None else features.shape,
    )
    bucket = deepspeed_dict(config, batches)["zero_optimization"]["reduce_bucket_size"]
    size = sizes.trained * (16 if config.precision == "fp32" else 18)
    seconds = _measured_save(config.run.dir)
    return Plan(
        batches=batches,
        nodes=nodes,
        trainable=sizes.trained,
        frozen=sizes.frozen,
        total_steps=total_steps,
        why_no_steps=why,
        num_shards=shards,
        row_tokens=row_tokens,
        memory=tuple(
            rank_memory(sizes, step, stage, config.precision, ranks, bucket, config.zero.offload) for stage in range(4)
        ),
        speed=_speed(config, batches, nodes, sizes, pieces, sources),
        checkpoint_bytes=size,
        checkpoint_seconds=size / _DISK_BYTES_S if seconds is None else seconds,
        measured=seconds is not None,
        submit=f"sbatch --nodes {nodes} --gpus-per-node {gpus_per_node} slurm/train.sbatch {name}",
    )


def _speed(
    config: Config, batches: BatchPlan, nodes: int, sizes: Sizes, pieces: float, sources: Sources | None
) -> scaling.Estimate:
    """``pieces`` are a caption's; without ``sources`` nothing is said of the storage."""
    stage, captions, features = config.zero.stage, float(config.data.captions_per_photo), False
    if sources is not None:
        features = sources.shardsets[0].manifest.features is not None
        captions = min(captions, sum(one.num_captions for one in sources.shardsets) / sources.num_samples)
    overlapped = deepspeed_dict(config, batches)["zero_optimization"].get("overlap_comm", stage == 3)
    element, frozen = 4 if config.precision == "fp32" else 2, 0 if features else sizes.frozen
    return scaling.estimate(
        _measured_compute(config.run.dir) or _assumed_compute(config, captions, pieces, features),
        scaling.Messages.of(stage, sizes.trained, frozen, element, batches.accumulation),
        batches,
        nodes,
        overlap=scaling.OVERLAP if overlapped else 0.0,
        captions_a_photo=captions,
        storage=None if sources is None else _storage(config, nodes, sources),
        decodes=not features,
    )


def _storage(config: Config, nodes: int, sources: Sources) -> scaling.Storage:
    data, entries = config.data, [entry for one in sources.shardsets for entry in one.manifest.shards]
    cached = any(one.mirror is not None for one in sources.shardsets)
    return scaling.Storage.of(
        sum(entry.size_bytes for entry in entries),
        sources.num_samples,
        data.global_batch,
        nodes,
        data.lanes,
        data.cache_gb * 1e9 if cached else None,
    )


def _assumed_compute(config: Config, captions: float, pieces: float, features: bool) -> scaling.Compute:
    """Of the device that is assumed; a photo has so many captions of so many pieces, and an end token is predicted."""
    prefix = _prefix(config)
    labels = captions * max(1.0, min(pieces + 1, config.text.max_tokens + 1 - prefix))
    flops = StepFlops.of(config, _vocab_size(config), prefix, features)
    peak = peak_flops(config, scaling.DEVICE)
    assert peak is not None, "known of this device"
    photo_flops = flops.total(1, captions, labels)
    return scaling.Compute.assumed(photo_flops, peak, features=features, compiled=config.train.compile)


def _measured_compute(run: Path) -> scaling.Compute | None:
    """From the median step of this run's log, if it has some."""
    lines = [line for line in runlog.read(run) if line["kind"] == "train"]
    if not lines:
        return None
    of_all, of_one = (median(line[f"speed/images_per_second{of}"] for line in lines) for of in ("", "_per_device"))
    return scaling.Compute.measured(of_one, round(of_all / of_one))


def _caption_pieces(sources: Sources) -> float:
    """Mean pieces of the first captions, counted as words and signs: no vocabulary is needed for that."""
    first = itertools.islice((caption for group in sources.captions() for caption in group), _SAMPLED)
    lengths = [len(_WORDS.findall(caption)) for caption in first]
    return _PIECES_A_WORD * sum(lengths) / max(1, len(lengths))


def _prefix(config: Config) -> int:
    """[DEC] and the prompt, which a photo's captions share."""
    return 1 + len(_WORDS.findall(config.text.prompt))


def _row_tokens(config: Config, pieces: float) -> int:
    """Tokens of a packed row: what is shared, and the captions' pieces, each cut at ``text.max_tokens``.

    A batch is as long as its longest row.
    """
    captions, most = config.data.captions_per_photo, config.text.max_tokens
    shared = min(_prefix(config), most)
    own = min((most - shared) * captions, _LONGEST_ROW * min(most - shared, pieces) * captions)
    return shared + math.ceil(own)


def _vocab_size(config: Config) -> int:
    """A vocabulary yet to be learned counts as large as it may get; else BERT's 30,522 pieces and BLIP's two."""
    return config.text.vocab_size if config.text.vocab == "train" else 30_524


def _measured_save(run: Path) -> float | None:
    """Median seconds of this run's checkpoints, if it has some."""
    seconds = [line["checkpoint/seconds"] for line in runlog.read(run) if line["kind"] == "checkpoint"]
    return median(seconds) if seconds else None


def print_plan(found: Plan, config: Config, console: Console) -> None:
    """As a person reads it."""
    cut = found.batches
    ranks = ranks_in_words(cut.world_size)
    console.print(f"global batch {cut.global_batch} = {cut.micro_batch} × {ranks} × {cut.accumulation} accumulated")
    steps = "?" if found.total_steps is None else f"{found.total_steps:,}"
    console.print(f"{steps} steps" + (f" ({found.why_no_steps})" if found.why_no_steps else ""))
    if found.num_shards is not None:
        readers = cut.world_size * max(1, config.data.workers)
        console.print(f"{found.num_shards:,} shards in {config.data.lanes} lanes for {readers} reading processes")
    console.print(f"{found.trainable:,} parameters train ({config.train.what}), {found.frozen:,} are frozen")
    console.print(_memory_table(found, config))
    _print_speed(found, config, console)
    source = "measured" if found.measured else f"at {_DISK_BYTES_S / 1e6:.0f} MB/s"
    gigabytes, seconds = found.checkpoint_bytes / 1e9, found.checkpoint_seconds
    enough = "which leaves time" if found.checkpoint_seconds < _LEAD_S / 2 else "too long: raise --signal's number"
    console.print(
        f"a checkpoint: {gigabytes:.2f} GB, {seconds:.0f} s {source}; Slurm's signal comes {_LEAD_S} s before the end, "
        f"{enough}"
    )
    console.print(found.submit)


def _memory_table(found: Plan, config: Config) -> Table:
    ranks = ranks_in_words(found.batches.world_size)
    table = Table(
        "GiB a rank",
        title=f"memory, {config.precision}, {ranks}, rows of about {found.row_tokens:,} tokens",
        title_justify="left",
    )
    for one in found.memory:
        chosen = one.stage == config.zero.stage
        table.add_column(f"ZeRO-{one.stage}{' *' if chosen else ''}", justify="right", style="bold" if chosen else "")
    for term in ("parameters", "gradients", "optimizer", "activations", "buffers", "temporary", "base"):
        table.add_row(term, *(f"{getattr(one, term) / _GIB:.2f}" for one in found.memory))
    table.add_section()
    table.add_row("highest, on a CPU", *(f"{one.peak / _GIB:.2f}" for one in found.memory))
    table.add_row("highest, on a GPU", *(f"{one.gpu / _GIB:.2f}" for one in found.memory))
    if config.zero.offload != "none":
        table.add_row("offloaded to its host", *(f"{one.host / _GIB:.2f}" for one in found.memory))
    return table


def _print_speed(found: Plan, config: Config, console: Console) -> None:
    speed, nodes, batch = found.speed, found.nodes, found.batches.global_batch
    console.print(_speed_table(speed, nodes))
    console.print(
        f"an estimate (docs/scaling.md). Compute {speed.compute.source}; {speed.sent_bytes / 1e6:,.0f} MB sent by each "
        f"rank (ZeRO-{config.zero.stage}, {config.precision})"
    )
    console.print(
        f"assumed: {scaling.ACHIEVED:.0%} of a network's rate, {scaling.INSIDE.name} inside a node, "
        f"{speed.overlap:.0%} of the sending during compute, {scaling.DECODED_PER_CORE_S:.0f} photos a second and core"
    )
    if config.zero.offload != "none":
        console.print("not in it: what offloading takes, copies to the host and the optimizer's step on its cores")
    if (storage := speed.storage) is None:
        return
    again = f", {storage.again:.0%} of it again in each later one" if storage.again < 1 else ""
    lanes = f"{storage.lanes_a_node} of {storage.lanes} lanes"
    console.print(f"each node reads {lanes}: {storage.node_bytes / 1e9:,.3g} GB an epoch{again}")
    if storage.nodes_a_shard > 1:
        even = next(n for n in range(nodes, batch + 1, nodes) if n >= storage.lanes and batch % n == 0)
        console.print(f"a shard is read by {storage.nodes_a_shard:.2f} nodes; by one with data.lanes={even}")


def _speed_table(speed: scaling.Estimate, nodes: int) -> Table:
    of = f"{nodes} nodes" if nodes > 1 else "1 node"
    title = f"speed, {of}; MB/s read and cores that decode are a node's"
    table = Table("network of a node", title=title, title_justify="left")
    for name in ("s a step", "sending", "captions/s", "MB/s", "later", "cores"):
        table.add_column(name, justify="right")
    for row in speed.rows:
        rates = ("?" if rate is None else f"{rate / 1e6:,.3g}" for rate in (row.first_bytes_s, row.later_bytes_s))
        numbers = f"{row.step_s:.3g}", f"{row.waited_share:.0%}", f"{row.captions_s:,.0f}"
        table.add_row(row.network, *numbers, *rates, f"{row.decoding_cores:,.3g}")
    return table
