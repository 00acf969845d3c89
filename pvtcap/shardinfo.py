"""What is in a ShardSet: counts and distributions over all its texts, read shard by shard in several processes.

    ShardSet ── count_shard, a process each ──▶ Counts ── update ──▶ ShardSetInfo ── as_json ──▶ one object for scripts

Memory grows with what is distinct (words, sizes in pixels), not with the number of samples.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, fields
from typing import Any

from pvtcap.distribution import Distribution, Range
from pvtcap.errors import ShardError
from pvtcap.processes import map_in_order
from pvtcap.shardset import MANIFEST, Manifest, Sample, ShardReader, ShardSet

# ASCII's, and what other keyboards and languages put around words.
_PUNCTUATION = string.punctuation + "“”„‘’‚«»‹›…–—·•¿¡。、，．！？；：（）「」『』【】"


@dataclass
class Counts:
    """What is counted sample by sample; ``update`` adds another shard's."""

    captions_per_photo: Distribution = field(default_factory=Distribution)
    caption_words: Distribution = field(default_factory=Distribution)
    width_px: Distribution = field(default_factory=Distribution)
    height_px: Distribution = field(default_factory=Distribution)
    short_side_px: Distribution = field(default_factory=Distribution)
    long_side_px: Distribution = field(default_factory=Distribution)
    pixels: Range = field(default_factory=Range)
    photo_bytes: Range = field(default_factory=Range)
    orientations: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)

    def add(self, sample: Sample, photo_bytes: int) -> None:
        width, height = sample.width, sample.height
        self.captions_per_photo.add(len(sample.captions))
        for caption in sample.captions:
            words = split_words(caption)
            self.caption_words.add(len(words))
            self.words.update(words)
        self.width_px.add(width)
        self.height_px.add(height)
        self.short_side_px.add(min(width, height))
        self.long_side_px.add(max(width, height))
        self.pixels.add(width * height)
        self.photo_bytes.add(photo_bytes)
        self.orientations["square" if width == height else "landscape" if width > height else "portrait"] += 1
        self.sources[sample.source] += 1

    def update(self, other: Counts) -> None:
        for part in fields(self):
            getattr(self, part.name).update(getattr(other, part.name))


@dataclass(frozen=True)
class ShardSetInfo:
    """Everything that ``pvtcap shards info`` tells."""

    location: str
    manifest: Manifest
    counts: Counts

    @property
    def samples_per_shard(self) -> Distribution:
        return Distribution.of(entry.num_samples for entry in self.manifest.shards)

    @property
    def size_bytes(self) -> int:
        return sum(entry.size_bytes for entry in self.manifest.shards)

    @property
    def num_words_once(self) -> int:
        return sum(times == 1 for times in self.counts.words.values())

    def as_json(self) -> dict[str, Any]:
        """Plain values under the names that ``JSON_KEYS`` explains."""
        manifest, counts = self.manifest, self.counts
        options = dict(manifest.build)
        counted = ("captions_per_photo", "caption_words", "short_side_px", "long_side_px", "width_px", "height_px")
        return {
            "path": self.location,
            "name": manifest.name,
            "builder": options.pop("builder", None),
            "build_options": options,
            "num_samples": manifest.num_samples,
            "num_captions": manifest.num_captions,
            "num_shards": len(manifest.shards),
            "size_bytes": self.size_bytes,
            "vocabulary": {
                "num_words": len(counts.words),
                "num_words_once": self.num_words_once,
                "num_words_total": counts.words.total(),
            },
            **{name: getattr(counts, name).as_json() for name in counted},
            "pixels": counts.pixels.as_json(),
            "photo_bytes": counts.photo_bytes.as_json(),
            "orientations": {name: counts.orientations[name] for name in ("landscape", "portrait", "square")},
            "samples_per_shard": self.samples_per_shard.as_json(),
            "skipped": manifest.skipped,
            "sources": dict(counts.sources.most_common()),
            **({} if manifest.features is None else {"features": manifest.features.model_dump(mode="json")}),
        }


# What --json prints, for --help.
JSON_KEYS = {
    "path, name": "the folder as it was given; the name in its manifest",
    "builder, build_options": "what built it, and with which options",
    "num_samples, num_captions, num_shards": "a sample is a photo with its captions",
    "size_bytes": "of all tars",
    "vocabulary": "num_words different, num_words_once of them seen once, num_words_total in all captions",
    "captions_per_photo, caption_words": "distributions",
    "short_side_px, long_side_px, width_px, height_px": "distributions",
    "samples_per_shard": "a distribution",
    "pixels, photo_bytes": "of a photo: min, mean, max; and total of all",
    "orientations": "photos that are landscape, portrait, square",
    "skipped, sources": "how often each; skipped is what the build left out, by reason",
}


def collect(
    shardset: ShardSet, processes: int = 1, progress: Callable[[int], object] = lambda done: None
) -> ShardSetInfo:
    """Read all texts, in so many processes; ``progress`` is called with the number of samples just read.

    Raises ShardError for a sample that cannot be read, and when there are not as many captions as the manifest says.
    """
    counts = Counts()
    shards = (shardset.only(shard) for shard in range(len(shardset.sizes)))
    with closing(map_in_order(count_shard, shards, min(processes, len(shardset.sizes)))) as results:
        for size, found in zip(shardset.sizes, results, strict=True):
            counts.update(found)
            progress(size)
    if (num_captions := counts.captions_per_photo.total) != shardset.num_captions:
        raise ShardError(
            "the manifest's number of captions is wrong",
            where=f"{shardset.location}/{MANIFEST}",
            got=f"{shardset.num_captions:,}",
            wanted=f"{num_captions:,}",
            do=f"See 'pvtcap shards verify {shardset.location}'.",
        )
    return ShardSetInfo(shardset.location, shardset.manifest, counts)


def count_shard(shardset: ShardSet) -> Counts:
    """Count the first shard of ``shardset``; photos are not read, their sizes are in the index."""
    counts = Counts()
    photos = shardset.load_index(0).photos
    with ShardReader(shardset) as reader:
        for number, (_, photo_bytes) in enumerate(photos):
            counts.add(reader.read_text(0, number), photo_bytes)
    return counts


def split_words(caption: str) -> list[str]:
    """The words of a caption, in lower case: what stands between spaces, without the punctuation around it.

    ``"A dog's T-shirt , wet."`` gives a, dog's, t-shirt, wet.
    """
    stripped = (word.strip(_PUNCTUATION) for word in caption.lower().split())
    return [word for word in stripped if word]
