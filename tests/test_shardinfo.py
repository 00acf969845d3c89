"""pytest tests/test_shardinfo.py: the numbers of 'shards info' against a count done another way, and its pictures."""

from __future__ import annotations

import io
import json
import math
import pickle
import statistics
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pvtcap import infopictures, shardcommands
from pvtcap.chart import PANEL_PX, Bars, Panel, bars, draw_panels
from pvtcap.distribution import Distribution, Range
from pvtcap.errors import ConfigError, ShardError
from pvtcap.infotable import info_tables
from pvtcap.shardinfo import JSON_KEYS, ShardSetInfo, collect, count_shard, split_words
from pvtcap.shardset import ShardSet
from pvtcap.shardwriter import BuildOptions, Candidate, PhotoBytes, SkippedItem, build

FLICKR8K = Path(__file__).parents[2] / "shared/data/flickr8k"
SIZES = [(64, 48), (48, 64), (50, 50), (300, 40), (64, 48), (1, 1), (64, 32)]
CAPTIONS = [
    ("A dog runs.", "a DOG"),
    ("a cat",),
    ("the cat's t-shirt , wet", "“Wet” — and/or dry!", "..."),
    ("one two three four five six seven eight",),
    ("a dog", "a dog", "a dog"),
    ("été à Zürich",),
    ("[/red] brackets",),
]
# By hand: the words of all captions above.
WORDS = (
    "a dog runs a dog a cat the cat's t-shirt wet wet and/or dry one two three four five six seven eight "
    "a dog a dog a dog été à zürich red brackets"
)


def photo(size: tuple[int, int]) -> bytes:
    encoded = io.BytesIO()
    Image.new("RGB", size, "teal").save(encoded, "JPEG")
    return encoded.getvalue()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Seven samples in three shards, and three things left out."""
    samples = [
        Candidate(f"pet{n}", n, captions, "zoo" if n % 2 else "home", PhotoBytes(photo(size)))
        for n, (captions, size) in enumerate(zip(CAPTIONS, SIZES, strict=True))
    ]
    skipped = [SkippedItem(key=f"x{n}", reason=f"no pet {n // 2}") for n in range(3)]
    options = BuildOptions(samples_per_shard=3, max_skipped=0.5)
    build([*samples, *skipped], tmp_path / "pets", options, {"builder": "by-hand", "how": "[/b]"})
    return tmp_path / "pets"


def printed(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    capsys.readouterr()
    shardcommands.info([*map(str, words), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def expected(values: list[int]) -> dict[str, Any]:
    ordered = sorted(values)
    return {
        "min": ordered[0],
        "mean": pytest.approx(statistics.fmean(values)),
        "median": statistics.median_low(values),
        "p95": ordered[math.ceil(0.95 * len(values)) - 1],
        "max": ordered[-1],
        "counts": [[value, values.count(value)] for value in sorted(set(values))],
    }


@pytest.mark.parametrize("processes", [1, 2])
def test_every_number(pets: Path, capsys: pytest.CaptureFixture[str], processes: int) -> None:
    found = printed(capsys, pets, "--processes", processes)
    photo_bytes = [len(photo(size)) for size in SIZES]
    pixels = [width * height for width, height in SIZES]
    assert found == {
        "path": str(pets),
        "name": "pets",
        "builder": "by-hand",
        "build_options": {
            "how": "[/b]",
            "short_side_px": None,
            "jpeg_quality": 90,
            "min_side_px": 0,
            "max_aspect_ratio": None,
            "drop_duplicates": False,
            "samples_per_shard": 3,
            "shard_bytes": None,
        },
        "num_samples": 7,
        "num_captions": 12,
        "num_shards": 3,
        "size_bytes": sum(tar.stat().st_size for tar in pets.glob("*.tar")),
        "vocabulary": {
            "num_words": len(set(WORDS.split())),
            "num_words_once": sum(WORDS.split().count(word) == 1 for word in set(WORDS.split())),
            "num_words_total": len(WORDS.split()),
        },
        "captions_per_photo": expected([2, 1, 3, 1, 3, 1, 1]),
        "caption_words": expected([3, 2, 2, 4, 3, 0, 8, 2, 2, 2, 3, 2]),
        "short_side_px": expected([min(size) for size in SIZES]),
        "long_side_px": expected([max(size) for size in SIZES]),
        "width_px": expected([width for width, _ in SIZES]),
        "height_px": expected([height for _, height in SIZES]),
        "pixels": {"min": 1, "mean": sum(pixels) / 7, "max": 12_000, "total": sum(pixels)},
        "photo_bytes": {
            "min": min(photo_bytes),
            "mean": sum(photo_bytes) / 7,
            "max": max(photo_bytes),
            "total": sum(photo_bytes),
        },
        "orientations": {"landscape": 4, "portrait": 1, "square": 2},
        "samples_per_shard": expected([3, 3, 1]),
        "skipped": {"no pet 0": 2, "no pet 1": 1},
        "sources": {"home": 4, "zoo": 3},
    }
    explained = {name for names in JSON_KEYS for name in names.split(", ")}
    assert explained == found.keys()


def test_words() -> None:
    assert split_words("A dog's T-shirt , wet.") == ["a", "dog's", "t-shirt", "wet"]
    assert split_words("  «Où ?» … 3.5 km/h — 一只狗。") == ["où", "3.5", "km/h", "一只狗"]
    assert split_words(" . ") == []


def test_what_a_worker_gives_back_does_not_grow_with_its_samples(tmp_path: Path) -> None:
    sizes = []
    for num in (20, 200):
        samples = [Candidate(f"a{n}", n, ("a dog",), "s", PhotoBytes(photo((8, 8)))) for n in range(num)]
        build(samples, tmp_path / str(num), BuildOptions(), {})
        sizes.append(len(pickle.dumps(count_shard(ShardSet.open(tmp_path / str(num)).only(0)))))
    assert sizes[1] - sizes[0] < 100


def test_tables_for_people(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counted: list[int] = []
    info = collect(ShardSet.open(pets), progress=counted.append)
    assert counted == [3, 3, 1]
    assert len(list(info_tables(info))) == 5
    shardcommands.info([str(pets)])
    said = capsys.readouterr().out
    for words in ("short side, px", "landscape", "no pet 0", "by-hand", "[/b]", "57.1%"):
        assert words in said
    # A list of a thousand sources is cut, and says so.
    info.counts.sources.update({f"http://{n}": 1 for n in range(1000)})
    [row] = [row for table in info_tables(info) for row in table.columns[1].cells if "others" in str(row)]
    assert str(row) == "(991 others)"


def test_pictures_beside_the_shardset_and_never_in_it(
    pets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in pets.iterdir()}
    shardcommands.info([str(pets)])
    assert [path.name for path in tmp_path.iterdir()] == ["pets"]
    printed(capsys, pets, "--out", tmp_path / "deep/er")
    with Image.open(tmp_path / "deep/er/contact_sheet.png") as sheet:
        assert sheet.width == 4 * (224 + 8) + 8
        assert len(sheet.getcolors(100_000) or []) > 10
    with Image.open(tmp_path / "deep/er/histograms.png") as histograms:
        assert histograms.size == (2 * PANEL_PX[0], 56 + 2 * PANEL_PX[1])
        # Each of the four panels has bars: blue, and over a hundredth of it.
        for x in (0, PANEL_PX[0]):
            for y in (56, 56 + PANEL_PX[1]):
                panel = histograms.crop((x, y, x + PANEL_PX[0], y + PANEL_PX[1]))
                blue = {colour: times for times, colour in panel.getcolors(100_000) or []}[0x3B, 0x75, 0xAF]
                assert blue > 0.01 * panel.width * panel.height
    for out in (pets, pets / "pictures", tmp_path / "deep/../pets"):
        with pytest.raises(ShardError, match="pictures are not written into a ShardSet"):
            shardcommands.info([str(pets), "--out", str(out)])
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="cannot make the folder"):
        shardcommands.info([str(pets), "--out", str(tmp_path / "file")])
    assert {path.name: path.stat().st_mtime_ns for path in pets.iterdir()} == before


def test_photos_are_spread_evenly() -> None:
    assert infopictures.spread([3, 3, 1], 16) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)]
    assert infopictures.spread([1000, 0, 500, 500], 4) == [(0, 250), (0, 750), (2, 250), (3, 250)]
    assert infopictures.spread([5], 1) == [(0, 2)]


def test_a_shardset_that_is_damaged_is_one_line(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no such shard folder"):
        shardcommands.info([str(tmp_path / "none")])
    place = infopictures.spread(ShardSet.open(pets).sizes, 16)[4]
    tar = pets / f"pets-00000{place[0]}.tar"
    index = ShardSet.open(pets).load_index(place[0])
    whole = tar.read_bytes()
    offset, size = index.photos[place[1]]
    tar.write_bytes(whole[:offset] + b"x" * size + whole[offset + size :])
    shardcommands.info([str(pets)])  # photos are not looked at ...
    with pytest.raises(ShardError, match=r"sample pet4: not a photo.*shards verify"):
        shardcommands.info([str(pets), "--out", str(tmp_path / "out")])  # ... but to draw them
    offset, size = index.texts[place[1]]
    tar.write_bytes(whole[:offset] + b"x" * size + whole[offset + size :])
    with pytest.raises(ShardError, match="sample pet4: not a valid Text"):
        shardcommands.info([str(pets), "--processes", "2"])
    tar.write_bytes(whole)
    manifest = json.loads((pets / "manifest.json").read_text())
    manifest["num_captions"] = 99
    (pets / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match="number of captions is wrong; got 99; wanted 12"):
        shardcommands.info([str(pets)])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "the following arguments are required: DIR"),
        (["a", "b"], "unrecognized arguments: b"),
        (["a", "--processes", "many"], "invalid int value: 'many'"),
        (["a", "--processes", "-1"], "--processes: out of range; got -1; wanted 0 or more"),
    ],
)
@pytest.mark.parametrize("command", ["info", "verify"])
def test_words_that_are_wrong(command: str, words: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        shardcommands.COMMANDS[command](words)
    assert says in str(error.value)


def test_distributions() -> None:
    values = Distribution.of([1, 1, 2, 3, 10])
    assert (values.num, values.total, values.quantile(0), values.quantile(0.5), values.quantile(1)) == (5, 17, 1, 2, 10)
    total = Range()
    for part in (Range(), Range(2, 7, 3, 4), Range(1, 1, 1, 1)):
        total.update(part)
    assert total == Range(3, 8, 1, 4)


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([5] * 7, Bars(5, 1, [7])),
        ([1, 2, 2, 4], Bars(1, 1, [1, 2, 0, 1])),
        ([*range(100)], Bars(0, 5, [5] * 20)),
        ([*([3] * 500), *([4] * 500), 2**60], Bars(3, 1, [500, 500], tail=1)),
    ],
)
def test_bars_are_few_and_round(values: list[int], wanted: Bars) -> None:
    assert bars(Distribution.of(values)) == wanted


def test_any_distribution_can_be_drawn(tmp_path: Path) -> None:
    for number, values in enumerate(([0], [1, 2**62], [7] * 3 + [9_999_999] * 2, range(0, 10**6, 997))):
        draw_panels([Panel("title", "axis", "photos", Distribution.of(values))], "all", tmp_path / f"{number}.png")
        with Image.open(tmp_path / f"{number}.png") as image:
            assert len(image.getcolors(100_000) or []) > 10


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="shared/data/flickr8k is not here")
def test_flickr8k(tmp_path: Path) -> None:
    """Lengths of real captions, against a count of the token file's own lines."""
    data = FLICKR8K
    lines = dict(line.split("\t") for line in (data / "Flickr8k.token.txt").read_text().splitlines() if "\t" in line)
    names = (data / "Flickr_8k.devImages.txt").read_text().split()[:20]
    captions = {name: [lines[f"{name}#{n}"] for n in range(5)] for name in names}
    samples = [
        Candidate(name, name, tuple(texts), "flickr8k", PhotoBytes((data / "images" / name).read_bytes()))
        for name, texts in captions.items()
    ]
    build(samples, tmp_path / "some", BuildOptions(samples_per_shard=7), {})
    info: ShardSetInfo = collect(ShardSet.open(tmp_path / "some"))
    lengths = [
        sum(any(c.isalnum() for c in word) for word in text.split()) for name in names for text in captions[name]
    ]
    assert info.counts.caption_words == Distribution.of(lengths)
