"""What ``pvtcap shards`` does with a ShardSet that is there: a function a word, with the words behind it.

Like the command line itself, this module imports what a command needs inside the command.
"""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import typer

from pvtcap.errors import ConfigError


class _Parser(argparse.ArgumentParser):
    """A mistake in the words is one line, like every mistake of a user."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where=self.prog, do=f"See '{self.prog} --help'.")


def verify(words: list[str]) -> None:
    """pvtcap shards verify DIR: read every byte, decode every photo, compare every number with the manifest.

    Exit code 0: nothing is wrong. 1: the table (or JSON) says what is. 2: there is no ShardSet to verify, or its
    manifest is damaged; one line on stderr, and nothing on stdout.

    --json prints one object: path, num_shards, num_samples (as the manifest counts them), bytes_read (of the tars that
    were read to their last byte), problems (a list of {shard, key, problem}; key is empty when it is a whole file's),
    ok (true when there is no problem).
    """
    parser = _parser("verify", verify)
    args = parser.parse_args(words)
    processes = _processes(args)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pvtcap import shardverify
    from pvtcap.buildreport import photos_progress
    from pvtcap.shardset import ShardSet

    with photos_progress("verify", ShardSet.at(args.path).num_samples) as progress:
        found = shardverify.inspect(args.path, processes, progress)
    if args.json:
        typer.echo(json.dumps({"path": str(args.path), **asdict(found), "ok": not found.problems}, indent=1))
    elif not found.problems:
        typer.echo(f"{args.path}: every byte read, nothing wrong")
    else:
        table = Table("shard", "key", "problem", title=Text(f"{len(found.problems):,} problems in {args.path}"))
        for problem in found.problems:
            # Text, not str: rich would read a bracket in a name as markup.
            table.add_row(Text(problem.shard), Text(problem.key), Text(problem.problem))
        Console().print(table)
    if found.problems:
        raise typer.Exit(1)


def info(words: list[str]) -> None:
    """pvtcap shards info DIR: what is in a ShardSet, counted from its texts and indexes; no photo is decoded for it.

    With --out, also two pictures: contact_sheet.png, photos spread evenly over the ShardSet with their captions (not
    of a ShardSet of features), and histograms.png. Nothing is ever written into the ShardSet.

    A word is what stands between spaces, without the punctuation around it, in lower case: "T-shirt," is t-shirt, and
    a dash by itself is none. Medians and p95 are nearest ranks: values that occur.
    """
    from pvtcap.shardinfo import JSON_KEYS

    keys = "".join(f"\n  {names}:\n      {what}" for names, what in JSON_KEYS.items())
    distribution = "A distribution is {min, mean, median, p95, max, counts: pairs [value, how often]}."
    features = "\n  features:\n      only of a ShardSet of features: what its manifest says of them"
    parser = _parser("info", info, f"--json prints one object. {distribution}{keys}{features}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="draw contact_sheet.png and histograms.png there")
    args = parser.parse_args(words)
    processes = _processes(args)
    from rich.console import Console

    from pvtcap import infopictures
    from pvtcap.buildreport import photos_progress
    from pvtcap.infotable import info_tables
    from pvtcap.shardinfo import collect
    from pvtcap.shardset import ShardSet

    shardset = ShardSet.open(args.path)
    if args.out is not None:
        infopictures.check_out(shardset, args.out)
    with photos_progress("info", shardset.num_samples) as progress:
        found = collect(shardset, processes, progress)
    if args.json:
        typer.echo(json.dumps(found.as_json(), indent=1))
    else:
        console = Console(highlight=False)
        for table in info_tables(found):
            console.print(table)
    if args.out is not None:
        for picture in infopictures.draw(shardset, found, args.out):
            typer.echo(f"drawn: {picture}", err=True)
        if shardset.manifest.features is not None:
            typer.echo("no contact sheet: these are features, and their photos are elsewhere", err=True)


def index(words: list[str]) -> None:
    """pvtcap shards index DIR: make a ShardSet of the tars that are there; see ``shardindex``."""
    from pvtcap import shardindex

    shardindex.run(words)


def join(words: list[str]) -> None:
    """pvtcap shards join PART … --out OUT: one ShardSet of several; see ``shardjoin``."""
    from pvtcap import shardjoin

    shardjoin.run(words)


COMMANDS: dict[str, Callable[[list[str]], None]] = {"index": index, "info": info, "join": join, "verify": verify}


def _parser(name: str, command: Callable[[list[str]], None], epilog: str | None = None) -> _Parser:
    """The words that all commands take."""
    parser = _Parser(
        f"pvtcap shards {name}",
        description=inspect.getdoc(command),
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="DIR", help="the ShardSet's folder, or its URL")
    parser.add_argument("--json", action="store_true", help="print one JSON object, and nothing else, on stdout")
    parser.add_argument("--processes", type=int, metavar="N", help="default: one a usable CPU")
    return parser


def _processes(args: argparse.Namespace) -> int:
    from pvtcap.processes import usable_cpus

    if args.processes is not None and args.processes < 0:
        raise ConfigError("out of range", where="--processes", got=args.processes, wanted="0 or more")
    return usable_cpus() if args.processes is None else int(args.processes)
