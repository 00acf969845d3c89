"""Building a ShardSet: candidates in, tars with their indexes out, the manifest last.

    builder ─▶ Candidate … ─▶ a pool prepares photos, 16 at a time ─▶ tars, strictly in candidate order

The result depends on the candidates and the options alone, byte for byte: not on the number of processes, nor on how
often the build was interrupted. A builder is a script of some seventy lines; all it needs is in this module::

    def candidates(args):
        for name, captions in ...:
            yield Candidate(name, name, captions, "mine", PhotoFile(args.images / name))

    def main(argv=None):
        parser = argparse.ArgumentParser("mine", description=__doc__)
        parser.add_argument("--images", type=Path, required=True)
        run_builder("mine", parser, candidates, argv)
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sized
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvtcap.buildreport import BuildReport, photos_progress, print_report
from pvtcap.candidate import Candidate, Result, Work, clean_key, prepare_in_order
from pvtcap.errors import ConfigError, PvtcapError, ShardError
from pvtcap.photo import BadPhoto
from pvtcap.photosource import PHOTO_SUFFIXES, PhotoBytes, PhotoFile, PhotoInZip, PhotoPlace, PhotoPlaces, PhotoSource
from pvtcap.processes import begin_server, usable_cpus
from pvtcap.shardfolder import BUILDING, ShardFolder
from pvtcap.shardset import SkippedItem, sha256_file
from pvtcap.storedphoto import Encoding, modules_for

__all__ = [
    "PHOTO_SUFFIXES",
    "BadPhoto",
    "BuildOptions",
    "BuildReport",
    "Candidate",
    "PhotoBytes",
    "PhotoFile",
    "PhotoInZip",
    "PhotoPlace",
    "PhotoPlaces",
    "PhotoSource",
    "SkippedItem",
    "add_build_options",
    "build",
    "options_from",
    "run_builder",
]


@dataclass(frozen=True)
class BuildOptions:
    """How a ShardSet is written. All but the last three shape its bytes.

    ``short_side_px`` scales photos down, never up; photos with a side below ``min_side_px``, or longer than
    ``max_aspect_ratio`` times their short side, are left out; ``drop_duplicates`` leaves out photos whose stored bytes
    have been there before. ``max_skipped`` is a fraction of the candidates. ``processes`` 0 or 1 prepares photos in
    this process.
    """

    short_side_px: int | None = None
    jpeg_quality: int = 90
    min_side_px: int = 0
    max_aspect_ratio: float | None = None
    drop_duplicates: bool = False
    samples_per_shard: int = 1000
    shard_bytes: int | None = None
    processes: int = 1
    overwrite: bool = False
    max_skipped: float = 0.1

    def __post_init__(self) -> None:
        for name in ("short_side_px", "samples_per_shard", "shard_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError("out of range", where=_option(name), got=value, wanted="1 or more")
        if not 1 <= self.jpeg_quality <= 100:
            raise ConfigError("out of range", where=_option("jpeg_quality"), got=self.jpeg_quality, wanted="1 to 100")
        for name in ("processes", "min_side_px"):
            if (value := getattr(self, name)) < 0:
                raise ConfigError("out of range", where=_option(name), got=value, wanted="0 or more")
        if self.max_aspect_ratio is not None and not self.max_aspect_ratio >= 1:
            raise ConfigError(
                "out of range", where=_option("max_aspect_ratio"), got=self.max_aspect_ratio, wanted="1 or more"
            )
        if not 0 <= self.max_skipped <= 1:
            raise ConfigError("out of range", where=_option("max_skipped"), got=self.max_skipped, wanted="0 to 1")

    @property
    def encoding(self) -> Encoding:
        return Encoding(self.short_side_px, self.jpeg_quality, self.min_side_px, self.max_aspect_ratio)

    def shaping(self) -> dict[str, object]:
        """The options that the written bytes depend on."""
        others = {"processes", "overwrite", "max_skipped"}
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in others}


# (candidates that are wanted, how to store them, processes) → what became of each one, in order
Prepare = Callable[[Iterator[Work], Encoding, int], Generator[Result, None, None]]


def build(
    candidates: Iterable[Candidate | SkippedItem],
    out: Path,
    options: BuildOptions,
    builder: Mapping[str, object],
    progress: Callable[[int], object] = lambda done: None,
    *,
    prepare: Prepare = prepare_in_order,
    names_are_unique: bool = False,
) -> BuildReport:
    """Build the ShardSet ``out`` from ``candidates``; ``builder`` (a name, arguments) goes into its manifest.

    Run again after an interruption, with equal ``candidates``, ``builder`` and options, it goes on behind the last
    finished shard. ``progress`` is called with the number of candidates just done. ``prepare`` makes samples of the
    candidates; ``names_are_unique`` vouches for their keys and image_ids: millions need not be remembered then.

    Raises ShardError when the folder cannot be used, when the disk is full (finished shards stay), and when more than
    ``options.max_skipped`` of the candidates had to be left out (nothing stays).
    """
    started = time.perf_counter()
    candidates = iter(candidates)
    first = list(itertools.islice(candidates, 1))  # a builder's complaints come before anything is touched
    shaping = {**builder, **options.shaping()}
    folder = ShardFolder(out, options.samples_per_shard, options.shard_bytes, options.drop_duplicates)
    folder.start(shaping, options.overwrite)
    num_resumed = folder.num_samples
    try:
        numbered = _numbered(itertools.chain(first, candidates), names_are_unique)
        work = (item for item in numbered if folder.wants(*item[:2]))
        with closing(prepare(work, options.encoding, options.processes)) as results:
            for number, key, result in results:
                folder.add(number, key, result)
                progress(1)
        folder.finish_last()
    except BaseException:  # Ctrl-C too
        folder.stop()
        raise
    if error := _too_many_skipped(folder, options.max_skipped):
        folder.remove()
        raise error
    manifest = folder.complete(shaping)
    seconds = time.perf_counter() - started
    return BuildReport(out, manifest, folder.examples, folder.num_candidates, num_resumed, seconds)


def _numbered(candidates: Iterable[Candidate | SkippedItem], names_are_unique: bool) -> Iterator[Work]:
    """Number the candidates, and turn each one whose key or image_id has been there before into a SkippedItem.

    That a name is taken does not depend on whether its first photo could be read, so resuming need not know.
    """
    keys: dict[str, str] = {}
    image_ids: dict[str, str] = {}
    for number, candidate in enumerate(candidates):
        item = candidate
        if isinstance(candidate, Candidate) and not names_are_unique:
            key = clean_key(candidate.key)
            for reason, seen, name in (
                ("duplicate key", keys, key),
                ("duplicate image_id", image_ids, str(candidate.image_id)),
            ):
                if name in seen and isinstance(item, Candidate):
                    item = SkippedItem(key=key, reason=reason, detail=f"{candidate.key}: same as {seen[name]}")
                seen.setdefault(name, candidate.key)
        yield number, candidate.key, item


def _too_many_skipped(folder: ShardFolder, max_skipped: float) -> ShardError | None:
    num_skipped = folder.num_candidates - folder.num_samples
    if folder.num_samples and num_skipped <= max_skipped * folder.num_candidates:
        return None
    if not folder.num_candidates:
        return ShardError("nothing to build from: no photo is named by the input", where=folder.path)
    first = ", ".join(f"{item.key} ({item.reason})" for item in itertools.islice(folder.examples.values(), 3))
    return ShardError(
        f"{num_skipped:,} of {folder.num_candidates:,} candidates had to be left out",
        where=folder.path,
        got=first,
        wanted=f"at most {max_skipped:.0%}" if folder.num_samples else "at least one sample",
        do="Mend the input, or allow more with --max-skipped.",
    )


def add_build_options(parser: argparse.ArgumentParser, defaults: BuildOptions) -> None:
    """Give a builder's parser ``--out`` and the options that all builders share."""
    group = parser.add_argument_group("what is written")

    def add(name: str, help: str, **how: Any) -> None:
        default = getattr(defaults, name)
        shown = "" if default is None or isinstance(default, bool) else " (default %(default)s)"
        group.add_argument(_option(name), default=default, help=help + shown, **how)

    group.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the ShardSet's folder; its name names the tars"
    )
    add("short_side_px", "scale photos down (never up) to this short side", type=int, metavar="N")
    add("jpeg_quality", "of photos that are encoded anew", type=int, metavar="N")
    add("min_side_px", "leave out photos with a smaller side", type=int, metavar="N")
    add("max_aspect_ratio", "leave out photos longer than this times their short side", type=float, metavar="X")
    yes_or_no = "yes" if defaults.drop_duplicates else "no"
    add(
        "drop_duplicates",
        f"leave out photos that are there already, byte for byte (default {yes_or_no})",
        action=argparse.BooleanOptionalAction,
    )
    add("samples_per_shard", "cut shards at this many samples", type=int, metavar="N")
    add("shard_bytes", "also cut shards at this size, such as 100MB", type=byte_count, metavar="SIZE")
    group.add_argument(
        "--processes",
        type=int,
        default=usable_cpus(),
        metavar="N",
        help="default: one a usable CPU, %(default)s here; the result is the same",
    )
    group.add_argument("--overwrite", action="store_true", help="build anew what is already there")
    add("max_skipped", "fail when more of the candidates is left out", type=float, metavar="FRACTION")


def options_from(args: argparse.Namespace) -> BuildOptions:
    """The BuildOptions among parsed arguments. Raises ConfigError for a value out of range."""
    return BuildOptions(**{name: getattr(args, name) for name in BuildOptions.__dataclass_fields__})


def run_builder(
    name: str,
    parser: argparse.ArgumentParser,
    candidates: Callable[[argparse.Namespace], Iterable[Candidate | SkippedItem]],
    argv: list[str] | None = None,
    *,
    defaults: BuildOptions = BuildOptions(),
    prepare: Callable[[argparse.Namespace], Prepare] = lambda args: prepare_in_order,
    names_are_unique: bool = False,
    may_change: Collection[str] = (),
) -> BuildReport:
    """A builder's ``main``: parse, build, print the tables. Exits with 2 and one line on stderr for a user's error.

    ``candidates`` gets the parsed arguments; when what it returns has a length, the progress bar has an end.
    ``may_change`` names arguments that may differ when an interrupted build goes on; for the others see ``build``.
    """
    add_build_options(parser, defaults)
    args = parser.parse_args(argv)
    try:
        options = options_from(args)
        if options.processes > 1:
            begin_server(modules_for(options.encoding))
        builder = {"builder": name, **_arguments(args, may_change)}
        how = prepare(args)
        items = candidates(args)
        total = len(items) if isinstance(items, Sized) else None
        with photos_progress(args.out.name, total) as progress:
            report = build(items, args.out, options, builder, progress, prepare=how, names_are_unique=names_are_unique)
        print_report(report)
    except PvtcapError as error:
        print(f"pvtcap: error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        kept = "finished shards are kept" if (args.out / BUILDING).exists() else "no shard was finished yet"
        print(f"pvtcap: interrupted; {kept}: run the same command again and it goes on", file=sys.stderr)
        raise SystemExit(130) from None
    return report


def byte_count(text: str) -> int:
    """``100MB`` (10^6), ``1GiB`` (2^30) or a plain number, as bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kmgt]?)(i?)b?)", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 100MB")
    number, prefix, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(prefix or " "))


def _arguments(args: argparse.Namespace, may_change: Collection[str]) -> dict[str, object]:
    """A builder's own arguments, with the checksums of the files among them: another caption file is another build."""
    shared = {"out", *BuildOptions.__dataclass_fields__, *may_change}
    own = {name: value for name, value in vars(args).items() if name not in shared}
    checksums = {f"{name}_sha256": found for name, value in own.items() if (found := _checksums(value))}
    return own | checksums


def _checksums(value: object) -> str | list[str] | None:
    """Of a file, or of each file in a list of them; None or nothing for any other argument."""
    if isinstance(value, list):
        return [found for item in value if isinstance(found := _checksums(item), str)]
    # A ZIP of photos is the one input too large to read twice; its captions tell of it.
    if not isinstance(value, Path) or not value.is_file() or value.suffix.lower() == ".zip":
        return None
    return sha256_file(value)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
