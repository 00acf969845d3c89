"""The folder that ``pvtcap features`` fills: which shards are finished, one shard being written, the manifest last."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pvtcap.candidate import Prepared
from pvtcap.errors import ShardError
from pvtcap.shardfiles import file_size
from pvtcap.shardfolder import BUILDING
from pvtcap.shardformat import FeatureFormat, index_name
from pvtcap.shardset import FORMAT, MANIFEST, Manifest, ShardIndex, ShardSet, parse_json, read_manifest, write_json
from pvtcap.shardtar import ShardTar, shard_entry


class FeatureFolder:
    """``path`` is to hold the ``features`` of ``source``'s photos; ``build`` goes into its manifest."""

    def __init__(self, path: Path, source: ShardSet, features: FeatureFormat, build: dict[str, Any]) -> None:
        self.path, self.source, self.features, self.build = path, source, features, build

    def start(self) -> list[int]:
        """Make the folder ready; the numbers of the shards that are still to be made."""
        wanted = self._wanted()
        if (self.path / MANIFEST).exists():
            manifest = read_manifest(self.path)
            features = None if manifest.features is None else manifest.features.model_dump(mode="json")
            self._check_same({"features": features, "build": manifest.build}, wanted)
            return []
        building = self.path / BUILDING
        try:
            if building.exists():
                self._check_same(json.loads(building.read_bytes()), wanted)
            elif self.path.exists() and any(self.path.iterdir()):
                raise ShardError("the folder holds other files", where=self.path, do="Give --out a new folder.")
            else:
                write_json(building, wanted)
        except (OSError, ValueError) as error:
            raise ShardError(f"the folder cannot be used: {error}", where=self.path) from error
        return [shard for shard in range(len(self.source.sizes)) if not self._is_finished(shard)]

    def write(self, shard: int, samples: Iterator[Prepared]) -> int:
        """Make one shard; the number of its samples."""
        first = sum(self.source.sizes[:shard])
        try:
            tar = ShardTar(self._tar(shard), photo_suffix=".npy")
            try:
                for sample in samples:
                    tar.add(sample)
                tar.finish((first, first + tar.num_samples), "", [])
            except BaseException:  # Ctrl-C too
                tar.abandon()
                raise
        except OSError as error:
            do = "Finished shards stay: run the same command again and it goes on."
            raise ShardError(f"cannot write: {error.strerror or error}", where=self.path, do=do) from error
        assert tar.num_samples == self.source.sizes[shard], "the stream of samples is cut by the shards' sizes"
        return tar.num_samples

    def complete(self) -> Manifest:
        """Write the manifest. Raises ShardError when another process has changed the folder meanwhile."""
        if (self.path / MANIFEST).exists():
            return read_manifest(self.path)
        for shard in range(len(self.source.sizes)):
            if not self._is_finished(shard):
                raise ShardError("a shard is gone, or not of this source", where=self._tar(shard), do="Run it again.")
        entries = [shard_entry(self._tar(shard), self._index(shard)) for shard in range(len(self.source.sizes))]
        manifest = Manifest(
            format=FORMAT,
            name=self._name,
            num_samples=sum(entry.num_samples for entry in entries),
            num_captions=sum(entry.num_captions for entry in entries),
            shards=entries,
            build=self.build,
            features=self.features,
        )
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
        (self.path / BUILDING).unlink()
        return manifest

    @property
    def _name(self) -> str:
        return self.path.resolve().name

    def _tar(self, shard: int) -> Path:
        return self.path / f"{self._name}-{shard:06d}.tar"

    def _index(self, shard: int) -> ShardIndex:
        path = self._tar(shard).with_name(index_name(self._tar(shard).name))
        return parse_json(ShardIndex, path.read_bytes(), path)

    def _is_finished(self, shard: int) -> bool:
        """The index is written when the tar is whole; it must be of the source's samples."""
        tar = self._tar(shard)
        if file_size(tar) is None or not tar.with_name(index_name(tar.name)).exists():
            return False
        return self._index(shard).keys == self.source.load_index(shard).keys

    def _wanted(self) -> dict[str, Any]:
        return {"features": self.features.model_dump(mode="json"), "build": self.build}

    def _check_same(self, found: dict[str, Any], wanted: dict[str, Any]) -> None:
        for part in ("build", "features"):
            theirs, ours = (tree.get(part) or {} for tree in (found, wanted))
            for key in ours:
                if theirs.get(key) != ours[key]:
                    raise ShardError(
                        f"the folder holds another ShardSet: its {key} differs",
                        where=self.path,
                        got=theirs.get(key),
                        wanted=ours[key],
                        do="Give --out a new folder, or remove this one.",
                    )
