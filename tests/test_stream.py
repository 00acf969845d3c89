"""pytest tests/test_stream.py"""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from conftest import build_shapes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pvtcap import pixels
from pvtcap.batch import Batch
from pvtcap.captioner import Captioner
from pvtcap.config import Config, SourceConfig, batch_plan
from pvtcap.dist import World
from pvtcap.errors import ShardError
from pvtcap.packing import Packed
from pvtcap.shardset import ShardSet
from pvtcap.sources import Sources
from pvtcap.stream import View, train_batches, whole_batches
from pvtcap.text import IGNORE, CaptionTokenizer

CPU = torch.device("cpu")


def rank(number: int, size: int) -> World:
    """A rank that talks to nobody: the stream reads its number and nothing else."""
    return World(number, size, number, CPU)


def view(folder: Path | None, config: Config, **data: object) -> tuple[Sources, View]:
    """What ``train_batches`` takes; the sources are ``folder``, or what ``data`` says."""
    named = {} if folder is None else {"train": (SourceConfig(path=str(folder)),)}
    chosen = config.data.model_copy(update={**named, **data})
    sources = Sources.open(chosen)
    tokenizer = CaptionTokenizer.train((text for group in sources.captions() for text in group), 100)
    return sources, View(chosen, tokenizer, config.text.max_tokens)


def whole(folder: Path, config: Config) -> tuple[ShardSet, View]:
    """What ``whole_batches`` takes."""
    sources, seen = view(folder, config)
    return sources.shardsets[0], seen


Seen = dict[tuple[int, int], tuple[str, bytes, tuple[int, ...]]]


def contents(batches: Iterable[Batch]) -> Seen:
    """By position of the stream (and how often it was there): key, augmented pixels, tokens without padding."""
    found: Seen = {}
    for batch in batches:
        for row, (sample, place) in enumerate(zip(batch.samples, batch.places, strict=True)):
            kept = batch.segments[row] >= 0
            slot = place.position, sum(place.position == position for position, _ in found)
            found[slot] = sample.key, batch.photos[row].numpy().tobytes(), tuple(batch.tokens[row][kept].tolist())
    return found


def steps(seen: tuple[Sources, View], num_ranks: int, first_step: int, num_steps: int, seed: int = 3) -> list[Seen]:
    """What all ranks together train on, step by step."""
    plan = batch_plan(seen[1].data, num_ranks)
    taken: list[list[Batch]] = [[] for _ in range(num_steps)]
    for number in range(num_ranks):
        batches = train_batches(*seen, plan, rank(number, num_ranks), seed=seed, first_step=first_step)
        for step in taken:
            step += itertools.islice(batches, plan.accumulation)
    return [contents(step) for step in taken]


def test_batches_are_the_same_for_any_ranks_accumulation_and_workers(shapes: Path, config: Config) -> None:
    alone = view(shapes / "train", config, global_batch=24)
    expected = steps(alone, 1, 0, 5)  # an epoch is two of these: the third begins another
    assert [len(step) for step in expected] == [24] * 5
    assert sorted(key for step in expected[:2] for key, _, _ in step.values()) == sorted(alone[0].shardsets[0].keys())
    for num_ranks, micro_batch, workers in ((2, None, 0), (3, 4, 0), (4, 1, 0), (8, 3, 0), (2, 6, 1), (1, 8, 4)):
        seen = view(shapes / "train", config, global_batch=24, micro_batch=micro_batch, workers=workers)
        assert steps(seen, num_ranks, 0, 5) == expected


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 1), (1, 3), (3, 1), (3, 2), (4, 3), (1, 0), (3, 0)])
def test_lent_photos_stay_as_they_are_for_a_step(shapes: Path, config: Config, accumulation: int, workers: int) -> None:
    expected = steps(view(shapes / "train", config, global_batch=24), 1, 0, 8)
    seen = view(shapes / "train", config, global_batch=24, micro_batch=24 // accumulation, workers=workers)
    plan = batch_plan(seen[1].data, 1)
    lent = train_batches(*seen, plan, rank(0, 1), seed=3, first_step=0, lent=True)
    places = set()
    for step in expected:
        batches = list(itertools.islice(lent, plan.accumulation))
        assert all(batch.photos.is_shared() == (workers > 0) for batch in batches)
        places |= {batch.photos.data_ptr() for batch in batches}
        time.sleep(0.1)  # the workers go on as far as they are let
        assert contents(batches) == step
    assert workers or len(places) == accumulation  # each step's memory is the last one's


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """ShardSets of 1, 7, 20 and 33 photos in shards of 1 to 9."""
    folder = tmp_path_factory.mktemp("many")
    return [build_shapes(folder / f"of{n}", "train", n, per) for n, per in ((1, 1), (7, 3), (20, 9), (33, 5))]


@given(st.data())
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_stopped_anywhere_and_resumed_on_another_shape_it_goes_on_as_if_unbroken(
    many: list[Path], config: Config, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.sampled_from(many), min_size=1, max_size=3, unique=True))
    weights: list[float | None] = [None] * len(chosen)
    if data.draw(st.booleans()):
        weights = [data.draw(st.floats(0.1, 1)) for _ in chosen]
    train = tuple(SourceConfig(path=str(path), weight=w) for path, w in zip(chosen, weights, strict=True))
    common = {
        "train": train,
        "global_batch": data.draw(st.sampled_from([1, 2, 6, 8, 24])),
        "lanes": data.draw(st.integers(1, 30)),
        "shuffle_window_shards": data.draw(st.integers(1, 4)),
        "blank_photos": True,  # pixels are compared above
        "captions_per_photo": 1,
    }
    seed, stop, more = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 30)), 4

    def shape() -> tuple[tuple[Sources, View], int]:
        batch = common["global_batch"]
        num_ranks = data.draw(st.sampled_from([n for n in (1, 2, 3, 4, 8) if batch % n == 0]))
        micro = data.draw(st.sampled_from([m for m in range(1, batch + 1) if batch % (m * num_ranks) == 0]))
        return view(None, config, micro_batch=micro, **common), num_ranks

    (before, ranks_before), (after, ranks_after) = shape(), shape()
    whole = steps(before, ranks_before, 0, stop + more, seed)
    assert steps(after, ranks_after, stop, more, seed) == whole[stop:]
    drawn: dict[tuple[int, int], Counter[str]] = {}
    order = before[0].order(before[1].data, seed)
    for position, times in sorted(slot for step in whole for slot in step):
        assert times == 0
        place = order.place(position)
        key = whole[position // len(whole[0])][position, 0][0]
        drawn.setdefault((place.source, place.epoch), Counter())[key] += 1
    for (source, epoch), keys in drawn.items():
        every = Counter(before[0].shardsets[source].keys() if weights[0] else all_keys(before[0]))
        assert keys == every if (source, epoch + 1) in drawn else not keys - every


def all_keys(sources: Sources) -> list[str]:
    return [key for shardset in sources.shardsets for key in shardset.keys()]  # noqa: SIM118


def test_seeking_to_a_step_reads_that_step_and_nothing_else(
    many: list[Path], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, pread = [], os.pread

    def counted(*words: int) -> bytes:
        reads.append(words)
        return pread(*words)

    monkeypatch.setattr(os, "pread", counted)
    seen = view(many[3], config, captions_per_photo=1)
    plan = batch_plan(seen[1].data, 1)
    for first_step in (0, 3, 1_000_000_007):
        reads.clear()
        batch = next(train_batches(*seen, plan, rank(0, 1), seed=0, first_step=first_step))
        assert len(reads) == 4 * len(batch.samples)  # a photo and its texts, and the header of each


def test_augmentation_differs_between_epochs_and_blanked_photos_keep_their_captions(
    shapes: Path, config: Config
) -> None:
    def an_epoch(first_step: int, **data: object) -> dict[str, tuple[bytes, tuple[int, ...]]]:
        epoch = steps(view(shapes / "train", config, **data), 1, first_step, 6)
        return {key: (photo, tokens) for step in epoch for key, photo, tokens in step.values()}

    first, second, blanked = an_epoch(0), an_epoch(6), an_epoch(0, blank_photos=True)
    # Of 32 pixels there are not so many crops that chance gives none twice.
    assert [first[key][0] == second[key][0] for key in first].count(True) <= 2
    assert {len(set(values)) for values in (first.keys(), second.keys())} == {48}
    assert {photo for photo, _ in blanked.values()} == {bytes([pixels.BLANK_LEVEL]) * 3 * 32 * 32}
    assert {key: tokens for key, (_, tokens) in blanked.items()} == {key: tokens for key, (_, tokens) in first.items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 16])
def test_the_whole_set_is_dealt_exactly_once_in_batches_that_ranks_do_not_change(
    shapes: Path, config: Config, num_ranks: int
) -> None:
    seen = whole(shapes / "val", config)
    dealt = [list(whole_batches(*seen, 4, rank(n, num_ranks), even=False)) for n in range(num_ranks)]
    alone = list(whole_batches(*seen, 4, rank(0, 1), even=False))
    assert [len(batch.samples) for batch in alone] == [4, 4, 3]
    found = [tuple(s.key for s in batch.samples) for part in dealt for batch in part]
    assert sorted(found) == sorted(tuple(s.key for s in batch.samples) for batch in alone)
    assert all(len(sample.captions) == 5 for batch in alone for sample in batch.samples)


def test_even_batches_give_each_rank_as_many_and_count_nothing_twice(shapes: Path, config: Config) -> None:
    seen = whole(shapes / "val", config)
    dealt = [list(whole_batches(*seen, 4, rank(n, 4), even=True)) for n in range(4)]
    assert [len(part) for part in dealt] == [1, 1, 1, 1]
    (filler,) = dealt[3]
    assert (filler.num_labels, filler.num_captions, filler.samples) == (0, 0, ())
    total = sum(batch.num_labels for part in dealt for batch in part)
    assert total == sum(batch.num_labels for batch in whole_batches(*seen, 4, rank(0, 1), even=False))


def damaged(shapes: Path, folder: Path, index: int) -> tuple[Path, str]:
    """A copy of the train set in which one photo's bytes are zeros: its tar, and its key."""
    shutil.copytree(shapes / "train", folder)
    shardset = ShardSet.open(folder)
    of_shard = shardset.load_index(1)
    tar = folder / shardset.manifest.shards[1].file
    raw = bytearray(tar.read_bytes())
    offset, size = of_shard.photos[index]
    raw[offset : offset + size] = bytes(size)  # the same size, so only reading it can tell
    tar.write_bytes(raw)
    return tar, of_shard.keys[index]


def test_a_micro_batch_of_a_bad_photo_alone_is_one_token_without_a_label(
    shapes: Path, config: Config, tmp_path: Path
) -> None:
    damaged(shapes, tmp_path / "damaged", 5)
    seen = view(tmp_path / "damaged", config, micro_batch=1)
    plan = batch_plan(seen[1].data, 1)
    epoch = itertools.islice(train_batches(*seen, plan, rank(0, 1), seed=0, first_step=0), 48)
    (alone,) = [batch for batch in epoch if batch.bad]
    assert (len(alone.photos), alone.num_captions, alone.num_labels) == (1, 0, 0)
    assert Packed.of(alone).tokens_1N.shape == (1, 1)
    model = Captioner(config, seen[1].tokenizer.size).train()
    loss = model(alone)
    loss.backward()
    assert float(loss.detach()) == 0
    gradients = [parameter.grad for parameter in model.trainable().values()]
    assert gradients and all(one is not None and not one.any() for one in gradients)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_cannot_be_decoded_is_named_and_teaches_nothing(
    shapes: Path, config: Config, tmp_path: Path, workers: int
) -> None:
    tar, key = damaged(shapes, tmp_path / "damaged", 5)
    seen = view(tmp_path / "damaged", config, workers=workers)
    plan = batch_plan(seen[1].data, 1)
    epoch = list(itertools.islice(train_batches(*seen, plan, rank(0, 1), seed=0, first_step=0), 6))
    (of_batch,) = [batch for batch in epoch if batch.bad]
    (bad,) = of_batch.bad
    assert (bad.key, bad.reason) == (key, "not a photo")
    assert bad.where == f"{tar}, sample {key}"
    row = [sample.key for sample in of_batch.samples].index(key)
    assert of_batch.places[row] == bad.place
    assert set(of_batch.labels[row].tolist()) == {IGNORE}
    assert set(of_batch.photos[row].flatten().tolist()) == {pixels.BLANK_LEVEL}
    assert of_batch.num_captions == 7 * 2
    assert sum(batch.num_captions for batch in epoch) == 47 * 2
    # In evaluation there is no leaving out: a score must be of all photos.
    with pytest.raises(ShardError, match=f"{key}: not a photo"):
        list(whole_batches(seen[0].shardsets[0], seen[1], 4, rank(0, 1), even=False))


def test_a_shard_that_cannot_be_read_to_its_end_is_named(shapes: Path, config: Config, tmp_path: Path) -> None:
    shutil.copytree(shapes / "train", tmp_path / "stuck")
    seen = view(tmp_path / "stuck", config, workers=1, worker_timeout_s=2)
    tar = tmp_path / "stuck" / seen[0].shardsets[0].manifest.shards[1].file
    tar.unlink()
    os.mkfifo(tar)  # as a file of a server that is gone: opening it never ends
    with pytest.raises(ShardError, match=rf"{tar}, sample number \d+: a decoding process of rank 0 hangs; got \d+ sec"):
        list(itertools.islice(train_batches(*seen, batch_plan(seen[1].data, 1), rank(0, 1), seed=0, first_step=0), 6))
