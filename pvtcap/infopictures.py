"""The two pictures of ``pvtcap shards info``: photos with their captions, and histograms."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from pathlib import Path

from pvtcap import sheet
from pvtcap.chart import Panel, draw_panels
from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto, decode_photo
from pvtcap.shardinfo import ShardSetInfo
from pvtcap.shardset import ShardReader, ShardSet

SHEET, HISTOGRAMS = "contact_sheet.png", "histograms.png"
_NUM_PHOTOS, _MOST_CAPTIONS = 16, 5


def check_out(shardset: ShardSet, out: Path) -> None:
    """Refuse a folder for the pictures before anything is read for them: a ShardSet holds its own files only."""
    inside, outside = out.resolve(), shardset.path.resolve()
    if inside == outside or outside in inside.parents:
        raise ShardError("pictures are not written into a ShardSet", where=out, do="Give --out another folder.")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(f"cannot make the folder: {error.strerror}", where=out) from error


def draw(shardset: ShardSet, info: ShardSetInfo, out: Path) -> list[Path]:
    """Write both pictures; gives their paths. Raises ShardError for a photo that cannot be shown, or a full disk.

    Of a ShardSet of features there are histograms only.
    """
    has_photos = shardset.manifest.features is None
    with ShardReader(shardset) as reader:
        entries = [_entry(reader, *place) for place in spread(shardset.sizes, _NUM_PHOTOS if has_photos else 0)]
    counts = info.counts
    panels = [
        Panel("Caption length", "words a caption", "captions", counts.caption_words),
        Panel("Captions a photo", "captions a photo", "photos", counts.captions_per_photo),
        Panel("Resolution: short side", "short side, pixels", "photos", counts.short_side_px),
        Panel("Resolution: long side", "long side, pixels", "photos", counts.long_side_px),
    ]
    title = f"{info.manifest.name}: {shardset.num_samples:,} photos, {shardset.num_captions:,} captions"
    try:
        if has_photos:
            sheet.draw(entries, out / SHEET)
        draw_panels(panels, title, out / HISTOGRAMS)
    except OSError as error:
        raise ShardError(f"cannot write: {error.strerror or error}", where=out) from error
    return [out / SHEET, out / HISTOGRAMS] if has_photos else [out / HISTOGRAMS]


def spread(sizes: Sequence[int], most: int) -> list[tuple[int, int]]:
    """(shard, index) of ``most`` samples, or all if there are fewer, evenly over shards of these sizes."""
    total = sum(sizes)
    num = min(most, total)
    stops = list(itertools.accumulate(sizes))
    places = []
    for number in range(num):
        position = (2 * number + 1) * total // (2 * num)  # the middle of its share
        shard = bisect.bisect_right(stops, position)
        places.append((shard, position - stops[shard] + sizes[shard]))
    return places


def _entry(reader: ShardReader, shard: int, index: int) -> sheet.Entry:
    sample = reader.read(shard, index)
    try:
        decode_photo(sample.photo)
    except BadPhoto as error:
        do = f"See 'pvtcap shards verify {reader.shardset.location}'."
        raise ShardError(error.reason, where=reader.where(shard, index), got=error.detail or None, do=do) from None
    first, *more = sample.captions
    left_out = len(more) + 1 - _MOST_CAPTIONS
    name = f"{sample.key} (and {left_out} more captions)" if left_out > 0 else sample.key
    return sheet.Entry(sample.photo, first, name, tuple(more[: _MOST_CAPTIONS - 1]))
