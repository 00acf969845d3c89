"""pytest tests/test_scaling.py: the paper model against numbers worked out by hand, real collectives, real orders."""

from __future__ import annotations

import itertools
import random
from collections import Counter, OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RankFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pvtcap.captioner import Captioner
from pvtcap.config import BatchPlan, batch_plan
from pvtcap.configfile import parse
from pvtcap.dist import World
from pvtcap.engine import Engine
from pvtcap.order import Cycle, Order
from pvtcap.scaling import (
    ACHIEVED,
    INSIDE,
    LAUNCH_S,
    NETWORKS,
    Compute,
    Link,
    Messages,
    StepTime,
    Storage,
    estimate,
    lanes_of_nodes,
    missed,
)
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches
from pvtcap.text import CaptionTokenizer

PASSES = {"allreduce_": 2}  # all others: one


class Collectives(TorchDispatchMode):
    """Bytes of the messages of all collectives within it, times the passes of a ring that each takes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            tensors = [tensor for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)]
            message = max(tensors, key=torch.numel)  # of two the one that is whole
            self.bytes[message.dtype] += PASSES.get(name, 1) * message.numel() * message.element_size()
        return func(*args, **(kwargs or {}))


def counted(world: World, tree: dict[str, Any], variants: list[dict[str, Any]]) -> list[list[float]]:
    """Of each variant: elements that train, frozen ones, bytes of the passes of the third step."""
    found = []
    for variant in variants:
        config = parse({**tree, **variant}, "test")
        sources = Sources.open(config.data)
        tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 100)
        plan = batch_plan(config.data, world.size)
        model = Captioner(config, tokenizer.size)
        trained = sum(parameter.numel() for parameter in model.trainable().values())
        frozen = sum(parameter.numel() for parameter in model.parameters()) - trained
        engine = Engine(model, config, plan, world)
        view = View(config.data, tokenizer, config.text.max_tokens)
        batches = train_batches(sources, view, plan, world, seed=0, first_step=0)
        for _ in range(3):  # ZeRO-3 learns in the first what it need not gather twice
            with Collectives() as collectives:
                for turn in range(plan.accumulation):
                    if turn:
                        engine.accumulate()
                    engine.forward_backward(next(batches), 0.01)
                engine.step(1.0)
        found.append([trained, frozen, collectives.bytes[torch.bfloat16]])
    return found


def test_the_ranks_send_what_the_model_says(run_ranks: RankFunction, tree: dict[str, Any], tmp_path: Path) -> None:
    """Every ZeRO stage, one micro-batch a step and two, frozen parameters too: DeepSpeed's own collectives, counted."""
    # A full-size model has few tensors so small that ZeRO-3 leaves them whole; this one has no others.
    (tmp_path / "whole.json").write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    (tmp_path / "encoder.pth").touch()  # not read
    tree["model"]["encoder_weights"] = str(tmp_path / "encoder.pth")
    cases = list(itertools.product(range(4), (1, 2)))
    variants = [
        {
            "zero": {"stage": stage, "deepspeed_json": str(tmp_path / "whole.json")},
            "precision": "bf16",
            "train": {"what": "projection+decoder", "steps": 6},
            "data": {**tree["data"], "micro_batch": 4 // turns},
        }
        for stage, turns in cases
    ]
    results = run_ranks("test_scaling:counted", 2, tree=tree, variants=variants)[0]
    for (stage, turns), (trained, frozen, sent) in zip(cases, results, strict=True):
        assert frozen > trained
        planned = Messages.of(stage, trained, frozen, 2, turns).num_bytes
        assert sent == pytest.approx(planned, rel=0.01), (stage, turns)  # they are padded


def test_bytes_worked_out_by_hand() -> None:
    # 1,000 elements in 16 bits on four ranks: three quarters of 2,000 bytes a pass.
    assert [Messages.of(stage, 1000, 0, 2).sent_bytes(4) for stage in range(4)] == [3000, 4500, 4500, 3000]
    assert [Messages.of_paper(stage, 1000, 2).sent_bytes(4) for stage in range(4)] == [3000, 3000, 3000, 4500]
    # Four micro-batches: ZeRO-1 waits for the last one, ZeRO-2 and 3 do not.
    assert [Messages.of(stage, 1000, 0, 2, 4).sent_bytes(4) for stage in range(4)] == [3000, 4500, 13500, 12000]
    # Frozen parameters are gathered where they are sharded.
    assert [Messages.of(stage, 1000, 500, 2).num_bytes for stage in range(4)] == [4000, 6000, 6000, 5000]


@pytest.mark.parametrize("stage", range(4))
def test_one_rank_sends_nothing_and_more_send_more(stage: int) -> None:
    messages = Messages.of(stage, 10**6, 10**5, 4)
    assert messages.sent_bytes(1) == 0
    assert messages.seconds(1, 1, INSIDE, NETWORKS[0]) == 0
    sent = [messages.sent_bytes(ranks) for ranks in (1, 2, 4, 64, 10**9)]
    assert sent == sorted(set(sent))
    assert sent[-1] == pytest.approx(messages.num_bytes)
    assert Messages.of_paper(3, 10**6, 4).num_bytes == 1.5 * Messages.of_paper(2, 10**6, 4).num_bytes


def test_seconds_worked_out_by_hand() -> None:
    messages, network = Messages.of(0, 10**9, 0, 2), Link("a network", 1e9, 1e-3)
    # 16 ranks: 15/16 of 4 GB at 0.8 GB/s, and two passes of 15 rounds of a millisecond.
    assert messages.seconds(2, 8, INSIDE, network) == pytest.approx(3.75 / ACHIEVED + 0.03)
    inside = messages.seconds(1, 8, INSIDE, network)
    assert inside == pytest.approx(3.5e9 / (ACHIEVED * INSIDE.bytes_s) + 14 * INSIDE.latency_s)
    assert messages.seconds(16, 1, Link("unused", 1.0, 1.0), network) == messages.seconds(2, 8, INSIDE, network)
    slow_inside = Link("slow", 1e8, 1e-3)
    assert messages.seconds(2, 8, slow_inside, network) > 9 * messages.seconds(2, 8, INSIDE, network)


def test_small_micro_batches_stop_getting_faster() -> None:
    compute = Compute.assumed(photo_flops=0.4e12, peak_flops=100e12, features=False, compiled=False)  # 25 ms a photo
    seconds = [compute.step_s(BatchPlan(64, 64 // ranks, ranks, 1)) for ranks in (1, 2, 64)]
    assert seconds == pytest.approx([1.6, 0.8, LAUNCH_S])
    assert compute.step_s(BatchPlan(64, 1, 1, 64)) == pytest.approx(64 * LAUNCH_S)
    # A run of two ranks that did 5 images/s each: 0.2 s a photo, however they are cut.
    assert Compute.measured(5.0, 2).step_s(BatchPlan(64, 16, 4, 1)) == pytest.approx(3.2)


def test_compute_hides_no_more_communication_than_it_lasts() -> None:
    network = Link("a network", 1e9, 0.0)
    batches, messages = BatchPlan(4, 1, 4, 1), Messages.of(0, 10**9, 0, 2)  # 3.75 s of communication
    slow, quick = (
        StepTime.of(Compute(photo_s, 0.0, ""), batches, messages, 4, network, overlap=0.5) for photo_s in (10.0, 1.0)
    )
    assert (slow.communication_s, slow.waited_s, slow.seconds) == pytest.approx((3.75, 1.875, 11.875))
    assert (quick.waited_s, quick.seconds, quick.waited_share) == pytest.approx((2.75, 3.75, 2.75 / 3.75))


@pytest.mark.parametrize(("global_batch", "max_lanes"), [(64, 32), (64, 4), (96, 32), (512, 100)])
@pytest.mark.parametrize("nodes", [1, 2, 8, 32])
def test_nodes_read_the_lanes_that_the_order_gives_their_ranks(global_batch: int, max_lanes: int, nodes: int) -> None:
    order = Order([[10] * 50], [1.0], seed=0, global_batch=global_batch, max_lanes=max_lanes, window_shards=2)
    of_node = global_batch // nodes
    theirs = [len(order.lanes(range(node * of_node, (node + 1) * of_node))) for node in range(nodes)]
    assert lanes_of_nodes(order.cycle, nodes) == theirs
    assert lanes_of_nodes(Cycle([1.0], global_batch=64, max_lanes=4), 8) == [1] * 8


def test_what_the_storage_has_to_deliver() -> None:
    few = Storage.of(1e9, 10_000, 64, nodes=8, max_lanes=4, cache_bytes=1e12)
    assert (few.lanes, few.lanes_a_node, few.nodes_a_shard, few.node_bytes, few.again) == (4, 1, 2.0, 0.25e9, 0.0)
    enough = Storage.of(1e9, 10_000, 64, nodes=8, max_lanes=32, cache_bytes=1e12)
    assert (enough.lanes_a_node, enough.nodes_a_shard, enough.node_bytes) == (4, 1.0, 0.125e9)
    assert 0 < Storage.of(1e9, 10_000, 64, 8, 32, cache_bytes=0.1e9).again < 1
    folder = Storage.of(1e9, 10_000, 64, nodes=8, max_lanes=4, cache_bytes=None)  # it reads samples, not whole shards
    assert (folder.nodes_a_shard, folder.node_bytes, folder.again) == (1.0, 0.125e9, 1.0)
    # 64 photos of 100 kB in 0.1 s on 8 nodes, each shard fetched by two of them.
    compute, batches = Compute(0.1 / 64, 0.0, ""), BatchPlan(64, 64, 1, 1)
    rows = [
        estimate(compute, Messages(0, 0), batches, 1, overlap=0, captions_a_photo=5, storage=storage, decodes=True)
        for storage in (few, folder, None)
    ]
    assert [one.rows[0].first_bytes_s for one in rows] == pytest.approx([2 * 64e6, 64e6, None])
    assert [one.rows[0].later_bytes_s for one in rows] == pytest.approx([0, 64e6, None])
    assert rows[0].rows[0].captions_s == pytest.approx(3200)


def test_a_cache_for_half_of_an_epoch_saves_little_of_it() -> None:
    """Counted with a least-recently-used cache and passes in new random orders."""
    assert (missed(1.0), missed(2.0)) == (0.0, 0.0)
    assert missed(1e-9) == pytest.approx(1.0)
    shards, draw = list(range(2000)), random.Random(0)
    for share in (0.25, 0.5, 0.9):
        cache: OrderedDict[int, None] = OrderedDict()
        misses = 0
        for epoch in range(6):
            draw.shuffle(shards)
            for shard in shards:
                misses += epoch > 0 and shard not in cache
                cache[shard] = None
                cache.move_to_end(shard)
                if len(cache) > share * len(shards):
                    cache.popitem(last=False)
        assert misses / (5 * len(shards)) == pytest.approx(missed(share), abs=0.015), share
