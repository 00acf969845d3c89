"""pvtcap shards index DIR: a ShardSet out of tars that are there already, without rewriting or moving them.

    DIR/00000.tar                    stays as it is: KEY.jpg|jpeg|png|webp with KEY.txt and/or KEY.json, as img2dataset,
                                     open_clip and WebDataset's own writer make them
    DIR/00000.index.json             where its photos lie
    DIR/00000.texts.jsonl            its captions, a line a sample
    DIR/skipped.jsonl, manifest.json

With --out OUT all that is written to OUT, where each tar has a symbolic link. A sample's key and image_id are the
members' name up to the first dot of its base name. When tars share keys, every key stands behind its tar's name:
00000/000012. Captions are KEY.txt, KEY.0.txt, … and the "captions", "caption" or "text" of KEY.json, each once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from pvtcap.buildreport import BuildReport, photos_progress, print_report
from pvtcap.errors import ConfigError, ShardError
from pvtcap.processes import map_in_order, usable_cpus
from pvtcap.shardfolder import BUILDING, SKIPPED
from pvtcap.shardformat import MAX_FILE_BYTES, Foreign
from pvtcap.shardset import FORMAT, MANIFEST, Manifest, ShardEntry, SkippedItem, write_json
from pvtcap.tarsamples import TarFindings, index_tar

BUILDER = "index"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_WRITTEN = ("*.index.json", "*.texts.jsonl", SKIPPED)


@dataclass(frozen=True)
class IndexOptions:
    """``max_skipped`` is a fraction, of the samples as of the tars. ``decode`` reads every photo's every pixel."""

    name: str | None = None
    processes: int = 1
    max_skipped: float = 0.1
    decode: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.processes < 0:
            raise ConfigError("out of range", where="--processes", got=self.processes, wanted="0 or more")
        if not 0 <= self.max_skipped <= 1:
            raise ConfigError("out of range", where="--max-skipped", got=self.max_skipped, wanted="0 to 1")


def run(words: list[str]) -> None:
    """The command ``pvtcap shards index`` with its words: index, print the tables."""
    parser = argparse.ArgumentParser(
        "pvtcap shards index", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = IndexOptions(processes=usable_cpus())
    parser.add_argument("tars", type=Path, metavar="DIR", help="the folder of tars")
    parser.add_argument("--out", type=Path, metavar="OUT", help="write here instead of in DIR, with links to the tars")
    parser.add_argument("--name", help="of the ShardSet, in scores and samples (default: the folder's)")
    parser.add_argument(
        "--processes", type=int, default=defaults.processes, metavar="N", help="default %(default)s, one a usable CPU"
    )
    parser.add_argument(
        "--max-skipped",
        type=float,
        default=defaults.max_skipped,
        metavar="FRACTION",
        help="fail when more of the samples, or of the tars, is left out (default %(default)s)",
    )
    parser.add_argument(
        "--decode", action="store_true", help="decode every photo, and leave out those that are damaged"
    )
    parser.add_argument("--overwrite", action="store_true", help="index anew what is already indexed")
    args = vars(parser.parse_args(words))
    tars, out = args.pop("tars"), args.pop("out")
    options = IndexOptions(**args)
    with photos_progress(tars.resolve().name, None) as progress:
        report = index_tars(tars, out or tars, options, progress)
    print_report(report)
    for note in _notes(report.manifest):
        Console(highlight=False, markup=False).print(note)


def index_tars(
    tars: Path, out: Path, options: IndexOptions, progress: Callable[[int], object] = lambda done: None
) -> BuildReport:
    """Index all ``*.tar`` of folder ``tars``; ``out`` may be the same folder. ``progress`` counts samples.

    Nothing is complete before its manifest, which comes last. Raises ShardError, and leaves nothing, when the folder
    cannot be used or more than ``options.max_skipped`` had to be left out.
    """
    started = time.perf_counter()
    found, unusable = _find(tars)
    place = _Place(out, linked=not (out.exists() and out.samefile(tars)))
    try:
        place.start(options.overwrite)
        try:
            findings = list(_index_each(found, place, options, progress))
            num_candidates = _check_skipped(findings, unusable, tars, options.max_skipped)
            skipped = unusable + [item for each in findings for item in each.skipped]
            manifest = place.complete(found, findings, skipped, options)
        except BaseException:  # Ctrl-C too
            place.remove()
            raise
    except OSError as error:
        do = "Make room, or give --out a folder that you may write to, and run it again."
        raise ShardError(f"cannot index: {error.strerror}", where=error.filename or out, do=do) from error
    examples = {item.reason: item for item in reversed(skipped)}
    return BuildReport(out, manifest, examples, num_candidates, 0, time.perf_counter() - started)


def _find(folder: Path) -> tuple[list[Path], list[SkippedItem]]:
    """The tars in order of their names, and what looks like one and cannot be used."""
    if not folder.is_dir():
        raise ShardError("no such folder of tars", where=folder)
    names = sorted(path.name for path in folder.iterdir())
    unusable = [
        SkippedItem(key=ascii(name), reason="unusable tar", detail="a compressed tar has no byte offsets: unpack it")
        for name in names
        if name.endswith(_COMPRESSED)
    ]
    tars = [name for name in names if name.endswith(".tar")]
    if not tars:
        do = f"Unpack {unusable[0].key} and the others." if unusable else None
        raise ShardError("no tar in this folder", where=folder, wanted="*.tar", do=do)
    odd = [
        SkippedItem(key=ascii(n), reason="unusable tar", detail="its name is too long or unprintable")
        for n in tars
        if not _plain(n)
    ]
    return [folder / name for name in tars if _plain(name)], unusable + odd


def _plain(name: str) -> bool:
    return name.isprintable() and "\\" not in name and len(name.encode()) <= MAX_FILE_BYTES


def _index_each(
    tars: list[Path], place: _Place, options: IndexOptions, progress: Callable[[int], object]
) -> Iterator[TarFindings]:
    """Index tars, one at a time in each process, and give what was found in their order."""
    task = partial(index_tar, out=place.path, source=options.name or place.path.resolve().name, decode=options.decode)
    with closing(map_in_order(task, tars, min(options.processes, len(tars)))) as findings:
        yield from _counted(findings, progress)


def _counted(findings: Iterator[TarFindings], progress: Callable[[int], object]) -> Iterator[TarFindings]:
    for each in findings:
        progress(0 if each.entry is None else each.entry.num_samples)
        yield each


def _check_skipped(findings: list[TarFindings], unusable: list[SkippedItem], tars: Path, max_skipped: float) -> int:
    """The number of candidates, samples and others. Raises ShardError when too much was left out."""
    no_tars = [*unusable, *(each.skipped[-1] for each in findings if each.entry is None)]
    no_samples = [item for each in findings for item in each.skipped if item.reason != "unusable tar"]
    num_samples = sum(each.entry.num_samples for each in findings if each.entry is not None)
    for what, left_out, total in (
        ("tars", no_tars, len(findings) + len(unusable)),
        ("samples", no_samples, num_samples + len(no_samples)),
    ):
        if len(left_out) > max_skipped * total or (what == "tars" and not num_samples):
            first = ", ".join(f"{item.key} ({item.detail or item.reason})" for item in left_out[:3])
            raise ShardError(
                f"{len(left_out):,} of {total:,} {what} had to be left out",
                where=tars,
                got=first,
                wanted=f"at most {max_skipped:.0%}" if num_samples else "at least one sample",
                do="Mend them or move them away, or allow more with --max-skipped.",
            )
    return num_samples + len(no_samples)


class _Place:
    """The folder that is written to; ``linked`` when it is not the tars' own and has links to them."""

    def __init__(self, path: Path, linked: bool) -> None:
        self.path, self.linked = path, linked
        self.made = False

    def start(self, overwrite: bool) -> None:
        """Make the folder ready. Raises ShardError when it holds what this command did not write."""
        if not self.path.exists():
            self.path.mkdir(parents=True)
            self.made = True
        marks = [mark for mark in (self.path / MANIFEST, self.path / BUILDING) if mark.exists()]
        do = "Give --out another folder."
        if any(_builder(mark) != BUILDER for mark in marks):
            raise ShardError("the folder holds a ShardSet, or a build, of another kind", where=self.path, do=do)
        if not marks and (foreign := sorted(file.name for file in self._in_the_way())):
            raise ShardError("the folder holds other files", where=self.path, got=", ".join(foreign[:3]), do=do)
        if (self.path / MANIFEST).exists() and not overwrite:
            raise ShardError("already indexed", where=self.path, do="Use it, or index it anew with --overwrite.")
        write_json(self.path / BUILDING, {"builder": BUILDER})
        (self.path / MANIFEST).unlink(missing_ok=True)  # first, so that at no moment it vouches for files that are gone
        self._remove_written()

    def complete(
        self, tars: list[Path], findings: list[TarFindings], skipped: list[SkippedItem], options: IndexOptions
    ) -> Manifest:
        """Link the tars, write skipped.jsonl and, last, the manifest."""
        left_alone = sum((each.left_alone for each in findings), Counter[str]())
        entries = [each.entry for each in findings if each.entry is not None]
        hashes = np.concatenate([each.key_hashes for each in findings if each.entry is not None])
        shared = len(np.unique(hashes)) < len(hashes)
        manifest = Manifest(
            format=FORMAT,
            name=options.name or self.path.resolve().name,
            num_samples=sum(entry.num_samples for entry in entries),
            num_captions=sum(entry.num_captions for entry in entries),
            shards=[_prefixed(entry) for entry in entries] if shared else entries,
            skipped=dict(sorted(Counter(item.reason for item in skipped).items())),
            build={"builder": BUILDER, "decode": options.decode, "left_alone": dict(left_alone.most_common())},
        )
        used = {entry.file for entry in entries}
        for tar in tars if self.linked else ():
            if tar.name in used:
                (self.path / tar.name).symlink_to(tar.resolve())
        partial_file = self.path / f"{SKIPPED}.partial"
        with partial_file.open("w", encoding="utf-8") as file:
            file.writelines(item.model_dump_json() + "\n" for item in skipped)
        partial_file.replace(self.path / SKIPPED)
        write_json(self.path / MANIFEST, manifest.model_dump(mode="json"))
        (self.path / BUILDING).unlink()
        return manifest

    def remove(self) -> None:
        """Remove everything that was written here, the folder too if it was made."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        self._remove_written()
        for name in (MANIFEST, BUILDING):
            (self.path / f"{name}.partial").unlink(missing_ok=True)
        (self.path / BUILDING).unlink(missing_ok=True)
        if self.made and not any(self.path.iterdir()):
            self.path.rmdir()

    def _remove_written(self) -> None:
        for file in self._written():
            file.unlink()
        for tar in self.path.glob("*.tar") if self.linked else ():
            if tar.is_symlink():
                tar.unlink()

    def _in_the_way(self) -> list[Path]:
        started = f"{BUILDING}.partial"  # by a run that was killed at once
        return [file for file in self.path.iterdir() if file.name != started] if self.linked else self._written()

    def _written(self) -> list[Path]:
        return [file for pattern in _WRITTEN for end in ("", ".partial") for file in self.path.glob(pattern + end)]


def _builder(mark: Path) -> object:
    """Which builder wrote a manifest or a building.json; None when that cannot be told."""
    try:
        content = json.loads(mark.read_bytes())
        return (content.get("build", {}) if mark.name == MANIFEST else content).get("builder")
    except (ValueError, AttributeError, RecursionError):
        return None


def _prefixed(entry: ShardEntry) -> ShardEntry:
    assert entry.foreign is not None
    prefix = entry.file.removesuffix(".tar") + "/"
    foreign = Foreign.model_validate({**entry.foreign.model_dump(), "key_prefix": prefix})
    return entry.model_copy(update={"foreign": foreign})


def _notes(manifest: Manifest) -> Iterator[str]:
    if left_alone := manifest.build["left_alone"]:
        kinds = ", ".join(f"{kind} {times:,}" for kind, times in list(left_alone.items())[:8])
        yield f"{sum(left_alone.values()):,} members were left alone: {kinds}."
    if manifest.shards[0].foreign is not None and (prefix := manifest.shards[0].foreign.key_prefix):
        yield f"Tars share keys, so each key stands behind its tar's name: {prefix}KEY."
