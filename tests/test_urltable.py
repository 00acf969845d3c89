"""pytest tests/test_urltable.py"""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from pvtcap.errors import ConfigError, ShardError
from pvtcap.shardset import SkippedItem
from pvtcap.urltable import UrlRow, UrlTable, parse_part

CC3M = 'a "very" bus station\thttp://a.org/1.jpg\nthe bus\thttps://b.org/2.jpg\n'
WANTED = [("a bus", "http://a.org/1"), ("a cat", "http://b.org/2"), ("a dog", "http://a.org/3")]


def rows(table: UrlTable) -> list[tuple[int, str, str]]:
    return [(row.number, row.captions[0], row.url) for row in table if isinstance(row, UrlRow)]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    "content",
    [
        "".join(f"{caption}\t{url}\n" for caption, url in WANTED),
        "".join(f"{url}\t{caption}\n" for caption, url in WANTED).rstrip("\n"),
        "\ufeffcaption\turl\r\n" + "".join(f"{caption}\t{url}\r\n" for caption, url in WANTED),
        "id\tURL\tTEXT\n" + "".join(f"7\t{url}\t{caption}\n" for caption, url in WANTED),
    ],
)
def test_columns_are_found(tmp_path: Path, content: str) -> None:
    found = rows(UrlTable([write(tmp_path / "t.tsv", content)]))
    assert [row[1:] for row in found] == WANTED


def test_quotes_are_part_of_a_caption(tmp_path: Path) -> None:
    assert rows(UrlTable([write(tmp_path / "t.tsv", CC3M)]))[0] == (0, 'a "very" bus station', "http://a.org/1.jpg")


def test_parquet_and_several_files(tmp_path: Path) -> None:
    captions, urls = zip(*WANTED, strict=True)
    for name in ("a.parquet", "b.parquet"):
        table = pyarrow.table({"image_url": urls, "caption": captions, "similarity": [0.1, 0.2, 0.3]})
        pyarrow.parquet.write_table(table, tmp_path / name)
    table = UrlTable([tmp_path / "a.parquet", tmp_path / "b.parquet"])
    assert [row[1:] for row in rows(table)] == WANTED * 2
    assert [row[0] for row in rows(table)] == list(range(6))
    assert len(table) == 6


def test_parquet_with_nulls_and_lists(tmp_path: Path) -> None:
    content = {"url": ["http://a/1", None, "http://a/3"], "text": [["one", "two"], ["x"], None]}
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "t.parquet")
    first, *others = UrlTable([tmp_path / "t.parquet"])
    assert first == UrlRow(0, ("one", "two"), "http://a/1")
    assert [isinstance(row, SkippedItem) for row in others] == [True, True]


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_parts_share_the_rows(tmp_path: Path, n: int) -> None:
    path = write(tmp_path / "t.tsv", "".join(f"caption {i}\thttp://a.org/{i}\n" for i in range(10)))
    parts = [UrlTable([path], (i, n)) for i in range(1, n + 1)]
    assert [len(part) for part in parts] == [len(rows(part)) for part in parts]
    assert sorted(row for part in parts for row in rows(part)) == rows(UrlTable([path]))


def test_bad_lines_are_told_of(tmp_path: Path) -> None:
    path = write(tmp_path / "t.tsv", b"a\thttp://a.org/1\nno tab here\ncaf\xe9\thttp://a.org/2\nb\thttp://a.org/3\n")
    found = list(UrlTable([path]))
    assert [(item.key, item.detail) for item in found if isinstance(item, SkippedItem)] == [
        ("row 1", "no tab here"),
        ("row 2", "not UTF-8: invalid continuation byte"),
    ]
    assert [row[0] for row in rows(UrlTable([path]))] == [0, 3]


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("t.tsv", "one column\n", "cannot tell which column is the URL"),
        ("t.tsv", "a\tb\n", "cannot tell which column is the URL"),
        ("t.tsv", "http://a.org/1\thttp://a.org/2\n", "cannot tell which column is the URL"),
        ("t.parquet", "no parquet", "not a readable Parquet file"),
    ],
)
def test_tables_that_are_none(tmp_path: Path, name: str, content: str, complaint: str) -> None:
    with pytest.raises(ShardError, match=complaint):
        list(UrlTable([write(tmp_path / name, content)]))


def test_tables_that_are_missing_or_have_other_columns(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such table"):
        UrlTable([tmp_path / "gone.tsv"])
    path = write(tmp_path / "t.tsv", "link\twords\nhttp://a.org/1\ta cat\n")
    assert rows(UrlTable([path], url_column="LINK", caption_column="words")) == [(0, "a cat", "http://a.org/1")]
    pyarrow.parquet.write_table(pyarrow.table({"a": ["b"]}), tmp_path / "t.parquet")
    with pytest.raises(ShardError, match="no column of URLs"):
        list(UrlTable([tmp_path / "t.parquet"]))


@pytest.mark.parametrize("text", ["0/4", "5/4", "1", "a/b", "1/0", "-1/4", ""])
def test_parts_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="--part: not a part"):
        parse_part(text)
