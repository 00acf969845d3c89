"""On paper: how long a step takes on many nodes, and what its data asks of each node's storage.

    a step      compute, and the communication that does not happen meanwhile (``overlap``)
    compute     of a micro-batch: FLOPs over (peak × utilisation), but never less than ``LAUNCH_S``; or what a run took
    messages    what goes round the ranks in a step, in bytes: P elements train, F are frozen, e bytes each, a
                micro-batches a rank. A reduce-scatter or an all-gather is one pass over its message, an all-reduce both
                of them: two passes.
                            the paper, a = 1    DeepSpeed 0.19
                    ZeRO-0  2 e P               2 e P
                    ZeRO-1  2 e P               2 e P + e P            reduced to all ranks, where one each would do
                    ZeRO-2  2 e P               2 a e P + e P          the same, after each micro-batch
                    ZeRO-3  3 e P               a e P + a e (P + F)    gathered once a micro-batch, not twice
                The paper is Rajbhandari et al., "ZeRO", 2020, section 7. The second column was counted, collective by
                collective, on two ranks (tests/test_scaling.py counts again); of ZeRO-3 it holds for models of less
                than ``stage3_max_reuse_distance``, 10^9 elements.
    sent        (N - 1) / N of a pass's message leaves each of N ranks, in N - 1 rounds: Patarasuk and Yuan, "Bandwidth
                optimal all-reduce algorithms for clusters of workstations", 2009. Of a ring through all ranks a node
                sends what a rank sends: the slower one of a rank's link inside its node and the node's whole network
                sets the rate.
    storage     a node reads the lanes of its ranks. From a folder: the photos it trains on. From URLs: the shards of
                these lanes, whole, and in later epochs those again that its cache had to give up.

Left out: the optimizer's step, the loss's two small sums over gloo, stragglers, a fabric that others use, NCCL's trees
(fewer rounds than a ring's), and that ZeRO-3 gathers in many small messages. No second machine has run any of it.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from pvtcap.config import BatchPlan, ranks_in_words
from pvtcap.order import Cycle


@dataclass(frozen=True)
class Link:
    """``bytes_s`` in one direction, as sold: of a rank inside its node, or of a whole node's network."""

    name: str
    bytes_s: float
    latency_s: float


# Rates of data sheets (G: Gb/s); the latencies are assumed.
INSIDE = Link("NVLink 4", 450e9, 3e-6)
NETWORKS = (
    Link("InfiniBand 8 × 400G", 400e9, 5e-6),
    Link("InfiniBand 200G", 25e9, 5e-6),
    Link("Ethernet 25G", 3.125e9, 30e-6),
    Link("Ethernet 10G", 1.25e9, 30e-6),
)
# Where no run has been measured: its peak, and the share of it that one H200 (the same chip) reached with the full-size
# model in bf16 at ZeRO-2, not compiled and compiled: with 512 photos a step (compiled before there were kernels of
# ours), or features of 512, compiled of 1,024 (benchmarks/LOG.md).
DEVICE = "H100"
UTILISATION = {"photos": (0.16, 0.24), "features": (0.30, 0.36)}
LAUNCH_S = 0.08  # of a step there, however small: its kernels, and DeepSpeed's hand on each of 323 parameters
# Assumed, both of them:
ACHIEVED = 0.8  # of a link's rate, by collectives
OVERLAP = 0.5  # of the communication, where DeepSpeed's overlap_comm is on: by default in ZeRO-3 only
# Measured by benchmarks/stream.py, of 224 px JPEGs; COCO's larger ones take three times as long.
DECODED_PER_CORE_S = 835.0


@dataclass(frozen=True)
class Compute:
    """Seconds of one photo's forward and backward pass on one device, and the least of a micro-batch; ``source`` says
    where they are from."""

    photo_s: float
    least_s: float
    source: str

    @classmethod
    def assumed(cls, photo_flops: float, peak_flops: float, *, features: bool, compiled: bool) -> Compute:
        """Of a device with this peak (FLOP/s); ``photo_flops`` are a photo's, its captions included."""
        share = UTILISATION["features" if features else "photos"][compiled]
        rate = f"{share:.0%} of {peak_flops / 1e12:,.3g} TFLOP/s"
        source = f"assumed, as on one H200: {rate}, {LAUNCH_S * 1000:.0f} ms at least"
        return cls(photo_flops / (peak_flops * share), LAUNCH_S, source)

    @classmethod
    def measured(cls, photos_s: float, ranks: int) -> Compute:
        """From a run's photos a second on one device: its waiting and its ranks' communication stay in it."""
        return cls(1 / photos_s, 0.0, f"measured by this run on {ranks_in_words(ranks)}: {photos_s:,.3g} images/s each")

    def step_s(self, batches: BatchPlan) -> float:
        return batches.accumulation * max(self.least_s, batches.micro_batch * self.photo_s)


@dataclass(frozen=True)
class Messages:
    """What goes round in a step: bytes of all passes together, and how many passes they are."""

    num_bytes: float
    passes: int

    @classmethod
    def of(cls, stage: int, trained: int, frozen: int, element_bytes: int, accumulation: int = 1) -> Messages:
        """As DeepSpeed 0.19 does it; see the module. Elements that train, and frozen ones."""
        gradients, turns = trained * element_bytes, accumulation
        return (
            cls(2 * gradients, 2),
            cls(3 * gradients, 3),
            cls((2 * turns + 1) * gradients, 2 * turns + 1),
            cls(turns * (2 * gradients + frozen * element_bytes), 2 * turns),
        )[stage]

    @classmethod
    def of_paper(cls, stage: int, trained: int, element_bytes: int) -> Messages:
        """As the ZeRO paper has it, for one micro-batch a step and no frozen parameters."""
        passes = (2, 2, 2, 3)[stage]
        return cls(passes * trained * element_bytes, passes)

    def sent_bytes(self, ranks: int) -> float:
        """By each rank."""
        return self.num_bytes * (ranks - 1) / ranks

    def seconds(self, nodes: int, ranks_a_node: int, inside: Link, network: Link) -> float:
        """Of one ring over all ranks: it is as fast as the slowest link that it uses."""
        ranks = nodes * ranks_a_node
        links = [link for link, used in ((inside, ranks_a_node > 1), (network, nodes > 1)) if used]
        if not links:
            return 0.0
        rounds_s = self.passes * (ranks - 1) * max(link.latency_s for link in links)
        return self.sent_bytes(ranks) / (ACHIEVED * min(link.bytes_s for link in links)) + rounds_s


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step with one network; ``waited_s`` is the communication that compute does not hide."""

    network: str
    compute_s: float
    communication_s: float
    waited_s: float

    @classmethod
    def of(
        cls,
        compute: Compute,
        batches: BatchPlan,
        messages: Messages,
        nodes: int,
        network: Link,
        *,
        overlap: float = 0.0,
        inside: Link = INSIDE,
    ) -> StepTime:
        """``overlap`` is the share of the communication that can go on during compute."""
        busy_s = compute.step_s(batches)
        sending_s = messages.seconds(nodes, batches.world_size // nodes, inside, network)
        return cls(network.name, busy_s, sending_s, sending_s - min(overlap * sending_s, busy_s))

    @property
    def seconds(self) -> float:
        return self.compute_s + self.waited_s

    @property
    def waited_share(self) -> float:
        return self.waited_s / self.seconds


@dataclass(frozen=True)
class Storage:
    """What the data of a run asks of the storage behind each node.

    ``photo_bytes`` are a photo's of its tar, ``node_bytes`` what the node with most lanes reads in an epoch,
    ``nodes_a_shard`` how many nodes read a shard, in the mean, and ``again`` the share of it that is read again in each
    later epoch.
    """

    lanes: int
    lanes_a_node: int
    photo_bytes: float
    node_bytes: float
    nodes_a_shard: float
    again: float

    @classmethod
    def of(
        cls, data_bytes: float, samples: int, global_batch: int, nodes: int, max_lanes: int, cache_bytes: float | None
    ) -> Storage:
        """Of ``data_bytes`` of tars taken as one source; ``cache_bytes`` is a node's, None for shards in a folder.

        Where two stretches of the data meet, a shard of both is read by both nodes: that is not in it.
        """
        cycle = Cycle([1.0], global_batch=global_batch, max_lanes=max_lanes)
        touched = lanes_of_nodes(cycle, nodes)
        if cache_bytes is None:
            return cls(cycle.num_lanes, max(touched), data_bytes / samples, data_bytes / nodes, 1.0, 1.0)
        node_bytes = data_bytes * max(touched) / cycle.num_lanes
        shared = sum(touched) / cycle.num_lanes
        again = missed(cache_bytes / node_bytes)
        return cls(cycle.num_lanes, max(touched), data_bytes / samples, node_bytes, shared, again)


@dataclass(frozen=True)
class Row:
    """The estimate for one network. ``first_bytes_s`` and ``later_bytes_s`` are what each node reads from the storage,
    in the first epoch and in later ones, ``decoding_cores`` the cores of a node that its photos keep busy.
    """

    network: str
    step_s: float
    waited_share: float
    captions_s: float
    first_bytes_s: float | None
    later_bytes_s: float | None
    decoding_cores: float


@dataclass(frozen=True)
class Estimate:
    """What ``pvtcap plan`` says of speed: a row for each network, one where there is one node."""

    compute: Compute
    sent_bytes: float
    overlap: float
    storage: Storage | None
    rows: tuple[Row, ...]


def estimate(
    compute: Compute,
    messages: Messages,
    batches: BatchPlan,
    nodes: int,
    *,
    overlap: float,
    captions_a_photo: float,
    storage: Storage | None,
    decodes: bool,
) -> Estimate:
    """``storage`` is None where the data cannot be looked at; ``decodes``: it has photos, not features."""

    def row(network: Link) -> Row:
        step = StepTime.of(compute, batches, messages, nodes, network, overlap=overlap)
        photos_s = batches.global_batch / step.seconds
        read = None if storage is None else photos_s / nodes * storage.photo_bytes * storage.nodes_a_shard
        return Row(
            network=step.network,
            step_s=step.seconds,
            waited_share=step.waited_share,
            captions_s=photos_s * captions_a_photo,
            first_bytes_s=read,
            later_bytes_s=None if storage is None or read is None else read * storage.again,
            decoding_cores=photos_s / nodes / DECODED_PER_CORE_S if decodes else 0.0,
        )

    rows = tuple(map(row, NETWORKS if nodes > 1 else (INSIDE,)))
    return Estimate(compute, messages.sent_bytes(batches.world_size), overlap, storage, rows)


def lanes_of_nodes(cycle: Cycle, nodes: int) -> list[int]:
    """How many lanes each node reads; its slots of a batch are neighbours. With fewer lanes than nodes some read the
    same one."""
    slots = [cycle.global_batch * node // nodes for node in range(nodes + 1)]
    return [cycle.lane(end - 1) - cycle.lane(start) + 1 for start, end in itertools.pairwise(slots)]


def missed(share: float) -> float:
    """Of what an epoch reads, the part that a least-recently-used cache for ``share`` (> 0) of it has no more.

    Each epoch reads all shards once, in a new random order. Between a shard's turn at x of one epoch and at y of the
    next (both uniform in 0 … 1), 1 - x (1 - y) of all shards were read, and if that is less than ``share`` it is still
    there. With k = 1 - share the chance of x (1 - y) <= k, a product of two uniform numbers, is k - k ln k.
    """
    left = 1.0 - share
    return left - left * math.log(left) if left > 0 else 0.0
