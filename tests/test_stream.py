"""pytest tests/test_stream.py"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from pvtcap import pixels
from pvtcap.config import BatchPlan, Config, batch_plan
from pvtcap.dist import World
from pvtcap.errors import ShardError
from pvtcap.shardset import ShardSet
from pvtcap.stream import Batch, View, train_batches, whole_batches
from pvtcap.text import CaptionTokenizer

CPU = torch.device("cpu")


def rank(number: int, size: int) -> World:
    """A rank that talks to nobody: the stream reads its number and nothing else."""
    return World(number, size, number, CPU)


def view(folder: Path, config: Config, **data: object) -> View:
    shardset = ShardSet.open(folder)
    tokenizer = CaptionTokenizer.train((text for group in shardset.captions() for text in group), 100)
    return View(shardset, config.data.model_copy(update=data), tokenizer, config.text.max_tokens)


def contents(batches: list[Batch]) -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """By sample: its augmented pixels and its tokens without padding."""
    found = {}
    for batch in batches:
        for row, sample in enumerate(batch.samples):
            kept = batch.segments[row] >= 0
            found[sample.key] = batch.photos[row].numpy().tobytes(), tuple(batch.tokens[row][kept].tolist())
    return found


def global_batch(seen: View, plan: BatchPlan, step: int) -> dict[str, tuple[bytes, tuple[int, ...]]]:
    """What all ranks together train on at ``step``."""
    taken: list[Batch] = []
    for number in range(plan.world_size):
        batches = train_batches(seen, plan, rank(number, plan.world_size), seed=3, first_step=step)
        taken += itertools.islice(batches, plan.accumulation)
    return contents(taken)


def test_a_global_batch_is_the_same_for_any_ranks_accumulation_and_workers(shapes: Path, config: Config) -> None:
    alone = view(shapes / "train", config)
    for step in (0, 4, 11):  # the last lies in the second epoch
        expected = global_batch(alone, batch_plan(alone.data, 1), step)
        assert len(expected) == config.data.global_batch
        for num_ranks, micro_batch, workers in ((2, None, 0), (4, 1, 0), (1, 2, 2)):
            seen = view(shapes / "train", config, micro_batch=micro_batch, workers=workers)
            assert global_batch(seen, batch_plan(seen.data, num_ranks), step) == expected


def test_an_epoch_of_batches_is_every_sample_once_and_seeking_is_counting(shapes: Path, config: Config) -> None:
    seen = view(shapes / "train", config)
    plan = batch_plan(seen.data, 1)
    stream = list(itertools.islice(train_batches(seen, plan, rank(0, 1), seed=0, first_step=0), 12))
    keys = [sample.key for batch in stream for sample in batch.samples]
    assert sorted(keys[:48]) == sorted(keys[48:]) == sorted(seen.shardset.keys())
    assert keys[:48] != keys[48:]
    later = next(train_batches(seen, plan, rank(0, 1), seed=0, first_step=7))
    assert contents([later]) == contents([stream[7]])


def test_augmentation_differs_between_epochs_and_blanked_photos_keep_their_captions(
    shapes: Path, config: Config
) -> None:
    def one_epoch(seen: View, first_step: int) -> dict[str, tuple[bytes, tuple[int, ...]]]:
        batches = train_batches(seen, batch_plan(seen.data, 1), rank(0, 1), seed=0, first_step=first_step)
        return contents(list(itertools.islice(batches, 6)))

    first, second = (one_epoch(view(shapes / "train", config), step) for step in (0, 6))
    blanked = one_epoch(view(shapes / "train", config, blank_photos=True), 0)
    assert all(first[key][0] != second[key][0] for key in first)
    assert {len(set(values)) for values in (first.keys(), second.keys())} == {48}
    assert {photo for photo, _ in blanked.values()} == {bytes([pixels.BLANK_LEVEL]) * 3 * 32 * 32}
    assert {key: tokens for key, (_, tokens) in blanked.items()} == {key: tokens for key, (_, tokens) in first.items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 16])
def test_the_whole_set_is_dealt_exactly_once_in_batches_that_ranks_do_not_change(
    shapes: Path, config: Config, num_ranks: int
) -> None:
    seen = view(shapes / "val", config)
    dealt = [list(whole_batches(seen, 4, rank(n, num_ranks), even=False)) for n in range(num_ranks)]
    alone = list(whole_batches(seen, 4, rank(0, 1), even=False))
    assert [len(batch.samples) for batch in alone] == [4, 4, 3]
    found = [tuple(s.key for s in batch.samples) for part in dealt for batch in part]
    assert sorted(found) == sorted(tuple(s.key for s in batch.samples) for batch in alone)
    assert all(len(sample.captions) == 5 for batch in alone for sample in batch.samples)


def test_even_batches_give_each_rank_as_many_and_count_nothing_twice(shapes: Path, config: Config) -> None:
    seen = view(shapes / "val", config)
    dealt = [list(whole_batches(seen, 4, rank(n, 4), even=True)) for n in range(4)]
    assert [len(part) for part in dealt] == [1, 1, 1, 1]
    (filler,) = dealt[3]
    assert (filler.num_labels, filler.num_captions, filler.samples) == (0, 0, ())
    total = sum(batch.num_labels for part in dealt for batch in part)
    assert total == sum(batch.num_labels for batch in whole_batches(seen, 4, rank(0, 1), even=False))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_photo_stops_with_its_shard_and_key(
    shapes: Path, config: Config, tmp_path: Path, workers: int
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(shapes / "train", folder)
    shardset = ShardSet.open(folder)
    index = shardset.load_index(1)
    tar = folder / shardset.manifest.shards[1].file
    raw = bytearray(tar.read_bytes())
    offset, size = index.photos[5]
    raw[offset : offset + size] = bytes(size)  # the same size, so only reading it can tell
    tar.write_bytes(raw)
    seen = view(folder, config, workers=workers)

    def read_an_epoch() -> Iterator[Batch]:
        return itertools.islice(train_batches(seen, batch_plan(seen.data, 1), rank(0, 1), seed=0, first_step=0), 6)

    with pytest.raises(ShardError) as caught:
        list(read_an_epoch())
    assert str(tar) in str(caught.value)
    assert index.keys[5] in str(caught.value)
    assert "not a photo" in str(caught.value)
