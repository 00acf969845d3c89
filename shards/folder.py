"""pvtcap shards folder --images DIR --captions FILE --out DIR

Your own photos. FILE is .jsonl, one object a line, or .csv with the header ``file,caption``:

    {"file": "cats/1.jpg", "captions": ["a cat sleeps", "a sleeping cat"]}      also "image", "file_name"; "caption"
    cats/1.jpg,a cat sleeps

Rows of one photo are grouped. Names are relative to DIR and may not lead outside it. A sample's key and image_id are
its name without the suffix.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from pvtcap.captionfiles import read_text
from pvtcap.errors import ShardError
from pvtcap.shardwriter import Candidate, PhotoPlace, SkippedItem, run_builder

NAMES = ("file", "image", "file_name")


def candidates(args: argparse.Namespace) -> list[Candidate | SkippedItem]:
    if args.images.is_file():
        raise ShardError("--images is not a folder", where=args.images)
    photos = PhotoPlace(args.images)
    captions: dict[str, list[str]] = {}
    unusable: list[SkippedItem] = []
    for number, row in rows(args.captions):
        name = next((row[key] for key in NAMES if row.get(key)), None)
        texts = row.get("captions", row.get("caption"))
        texts = [texts] if isinstance(texts, str) else texts
        if isinstance(name, str) and isinstance(texts, list) and all(isinstance(text, str) for text in texts):
            captions.setdefault(str(PurePosixPath(name)), []).extend(texts)
        else:
            detail = json.dumps(row, ensure_ascii=False)[:80]
            unusable.append(SkippedItem(key=f"line {number}", reason="not a caption line", detail=detail))
    return [*unusable, *(candidate(name, texts, photos) for name, texts in captions.items())]


def candidate(name: str, captions: list[str], photos: PhotoPlace) -> Candidate:
    key = str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).name else name
    return Candidate(key=key, image_id=key, captions=tuple(captions), source="folder", photo=photos.find(name))


def rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The file's rows with their line numbers. Raises ShardError when it has neither of the two forms."""
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if line.strip():
                yield number, parsed(line)
    elif path.suffix.lower() == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(path)))  # no splitlines: a caption may hold U+2028
        try:
            header = set(reader.fieldnames or ())
            if not header & set(NAMES) or "caption" not in header:
                raise ShardError("wrong header", where=path, got=reader.fieldnames, wanted="file,caption")
            for row in reader:
                yield reader.line_num, row
        except csv.Error as error:  # a field of more than 128 KiB
            do = "Is a quotation mark not closed?"
            raise ShardError(f"not CSV: {error}", where=f"{path}, line {reader.line_num}", do=do) from None
    else:
        raise ShardError(
            "unknown kind of caption file", where=path, got=path.suffix or "no suffix", wanted=".jsonl or .csv"
        )


def parsed(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets, thousands deep
        row = None
    return row if isinstance(row, dict) else {"line": line}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "pvtcap shards folder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR", help="the photos")
    parser.add_argument("--captions", type=Path, required=True, metavar="FILE", help=".jsonl or .csv")
    run_builder("folder", parser, candidates, argv)


if __name__ == "__main__":
    main()
