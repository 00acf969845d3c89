"""Tables of captions and URLs, as Conceptual Captions (3M, 12M) and SBU come: TSV without quoting, or Parquet.

    a very typical bus station<TAB>http://lh6.ggpht.com/-IvRtNLNcG8o/…       CC3M: caption, URL, no header
    https://chestertoncommunity.com/…<TAB>Christmas gifts                    CC12M: URL, caption, no header

Rows are numbered through all files of a table, and read one by one: a table may be larger than memory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pvtcap.errors import ConfigError, ShardError
from pvtcap.shardset import SkippedItem

URL_NAMES = ("url", "image_url", "photo_url", "image")
CAPTION_NAMES = ("caption", "text", "captions", "alt_text", "title")
_COUNT_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class UrlRow:
    number: int
    captions: tuple[str, ...]
    url: str


class UrlTable:
    """Row ``number`` belongs to part ``i`` of ``n`` when number % n is i - 1, so every part has its share of each host.

    Columns are found by their names or, without a header, by which of two holds URLs. Raises ShardError for a file
    that has no such columns.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        part: tuple[int, int] = (1, 1),
        url_column: str | None = None,
        caption_column: str | None = None,
    ) -> None:
        self.paths, self.part = list(paths), part
        self._url_names = (url_column,) if url_column else URL_NAMES
        self._caption_names = (caption_column,) if caption_column else CAPTION_NAMES
        for path in self.paths:
            if not path.is_file():
                raise ShardError("no such table of captions and URLs", where=path)
        self._length: int | None = None

    def __len__(self) -> int:
        """Rows of this part (in a TSV: lines), counted once."""
        if self._length is None:
            total = sum(_num_rows(path) for path in self.paths)
            i, n = self.part
            self._length = len(range(i - 1, total, n))
        return self._length

    def __iter__(self) -> Iterator[UrlRow | SkippedItem]:
        first, step = self.part[0] - 1, self.part[1]
        number = -1
        for path in self.paths:
            rows = self._parquet_rows(path) if is_parquet(path) else self._tsv_rows(path)
            for row in rows:
                number += 1
                if number % step == first:
                    if isinstance(row, str):
                        yield SkippedItem(key=f"row {number}", reason="not a caption line", detail=row)
                    else:
                        yield UrlRow(number, *row)

    def _tsv_rows(self, path: Path) -> Iterator[tuple[tuple[str, ...], str] | str]:
        with path.open("rb") as file:
            columns = None
            for raw in file:
                try:
                    line = raw.decode("utf-8-sig" if columns is None else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    yield f"not UTF-8: {error.reason}"
                    continue
                cells = line.split("\t")
                if columns is None:
                    columns, is_header = self._columns(path, cells)
                    if is_header:
                        continue
                if len(cells) <= max(columns):
                    yield line[:80]
                else:
                    yield (cells[columns[0]],), cells[columns[1]]

    def _columns(self, path: Path, cells: list[str]) -> tuple[tuple[int, int], bool]:
        """(caption's column, URL's column), and whether ``cells`` is a header."""
        names = [cell.strip().lower() for cell in cells]
        url = next((names.index(name.lower()) for name in self._url_names if name.lower() in names), None)
        caption = next((names.index(name.lower()) for name in self._caption_names if name.lower() in names), None)
        if url is not None and caption is not None:
            return (caption, url), True
        looks = [bool(re.match(r"https?://", cell.strip())) for cell in cells]
        if len(cells) == 2 and sum(looks) == 1:
            return (looks.index(False), looks.index(True)), False
        raise ShardError(
            "cannot tell which column is the URL and which the caption",
            where=path,
            got=repr("\t".join(cells)[:80]),
            wanted="two columns, or a header such as caption<TAB>url",
            do="Name them with --url-column and --caption-column.",
        )

    def _parquet_rows(self, path: Path) -> Iterator[tuple[tuple[str, ...], str] | str]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names = {name.lower(): name for name in file.schema_arrow.names}
                url = next((names[name.lower()] for name in self._url_names if name.lower() in names), None)
                caption = next((names[name.lower()] for name in self._caption_names if name.lower() in names), None)
                if url is None or caption is None:
                    raise ShardError(
                        "no column of URLs, or none of captions",
                        where=path,
                        got=", ".join(names.values()),
                        do="Name them with --url-column and --caption-column.",
                    )
                for batch in file.iter_batches(4096, columns=[url, caption]):
                    yield from map(_parquet_row, _values(batch[url]), _values(batch[caption]))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # UnicodeDecodeError: a column's name
            raise ShardError(f"not a readable Parquet file: {error}", where=path) from None


def parse_part(text: str) -> tuple[int, int]:
    """``3/16`` as (3, 16). Raises ConfigError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(
            "not a part",
            where="--part",
            got=text,
            wanted="1/16 to 16/16, for example",
            do="With Slurm: #SBATCH --array=1-16 and --part $SLURM_ARRAY_TASK_ID/16.",
        )
    return int(match[1]), int(match[2])


def is_parquet(path: Path) -> bool:
    return path.suffix.lower() in (".parquet", ".pq")


def _values(column: Any) -> list[object]:
    """A Parquet column's. Its text need not be UTF-8, which Arrow does not look at: then it is no text."""

    def value(scalar: Any) -> object:
        try:
            return scalar.as_py()
        except UnicodeDecodeError:
            return b"not UTF-8"

    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [value(scalar) for scalar in column]


def _parquet_row(url: object, caption: object) -> tuple[tuple[str, ...], str] | str:
    captions = caption if isinstance(caption, list) else [caption]
    if not isinstance(url, str) or not all(isinstance(text, str) for text in captions):
        return f"url {url!r:.40}, caption {caption!r:.40}"
    return tuple(captions), url


def _num_rows(path: Path) -> int:
    if is_parquet(path):
        import pyarrow
        import pyarrow.parquet

        try:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ShardError(f"not a readable Parquet file: {error}", where=path) from None
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(_COUNT_BLOCK), b""))
