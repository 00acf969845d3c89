"""pvtcap shards conceptual-captions --tsv Train_GCC-training.tsv --short-side-px 384 --out DIR

Conceptual Captions (Sharma et al., 2018; CC12M: Changpinyo et al., 2021), SBU, and any other table of captions and
URLs, TSV or Parquet. The photos are downloaded: many at a time, never more than --per-host from one host, each with
time-outs and retries. Sites that forbid it (X-Robots-Tag: noai and the like) are obeyed; URLs that lead to private
addresses are refused. Many links are dead: what did not come is in skipped.jsonl with its reason, and counted by
reason and host in report.json.

Killed at any moment and started again, it goes on behind the last finished shard. ``--part i/n`` builds one of n parts,
each a ShardSet of its own, as a Slurm array does on many nodes:

    #SBATCH --array=1-16
    pvtcap shards conceptual-captions --tsv Train_GCC-training.tsv --part $SLURM_ARRAY_TASK_ID/16 \\
        --short-side-px 384 --contact you@example.org --out data/cc3m-$SLURM_ARRAY_TASK_ID
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pvtcap.addresses import parse_networks
from pvtcap.download import PhotoAtUrl, download_in_order
from pvtcap.errors import ConfigError
from pvtcap.fetch import FetchOptions
from pvtcap.shardset import SkippedItem, write_json
from pvtcap.shardwriter import BuildOptions, BuildReport, Candidate, Prepare, byte_count, run_builder
from pvtcap.urltable import UrlRow, UrlTable, parse_part

DEFAULTS = BuildOptions(min_side_px=64, max_aspect_ratio=4.0, drop_duplicates=True, max_skipped=1.0)
NETWORK = ("connections", "per_host", "timeout_s", "retries", "contact")
HOSTS_SHOWN = 15


class Rows:
    """A table's rows as candidates: key and image_id are the row's number, whatever the part."""

    def __init__(self, table: UrlTable, source: str) -> None:
        self.table, self.source = table, source

    def __len__(self) -> int:
        return len(self.table)

    def __iter__(self) -> Iterator[Candidate | SkippedItem]:
        for row in self.table:
            yield row if isinstance(row, SkippedItem) else self.candidate(row)

    def candidate(self, row: UrlRow) -> Candidate:
        return Candidate(f"{row.number:09d}", row.number, row.captions, self.source, PhotoAtUrl(row.url), row.url)


def candidates(args: argparse.Namespace) -> Rows:
    return Rows(table(args), args.source)


def table(args: argparse.Namespace) -> UrlTable:
    return UrlTable(args.tsv or args.parquet, parse_part(args.part), args.url_column, args.caption_column)


def downloading(args: argparse.Namespace) -> Prepare:
    for name in ("connections", "per_host", "timeout_s", "retries", "max_download"):
        value, least = getattr(args, name), 0 if name == "retries" else 1
        if value < least:
            where = "--" + name.replace("_", "-")
            raise ConfigError("out of range", where=where, got=value, wanted=f"{least} or more")
    networks = args.allow_private_addresses
    options = FetchOptions(
        connections=args.connections,
        per_host=args.per_host,
        timeout_s=args.timeout_s,
        connect_timeout_s=min(args.timeout_s, FetchOptions.connect_timeout_s),
        retries=args.retries,
        max_bytes=args.max_download,
        contact=args.contact,
        honour_noai=not args.ignore_noai,
        allowed_networks=() if networks is None else parse_networks(networks),
    )
    return partial(download_in_order, options=options)


def host_of(url: str) -> str:
    try:
        return urlsplit(url.strip()).hostname or "no host"
    except ValueError:
        return "no host"


def report_hosts(args: argparse.Namespace, report: BuildReport) -> None:
    """Count rows and failures by host, write report.json beside the shards, and show the hosts that failed most."""
    rows: Counter[str] = Counter(host_of(row.url) for row in table(args) if isinstance(row, UrlRow))
    failures: defaultdict[str, Counter[str]] = defaultdict(Counter)
    with (args.out / "skipped.jsonl").open(encoding="utf-8") as lines:
        for item in map(json.loads, lines):
            if "#" not in item["key"] and not item["key"].startswith("row "):  # one caption of several; no URL at all
                failures[host_of(item["detail"].partition(" ")[0])][item["reason"]] += 1
    share = report.manifest.num_samples / max(1, report.num_candidates)
    hosts = {
        host: {"rows": count, "stored": count - failures[host].total(), "failures": dict(failures[host])}
        for host, count in rows.most_common()
    }
    write_json(
        args.out / "report.json",
        {
            "rows": report.num_candidates,
            "stored": report.manifest.num_samples,
            "success_share": share,
            "failures": report.manifest.skipped,
            "hosts": hosts,
        },
    )
    console = Console(highlight=False)
    shown = Table(title=f"hosts that failed most (all {len(hosts):,}: report.json)", title_justify="left")
    shown.add_column("host", overflow="fold")
    for column in ("rows", "stored", "failed"):
        shown.add_column(column, justify="right")
    shown.add_column("why, most often", overflow="fold")
    for host, counts in sorted(failures.items(), key=lambda pair: -pair[1].total())[:HOSTS_SHOWN]:
        failed, why = counts.total(), ", ".join(f"{reason} ({n:,})" for reason, n in counts.most_common(3))
        shown.add_row(Text(host), f"{rows[host]:,}", f"{rows[host] - failed:,}", f"{failed:,}", Text(why))
    if failures:
        console.print(shown)
    console.print(f"{report.manifest.num_samples:,} of {report.num_candidates:,} rows became samples: {share:.1%}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "pvtcap shards conceptual-captions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tables = parser.add_mutually_exclusive_group(required=True)
    tables.add_argument("--tsv", type=Path, nargs="+", metavar="FILE", help="caption<TAB>url or url<TAB>caption")
    tables.add_argument("--parquet", type=Path, nargs="+", metavar="FILE", help="with columns such as url, caption")
    parser.add_argument("--url-column", metavar="NAME", help="where the header or the schema has other names")
    parser.add_argument("--caption-column", metavar="NAME")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="only part I of N, such as 3/16")
    parser.add_argument("--source", default="conceptual_captions", metavar="NAME", help="stored with each sample")
    net = parser.add_argument_group("downloading")
    default = FetchOptions()
    net.add_argument("--contact", default=default.contact, metavar="MAIL|URL", help="yours, shown to the sites")
    net.add_argument("--connections", type=int, default=default.connections, metavar="N", help="default %(default)s")
    net.add_argument("--per-host", type=int, default=default.per_host, metavar="N", help="default %(default)s")
    net.add_argument("--timeout-s", type=float, default=default.timeout_s, metavar="S", help="default %(default)s")
    net.add_argument("--retries", type=int, default=default.retries, metavar="N", help="default %(default)s")
    net.add_argument(
        "--max-download", type=byte_count, default=default.max_bytes, metavar="SIZE", help="of a photo, default 50MB"
    )
    net.add_argument("--ignore-noai", action="store_true", help="take photos that their sites refuse to machines")
    net.add_argument(
        "--allow-private-addresses",
        nargs="*",
        metavar="NETWORK",
        help="connect to 127.0.0.1, 10.0.0.0/8 and the like too: these networks, or all",
    )
    report = run_builder(
        "conceptual_captions",
        parser,
        candidates,
        argv,
        defaults=DEFAULTS,
        prepare=downloading,
        names_are_unique=True,
        may_change=NETWORK,
    )
    report_hosts(parser.parse_args(argv), report)


if __name__ == "__main__":
    main()
