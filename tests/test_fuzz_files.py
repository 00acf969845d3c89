"""pytest tests/test_fuzz_files.py: damaged files of every kind that a user hands over are read, or are one line.

Shards have a test of their own (test_fuzz_shards.py), and ZIPs of photos (test_photosource.py).
"""

from __future__ import annotations

import json
import random
import runpy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save_file
from test_builders import SHARDS

from pvtcap import captionfiles, cocofiles, jsonfile, recipes, runlog
from pvtcap.comparison import PerImage, differences
from pvtcap.configfile import load
from pvtcap.errors import ConfigError, PvtcapError
from pvtcap.scoretable import read_report, reasons, score_table
from pvtcap.text import CaptionTokenizer
from pvtcap.urltable import UrlTable
from pvtcap.weightfiles import read_weights

NUM_DAMAGED = 300

# What is JSON, or nearly, and not what anybody wants.
OTHER_JSON = (
    *(b"", b"1", b"[]", b"{}", b"null", b'"x"', b"[null]", b"[[]]", b"[{}]", b"NaN", b"\xff", b"\xef\xbb\xbf{}"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b'{"annotations": null}', b'{"images": [], "weight_map": [1]}'),
)
# And of YAML: brackets, an impossible date, a long number, keys that are none, a list for a section, Windows' text.
OTHER_YAML = (
    *(b"[" * 5000, b"a: 2026-13-45", b"run: " + b"1" * 9000, b"1: 2", b"1:\n 2: 3", b"data:\n 1: 2", b"null: 3"),
    *(b"data:\n - 1", b"? [a]\n: b", b"a: &a [*a]", b"run: !!timestamp 2026-13-45", b"--- 1\n--- 2"),
    *("# café".encode("latin-1"), "run: {}".encode("utf-16")),
)


def damaged(whole: bytes, seed: int) -> Iterator[bytes]:
    """Copies with other bytes, cut short, with a piece missing, or with one too many."""
    chance = random.Random(seed)
    for _ in range(NUM_DAMAGED):
        copy = bytearray(whole)
        at = chance.randrange(len(copy))
        match chance.randrange(6):
            case 0:
                del copy[at:]
            case 1:
                del copy[at : at + chance.randrange(1, 40)]
            case 2:
                copy[at:at] = chance.randbytes(chance.randrange(1, 9))
            case _:
                for place in chance.sample(range(len(copy)), min(len(copy), chance.choice((1, 1, 2, 4)))):
                    copy[place] = chance.choice((0, 0xFF, ord('"'), ord("{"), chance.randrange(256)))
        yield bytes(copy)


def read_table(path: Path) -> None:
    table = UrlTable([path])
    len(table)
    list(table)


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in runpy.run_path(str(SHARDS / "folder.py"))["rows"](path)]


def read_scores(path: Path) -> None:
    report = read_report(path.parent)
    score_table({"a": report})
    reasons({"a": report})


def read_per_image(path: Path) -> None:
    one = PerImage.read(path.parent, {"CIDEr": 1.0})
    differences(one, one, resamples=3)


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(path: Path, compression: str) -> bytes:
    table = pa.table({name: [f"{name} {number}" for number in range(40)] for name in ("url", "caption")})
    pyarrow.parquet.write_table(table, path, compression=compression)
    return path.read_bytes()


def weights(path: Path) -> bytes:
    tensors = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path, _use_new_zipfile_serialization=path.suffix == ".pth")
    return path.read_bytes()


ROWS = [{"image_id": number, "id": number, "caption": f"a dog {number}"} for number in range(3)]
KARPATHY = {"images": [{"filename": f"{n}.jpg", "split": "train", "sentences": [{"raw": "a dog"}]} for n in range(3)]}
SCORED = [{"image_id": n, "scores": {"CIDEr": 1.0}, "statistics": {}} for n in range(3)]
LOGGED = [{"kind": "train", "step": step, "train/loss": 2.0} for step in range(3)]
REPORT = {"scores": {"CIDEr": 1.0}, "unavailable": {}, "statistics": {"words": 9.0}, "num_photos": 3}
VOCAB = b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\n##b\ndog\n"
TOKENS = b"".join(b"%d.jpg#%d\ta dog runs\n" % (photo, number) for photo in range(3) for number in range(2))
CSV = b'file,caption\na.jpg,"a dog, runs"\nb.jpg,x\n'
WEIGHT_MAP = {"weight_map": {"a.weight": "one.safetensors", "b": "one.safetensors"}}

Case = tuple[str, Callable[[Path], bytes], Callable[[Path], object], tuple[bytes, ...]]
CASES: dict[str, Case] = {
    "configuration": ("x.yaml", lambda _: recipes.find_config("flickr30k").read_bytes(), load, OTHER_YAML),
    "COCO's results": ("x.json", lambda _: json.dumps(ROWS).encode(), cocofiles.read_results, OTHER_JSON),
    "COCO's annotations": (
        *("x.json", lambda _: json.dumps({"annotations": ROWS}).encode()),
        *(cocofiles.read_references, OTHER_JSON),
    ),
    "Karpathy's": ("x.json", lambda _: json.dumps(KARPATHY).encode(), captionfiles.read_captions, OTHER_JSON),
    "token file": ("x.txt", lambda _: TOKENS, captionfiles.read_captions, (b"", b"\xff", b"\0#1\tx")),
    "CSV": ("x.csv", lambda _: CSV, read_rows, (b"", CSV + b'a,"' + b"x" * 200_000)),
    "JSON lines": ("x.jsonl", lambda _: lines_of(ROWS), read_rows, OTHER_JSON),
    "TSV": ("x.tsv", lambda _: b"a dog\thttp://a/1.jpg\n" * 3, read_table, (b"", b"\xff\n", b"a\tb\n", b"\n\n")),
    "Parquet": ("x.parquet", partial(parquet, compression="none"), read_table, (b"", b"PAR1", b"PAR1PAR1")),
    "Parquet, compressed": ("x.parquet", partial(parquet, compression="zstd"), read_table, ()),
    "vocabulary": ("vocab.txt", lambda _: VOCAB, CaptionTokenizer.from_file, (b"", b"\xff", b"\n" * 9, b"[PAD]\n" * 3)),
    "safetensors": ("x.safetensors", weights, read_weights, (b"", b"\xff" * 100, b"version https://git-lfs")),
    "torch": ("x.pth", weights, read_weights, (b"", b"PK\x03\x04", b"<!DOCTYPE html>")),
    "torch, before 1.6": ("x.pt", weights, read_weights, (b"\0" * 8,)),
    "weights' index": ("x.index.json", lambda _: json.dumps(WEIGHT_MAP).encode(), read_weights, OTHER_JSON),
    "scores": ("scores.json", lambda _: json.dumps(REPORT).encode(), read_scores, OTHER_JSON),
    "scores of each image": ("captions.jsonl", lambda _: lines_of(SCORED), read_per_image, OTHER_JSON),
    "a run's log": ("log.jsonl", lambda _: lines_of(LOGGED), lambda path: runlog.read(path.parent), OTHER_JSON),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", CASES)
def test_it_is_read_or_one_line_says_why_not(tmp_path: Path, kind: str) -> None:
    name, write, read, others = CASES[kind]
    path = tmp_path / name
    (tmp_path / "one.safetensors").write_bytes(weights(tmp_path / "other.safetensors"))
    whole = write(path)
    path.write_bytes(whole)
    read(path)
    num_refused = 0
    for content in (*others, *damaged(whole, seed=len(whole))):
        path.write_bytes(content)
        try:
            read(path)
        except PvtcapError as error:
            num_refused += 1
            assert "\n" not in str(error)
            assert str(path) in str(error) or str(tmp_path) in str(error)
    assert num_refused >= 3


@pytest.mark.parametrize("compression", ["none", "snappy"])
def test_a_row_of_a_table_that_is_no_utf_8_is_left_out_alone(tmp_path: Path, compression: str) -> None:
    path = tmp_path / "x.parquet"
    binary = pa.array([b"a dog", b"caf\xe9", b"a cat"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 3, binary.buffers())
    table = pa.table({"url": ["http://a/1", "http://a/2", "http://a/3"], "caption": text})
    pyarrow.parquet.write_table(table, path, compression=compression)
    first, second, third = UrlTable([path])
    assert [first.captions, third.captions] == [("a dog",), ("a cat",)]
    assert (second.key, second.reason) == ("row 1", "not a caption line")


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    """Of a caption that holds U+2028, NEL or a form feed, as alt texts of the web do."""
    odd = "a\u2028dog\x85runs\x0coff"
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"caption": "{odd[:-4]}"}}\n{{"caption": "b', encoding="utf-8")
    assert jsonfile.read_lines(path, ConfigError, growing=True) == [{"caption": odd[:-4]}]
    with pytest.raises(ConfigError, match="line 2: not JSON"):
        jsonfile.read_lines(path, ConfigError)
    (tmp_path / "x.csv").write_text(f"file,caption\na.jpg,{odd}\nb.jpg,x\n", encoding="utf-8")
    assert read_rows(tmp_path / "x.csv") == [{"file": "a.jpg", "caption": odd}, {"file": "b.jpg", "caption": "x"}]
