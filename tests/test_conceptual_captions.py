"""pytest tests/test_conceptual_captions.py: whole builds from a real server on loopback, well-behaved and not."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from pvtcap.shardset import ShardReader, ShardSet
from pvtcap.shardverify import verify

ROOT = Path(__file__).parents[1]
BUILDER = ROOT / "shards" / "conceptual_captions.py"
DATA = ROOT.parent / "shared" / "data"
REAL_TSV = DATA / "conceptual_captions" / "Validation_GCC-1.1.0-Validation.tsv"
LOOPBACK = ("--allow-private-addresses", "127.0.0.0/8")
QUICK = ("--timeout-s", "3", "--retries", "1", "--per-host", "32")

needs_data = pytest.mark.skipif(not REAL_TSV.is_file(), reason="shared/data/conceptual_captions is not here")


@dataclass(frozen=True)
class Server:
    address: str

    def asked(self) -> Counter[str]:
        """How often each path was asked for."""
        with urllib.request.urlopen(f"{self.address}/asked") as response:
            return Counter(json.load(response))


def serve(photos: Path, port_file: Path) -> Iterator[Server]:
    command = [sys.executable, str(ROOT / "tests" / "photoserver.py"), str(photos), str(port_file)]
    with subprocess.Popen(command) as process:
        try:
            while not port_file.exists():
                assert process.poll() is None
                time.sleep(0.02)
            yield Server(f"http://127.0.0.1:{port_file.read_text()}")
        finally:
            process.kill()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty different photos, a tiny one, a long one and a grey one."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(40):
        colour = (5 * number, 255 - 6 * number, 100)
        Image.effect_noise((120, 90), 60).convert("RGB").save(folder / f"{number}.jpg")
        Image.new("RGB", (120, 90), colour).save(folder / f"flat-{number}.png")
    Image.new("RGB", (1, 1)).save(folder / "tiny.jpg")
    Image.new("RGB", (1000, 100)).save(folder / "long.jpg")
    Image.effect_noise((120, 90), 50).save(folder / "grey.jpg")
    return folder


@pytest.fixture
def server(drawn: Path, tmp_path: Path) -> Iterator[Server]:
    yield from serve(drawn, tmp_path / "port")


def write_table(path: Path, rows: list[tuple[str, str]]) -> Path:
    path.write_text("".join(f"{caption}\t{url}\n" for caption, url in rows), encoding="utf-8")
    return path


def run(*words: object, out: Path, processes: int = 1) -> ShardSet:
    main = runpy.run_path(str(BUILDER))["main"]
    main([*map(str, words), "--out", str(out), "--processes", str(processes)])
    return ShardSet.open(out)


def complaint(capsys: pytest.CaptureFixture[str], *words: object, out: Path) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*words, out=out)
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert not out.exists()
    return told


def samples(shardset: ShardSet) -> dict[str, tuple[object, ...]]:
    found = {}
    with ShardReader(shardset) as reader:
        for shard, size in enumerate(shardset.sizes):
            for index in range(size):
                sample = reader.read(shard, index)
                found[sample.key] = (sample.image_id, sample.captions, sample.photo)
    return found


def skipped(out: Path) -> dict[str, str]:
    lines = (out / "skipped.jsonl").read_text().splitlines()
    return {item["key"]: item["reason"] for item in map(json.loads, lines)}


MISBEHAVING = {
    "missing": "HTTP 404",
    "forbidden": "HTTP 403",
    "always-busy": "HTTP 429",
    "broken": "HTTP 500",
    "drip": "timed out",
    "reset": "connection reset",
    "short/1.jpg": "truncated download",
    "cut/1.jpg": "truncated photo",
    "html": "not a photo",
    "bomb": "download too large",
    "huge-png": "photo too large",
    "endless": "download too large",
    "loop/0": "too many redirects",
    "metadata": "private address",
    "file": "not a URL",
    "noai/1.jpg": "refused by its site",
    "garbage": "not HTTP",
    "ok/tiny.jpg": "photo too small",
    "ok/long.jpg": "photo too long",
    "gzip/0.jpg": "duplicate photo",
}
COMING = ("ok/0.jpg", "busy/2.jpg", "shaky/3.jpg", "hop/2/4.jpg", "gzip/5.jpg", "ok/grey.jpg", "ok/flat-6.png")


def test_every_row_ends_as_a_sample_or_under_its_reason(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"caption of {path}", f"{server.address}/{path}") for path in (*COMING, *MISBEHAVING)]
    others = [
        (" ", f"{server.address}/ok/7.jpg", "no caption"),
        ("a", "http://nobody.invalid/1.jpg", "DNS"),
        ("a", "http://127.0.0.1:1/1.jpg", "cannot connect"),
        ("a", "http://10.1.2.3/1.jpg", "private address"),
        ("a", "ftp://example.org/1.jpg", "not a URL"),
    ]
    table = write_table(tmp_path / "t.tsv", rows + [row[:2] for row in others])
    with table.open("a") as file:
        file.write("no tab\n")
    words = ("--tsv", table, *LOOPBACK, *QUICK, "--max-download", "20MB")
    shardset = run(*words, out=tmp_path / "cc", processes=2)
    assert list(samples(shardset)) == [f"{number:09d}" for number in range(len(COMING))]
    assert verify(tmp_path / "cc") == []
    wanted = [*MISBEHAVING.values(), *(reason for *_, reason in others)]
    keys = [f"{number:09d}" for number in range(len(COMING), len(COMING) + len(wanted))]
    found = skipped(tmp_path / "cc")
    nobody = keys[wanted.index("DNS")]
    if found[nobody] in ("DNS out of order", "timed out"):  # as on a machine whose DNS server does not answer
        found[nobody] = "DNS"
    assert found == {**dict(zip(keys, wanted, strict=True)), f"row {len(rows) + len(others)}": "not a caption line"}

    report = json.loads((tmp_path / "cc" / "report.json").read_text())
    assert (report["rows"], report["stored"]) == (33, 7)
    assert report["failures"] == shardset.manifest.skipped
    ours = report["hosts"]["127.0.0.1"]
    assert (ours["rows"], ours["stored"], ours["failures"]["HTTP 404"]) == (29, 7, 1)
    assert report["hosts"]["nobody.invalid"]["stored"] == 0
    table_shown = capsys.readouterr().out
    assert "7 of 33 rows became samples: 21.2%" in table_shown
    assert "nobody.invalid" in table_shown
    assert not server.asked()["/ok/7.jpg"]  # without a caption there is nothing to ask for


def test_urls_and_row_numbers_are_kept(server: Server, tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.tsv", [("a cat", f"{server.address}/ok/1.jpg")])
    run("--tsv", table, *LOOPBACK, "--source", "sbu", "--short-side-px", "64", out=tmp_path / "cc")
    with tarfile.open(tmp_path / "cc" / "cc-000000.tar") as tar:
        text = json.load(tar.extractfile("000000000.json"))  # type: ignore[arg-type]
    assert text == {
        "image_id": 0,
        "captions": ["a cat"],
        "width": 85,
        "height": 64,
        "source": "sbu",
        "url": f"{server.address}/ok/1.jpg",
    }


def test_parts_together_are_the_whole(server: Server, tmp_path: Path) -> None:
    rows = [(f"caption {n}", f"{server.address}/ok/{n}.jpg") for n in range(20)]
    table = write_table(tmp_path / "t.tsv", rows)
    whole = samples(run("--tsv", table, *LOOPBACK, out=tmp_path / "whole"))
    parts: dict[str, tuple[object, ...]] = {}
    for i in (1, 2, 3):
        part = samples(run("--tsv", table, *LOOPBACK, "--part", f"{i}/3", out=tmp_path / f"part-{i}"))
        assert not part.keys() & parts.keys()
        parts |= part
    assert parts == whole


def test_from_parquet(server: Server, tmp_path: Path) -> None:
    content = {"url": [f"{server.address}/ok/{n}.jpg" for n in range(3)], "caption": ["one", "two", "three"]}
    pyarrow.parquet.write_table(pyarrow.table(content), tmp_path / "t.parquet")
    shardset = run("--parquet", tmp_path / "t.parquet", *LOOPBACK, out=tmp_path / "cc")
    assert list(shardset.captions()) == [("one",), ("two",), ("three",)]


def test_the_order_of_answers_and_the_processes_do_not_matter(server: Server, tmp_path: Path) -> None:
    rows = [(f"caption {n}", f"{server.address}/{('slow', 'ok')[n % 2]}/{n}.jpg") for n in range(12)]
    table = write_table(tmp_path / "t.tsv", rows)
    words = ("--tsv", table, *LOOPBACK, *QUICK, "--samples-per-shard", 5)
    run(*words, out=tmp_path / "a" / "cc", processes=1)
    run(*words, out=tmp_path / "b" / "cc", processes=2)
    assert tars(tmp_path / "a" / "cc") == tars(tmp_path / "b" / "cc")


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_duplicates_are_known_across_an_interruption(server: Server, tmp_path: Path) -> None:
    names = [*range(10), *range(5), *range(10, 15)]
    rows = [(f"caption {n}", f"{server.address}/slow/{name}.jpg?{n}") for n, name in enumerate(names)]
    table = write_table(tmp_path / "t.tsv", rows)
    words = ("--tsv", table, *LOOPBACK, *QUICK, "--samples-per-shard", 4, "--connections", 2)
    with start(*words, out=tmp_path / "cc") as process:
        while not list(tmp_path.glob("cc/*.index.json")):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    shardset = run(*words, out=tmp_path / "cc")
    assert (shardset.num_samples, shardset.manifest.skipped) == (15, {"duplicate photo": 5})
    assert run(*words, "--no-drop-duplicates", out=tmp_path / "all").num_samples == 20


def finished_in(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.index.json")}


def start(*words: object, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(BUILDER), *map(str, words), "--out", str(out), "--processes", "2"]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


@needs_data
def test_killed_ten_times_it_ends_as_if_it_never_was(tmp_path: Path) -> None:
    captions = [line.split("\t")[0] for line in REAL_TSV.read_text(encoding="utf-8").splitlines()[:400]]
    photos = sorted((DATA / "coco" / "val2017").glob("*.jpg"))
    bad = ["missing", "html", "reset", *(f"{how}/{photos[0].name}" for how in ("noai", "short", "busy"))]
    for server in serve(photos[0].parent, tmp_path / "port"):
        paths = [
            f"{bad[n % len(bad)]}?{n}" if n % 7 == 3 else f"slow/{photos[n % len(photos)].name}?{n}"
            for n in range(len(captions))
        ]
        table = write_table(
            tmp_path / "t.tsv", [(c, f"{server.address}/{p}") for c, p in zip(captions, paths, strict=True)]
        )
        words = ("--tsv", table, *LOOPBACK, *QUICK, "--short-side-px", 160, "--samples-per-shard", 5)
        # 128 photos for 400 rows; and no row may time out in one build and not in the other, however busy the machine.
        words = (*words, "--connections", 4, "--no-drop-duplicates", "--timeout-s", 30)
        whole = run(*words, out=tmp_path / "whole" / "cc", processes=2)
        for_one_build = server.asked().total()
        draw, killed = random.Random(0), tmp_path / "killed" / "cc"
        num_kills, num_starts, num_builds = 0, 1, 1  # the last ones, below, counted in
        while num_kills < 10:
            finished, num_starts = finished_in(killed), num_starts + 1
            with start(*words, out=killed) as process:
                while num_kills % 2 and finished_in(killed) == finished and process.poll() is None:
                    time.sleep(0.01)
                # Every other one may hit it while it starts; the others when it writes some three shards a second.
                time.sleep(draw.uniform(0, 0.4) if num_kills % 2 else draw.uniform(0.1, 1.2))
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    num_kills += 1
            assert finished <= finished_in(killed)
            for tar in killed.glob("*.tar"):
                with tarfile.open(tar) as members:
                    assert len(members.getnames()) % 2 == 0
            assert process.returncode in (0, -signal.SIGKILL)
            # It was quicker than we, or was killed when all was written: as it should be, and once more from the start.
            if (killed / "manifest.json").exists():
                check_equal(killed, whole)
                shutil.rmtree(killed)
                num_builds += 1
            else:
                assert process.returncode != 0
        with start(*words, out=killed) as process:
            assert process.wait(120) == 0, process.stderr
        check_equal(killed, whole)
        # Each start fetches the unfinished shard again, and what was under way: never a finished one.
        asked = server.asked().total() - for_one_build
        assert asked < (num_builds + 0.2 * num_starts) * for_one_build


def check_equal(killed: Path, whole: ShardSet) -> None:
    assert tars(killed) == tars(whole.path)
    assert skipped(killed) == skipped(whole.path)
    assert verify(killed) == []
    assert samples(ShardSet.open(killed)) == samples(whole)


def test_offline_stops_and_goes_on_later(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pvtcap import download, fetch

    monkeypatch.setattr(download, "_OFFLINE_AFTER", 5)
    # Every refused connection counts as a network that is down: this machine's cannot be taken away from a test.
    monkeypatch.setattr(download, "NO_NETWORK", fetch.NO_NETWORK | {"cannot connect"})
    rows = [(f"caption {n}", f"{server.address}/ok/{n}.jpg") for n in range(10)]
    rows += [(f"caption {n}", f"http://127.0.0.1:1/{n}") for n in range(5)]
    words = ("--tsv", write_table(tmp_path / "t.tsv", rows), *LOOPBACK, "--samples-per-shard", 4)
    with pytest.raises(SystemExit) as caught:
        run(*words, out=tmp_path / "cc")
    assert caught.value.code == 2
    assert "seems to be offline: 5 URLs one after the other failed" in capsys.readouterr().err
    assert len(tars(tmp_path / "cc")) == 2
    monkeypatch.undo()
    assert run(*words, out=tmp_path / "cc").num_samples == 10


def test_a_long_stretch_of_dead_links_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    rows = [(f"caption {n}", f"{server.address}/missing?{n}") for n in range(45)]
    rows += [("a cat", f"{server.address}/slow/1.jpg"), ("a dog", f"{server.address}/drip")]
    words = ("--tsv", write_table(tmp_path / "t.tsv", rows), *LOOPBACK, "--samples-per-shard", 2)
    with start(*words, "--connections", 1, out=tmp_path / "cc") as process:
        while not (tmp_path / "cc" / "cc-skipped-000001.json").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    shardset = run(*words, *QUICK, out=tmp_path / "cc")
    assert (shardset.num_samples, shardset.manifest.skipped) == (1, {"HTTP 404": 45, "timed out": 1})
    assert all(server.asked()[f"/missing?{n}"] == 1 for n in range(40))
    left = sorted(path.name for path in (tmp_path / "cc").iterdir())
    assert left == ["cc-000000.index.json", "cc-000000.tar", "manifest.json", "report.json", "skipped.jsonl"]
    assert verify(tmp_path / "cc") == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--part", "0/4"), "--part: not a part; got 0/4; wanted 1/16 to 16/16"),
        (("--connections", "0"), "--connections: out of range; got 0; wanted 1 or more"),
        (("--timeout-s", "0"), "--timeout-s: out of range"),
        (("--retries", "-1"), "--retries: out of range; got -1; wanted 0 or more"),
        (("--max-aspect-ratio", "0.5"), "--max-aspect-ratio: out of range"),
        (("--allow-private-addresses", "home"), "--allow-private-addresses: not a network"),
    ],
)
def test_options_out_of_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], told: str
) -> None:
    table = write_table(tmp_path / "t.tsv", [("a", "http://127.0.0.1:1/")])
    assert told in complaint(capsys, "--tsv", table, *words, out=tmp_path / "cc")


def test_tables_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such table" in complaint(capsys, "--tsv", tmp_path / "gone.tsv", out=tmp_path / "cc")
    table = write_table(tmp_path / "t.tsv", [("a", "b")])
    assert "cannot tell which column" in complaint(capsys, "--tsv", table, out=tmp_path / "cc")
    dead = write_table(tmp_path / "dead.tsv", [("a", "http://127.0.0.1:1/")])
    told = complaint(capsys, "--tsv", dead, *LOOPBACK, out=tmp_path / "cc")
    assert told.startswith(f"pvtcap: error: {tmp_path}/cc: 1 of 1 candidates had to be left out")
    assert "got 000000000 (cannot connect); wanted at least one sample" in told
