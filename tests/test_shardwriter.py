"""pytest tests/test_shardwriter.py"""

from __future__ import annotations

import argparse
import gc
import io
import json
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from pvtcap.errors import ConfigError, ShardError
from pvtcap.shardset import ShardReader, ShardSet
from pvtcap.shardwriter import (
    BuildOptions,
    Candidate,
    PhotoBytes,
    PhotoFile,
    PhotoInZip,
    PhotoPlace,
    SkippedItem,
    build,
    byte_count,
)

BUILDER = {"builder": "test"}


def picture(width: int = 40, height: int = 30, mode: str = "RGB", kind: str = "JPEG", **options: object) -> bytes:
    """A gradient from black (left) to white, red growing downwards: which side is which can be told."""
    across = Image.linear_gradient("L").rotate(90).resize((width, height))
    image = Image.merge("RGB", (Image.linear_gradient("L").resize((width, height)), across, across)).convert(mode)
    encoded = io.BytesIO()
    image.save(encoded, kind, **options)
    return encoded.getvalue()


def candidate(number: int, photo: bytes | None = None, captions: tuple[str, ...] = ("a cat", "the cat")) -> Candidate:
    photo = picture(40 + number, 30) if photo is None else photo
    return Candidate(f"cat{number}", number, captions, "test", PhotoBytes(photo))


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def stored(folder: Path) -> Iterator[tuple[str, Image.Image, tuple[str, ...]]]:
    shardset = ShardSet.open(folder)
    with ShardReader(shardset) as reader:
        for shard, size in enumerate(shardset.sizes):
            for index in range(size):
                sample = reader.read(shard, index)
                image = Image.open(io.BytesIO(sample.photo))
                assert image.size == (sample.width, sample.height)
                yield sample.key, image, sample.captions


def store_one(tmp_path: Path, photo: bytes, **options: object) -> Image.Image:
    build([candidate(0, photo)], tmp_path / "one", BuildOptions(**options), BUILDER)  # type: ignore[arg-type]
    return next(stored(tmp_path / "one"))[1]


def test_webdataset_reads_the_same_samples(tmp_path: Path) -> None:
    import webdataset as wds

    build([candidate(n) for n in range(5)], tmp_path / "cats", BuildOptions(samples_per_shard=2), BUILDER)
    shardset = ShardSet.open(tmp_path / "cats")
    assert shardset.sizes == [2, 2, 1]
    tars = [str(tmp_path / "cats" / entry.file) for entry in shardset.manifest.shards]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the last tar to the garbage collector
        theirs = list(wds.WebDataset(tars, shardshuffle=False))
        gc.collect()
    with ShardReader(shardset) as reader:
        ours = [reader.read(shard, index) for shard, size in enumerate(shardset.sizes) for index in range(size)]
    assert [sample["__key__"] for sample in theirs] == [sample.key for sample in ours] == list(shardset.keys())
    assert [sample["jpg"] for sample in theirs] == [sample.photo for sample in ours]
    assert [tuple(json.loads(sample["json"])["captions"]) for sample in theirs] == list(shardset.captions())


def test_any_number_of_processes_writes_the_same_bytes(tmp_path: Path) -> None:
    photos = [candidate(n) for n in range(50)]
    photos[20] = candidate(20, b"no photo")
    written = []
    for processes in (0, 1, 2):
        options = BuildOptions(samples_per_shard=7, short_side_px=16, processes=processes)
        build(photos, tmp_path / str(processes) / "cats", options, BUILDER)
        written.append(files(tmp_path / str(processes) / "cats"))
    assert written[0] == written[1] == written[2]
    assert len(written[0]) == 7 * 2 + 2


def test_shards_are_cut_at_samples_or_bytes(tmp_path: Path) -> None:
    options = BuildOptions(samples_per_shard=4, shard_bytes=30_720)
    photos = [candidate(n, b"" if n == 5 else None) for n in range(9)] + [candidate(9, picture(900, 900, quality=100))]
    build(photos, tmp_path / "cats", options, BUILDER)
    manifest = ShardSet.open(tmp_path / "cats").manifest
    assert all(entry.size_bytes <= 30_720 for entry in manifest.shards[:-1])
    assert manifest.shards[-1].num_samples == 1  # a sample larger than a shard has one to itself
    indexes = [ShardSet.open(tmp_path / "cats").load_index(n) for n in range(len(manifest.shards))]
    ranges = [index.candidates for index in indexes]
    assert [start for start, _ in ranges] == [0, *(stop for _, stop in ranges[:-1])]
    assert ranges[-1][1] == 10
    assert [index.last_candidate for index in indexes] == [f"cat{stop - 1}" for _, stop in ranges]
    assert [item.key for index in indexes for item in index.skipped] == ["cat5"]


def test_untouched_when_nothing_needs_changing(tmp_path: Path) -> None:
    raw = picture(40, 30, quality=37)
    build([candidate(0, raw)], tmp_path / "cats", BuildOptions(short_side_px=30), BUILDER)
    with ShardReader(ShardSet.open(tmp_path / "cats")) as reader:
        assert reader.read(0, 0).photo == raw


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("size", "wanted"), [((40, 30), (40, 30)), ((400, 300), (133, 100)), ((300, 1200), (100, 400))]
)
def test_scaled_down_never_up(tmp_path: Path, kind: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert store_one(tmp_path, picture(*size, kind=kind), short_side_px=100).size == wanted


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("short_side_px", [None, 32])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, short_side_px: int | None) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = picture(96, 64, exif=exif, quality=95)
    image = store_one(tmp_path, raw, short_side_px=short_side_px).convert("RGB")
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).resize(image.size)
    assert image.getexif().get(0x0112, 1) == 1
    for at in ((2, 2), (image.width - 3, 2), (2, image.height - 3)):
        ours, theirs = image.getpixel(at), wanted.getpixel(at)
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 12  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("L", "JPEG"), ("CMYK", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("P", "GIF"), ("LA", "PNG"), ("RGB", "WEBP")],
)
def test_everything_becomes_rgb(tmp_path: Path, mode: str, kind: str) -> None:
    image = store_one(tmp_path, picture(64, 48, mode=mode, kind=kind))
    assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 48))
    left, right = image.convert("L").getpixel((4, 24)), image.convert("L").getpixel((59, 24))
    assert isinstance(left, int) and isinstance(right, int) and abs(right - left) > 80


def test_transparent_is_white_and_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    clear, deep = io.BytesIO(), io.BytesIO()
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(clear, "PNG")
    Image.new("I;16", (32, 32), 128 * 257).save(deep, "PNG")
    assert min(store_one(tmp_path / "clear", clear.getvalue()).getpixel((5, 5))) > 250  # type: ignore[arg-type]
    assert store_one(tmp_path / "deep", deep.getvalue()).getpixel((5, 5)) == (128, 128, 128)


def test_bad_photos_are_counted_by_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300_000)
    photos: list[Candidate | SkippedItem] = [
        *(candidate(n) for n in range(10)),
        candidate(10, b"GIF, says the text"),
        candidate(11, picture(200, 200)[:-900]),
        candidate(12, picture(600, 600)),  # a warning of Pillow's, an error of ours
        candidate(13, picture(900, 900)),
        Candidate("gone", "gone", ("a cat",), "test", PhotoFile(tmp_path / "gone.jpg")),
        Candidate("folder", "folder", ("a cat",), "test", PhotoFile(tmp_path)),
        Candidate("zero", "zero", ("a cat",), "test", PhotoFile(tmp_path / "zero\0.jpg")),
        candidate(14, captions=(" \n", "")),
        candidate(3),
        Candidate("cat/0", "other", ("a cat",), "test", PhotoBytes(picture())),
        Candidate("cat.0", "another", ("a cat",), "test", PhotoBytes(picture())),
        Candidate("new", 4, ("a cat",), "test", PhotoBytes(picture())),
        SkippedItem(key="x", reason="the builder's own"),
    ]
    report = build(photos, tmp_path / "cats", BuildOptions(max_skipped=0.9), BUILDER)
    assert report.manifest.skipped == {
        "not a photo": 1,
        "truncated photo": 1,
        "photo too large": 2,
        "missing photo": 1,
        "unreadable photo": 2,
        "no caption": 1,
        "duplicate key": 2,
        "duplicate image_id": 1,
        "the builder's own": 1,
    }
    lines = [json.loads(line) for line in (tmp_path / "cats/skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines][:2] == ["cat10", "cat11"]
    assert all(line["detail"] for line in lines[:-1])
    assert list(ShardSet.open(tmp_path / "cats").keys()) == [*(f"cat{n}" for n in range(10)), "cat_0"]


def test_captions_are_cleaned_and_empty_ones_reported(tmp_path: Path) -> None:
    captions = ("  two\nlines\t and  gaps ", " ", "half a \ud83d surrogate")
    report = build([candidate(0, captions=captions)], tmp_path / "cats", BuildOptions(), BUILDER)
    assert list(ShardSet.open(tmp_path / "cats").captions()) == [("two lines and gaps", "half a ? surrogate")]
    assert report.manifest.skipped == {"empty caption": 1}
    assert report.examples["empty caption"].key == "cat0#1"


def test_long_and_odd_keys_become_file_names(tmp_path: Path) -> None:
    names = ["a/b.c d", "é" * 80, "x" * 300, "x" * 301]
    photos = [Candidate(name, name, ("a cat",), "test", PhotoBytes(picture())) for name in names]
    build(photos, tmp_path / "cats", BuildOptions(), BUILDER)
    keys = list(ShardSet.open(tmp_path / "cats").keys())
    assert keys[0] == "a_b_c_d"
    assert len(set(keys)) == 4
    assert max(map(len, keys)) <= 90


def test_photos_in_a_zip_are_found_by_base_name(tmp_path: Path) -> None:
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("Flicker8k_Dataset/a.jpg", picture())
        file.writestr("__MACOSX/._a.jpg", b"rubbish")
        file.writestr("one/b.jpg", b"")
        file.writestr("two/b.jpg", b"")
    place = PhotoPlace(archive)
    assert place.find("a.jpg") == PhotoInZip(archive, "Flicker8k_Dataset/a.jpg")
    assert place.find("two/b.jpg") == PhotoInZip(archive, "two/b.jpg")
    with pytest.raises(ShardError, match="several photos of one name"):
        place.find("b.jpg")
    photos = [Candidate(name, name, ("a cat",), "test", place.find(name)) for name in ("a.jpg", "c.jpg")]
    report = build(photos, tmp_path / "cats", BuildOptions(max_skipped=0.5), BUILDER)
    assert (report.manifest.num_samples, report.manifest.skipped) == (1, {"missing photo": 1})


def test_too_many_skipped_leaves_nothing(tmp_path: Path) -> None:
    photos = [candidate(n, b"rubbish" if n % 4 == 0 else None) for n in range(12)]
    with pytest.raises(ShardError, match=r"3 of 12 candidates.*cat0 \(not a photo\).*at most 10%.*--max-skipped"):
        build(photos, tmp_path / "cats", BuildOptions(samples_per_shard=2), BUILDER)
    assert not (tmp_path / "cats").exists()
    with pytest.raises(ShardError, match="nothing to build from"):
        build([], tmp_path / "cats", BuildOptions(), BUILDER)
    with pytest.raises(ShardError, match="at least one sample"):
        build(photos[:1], tmp_path / "cats", BuildOptions(max_skipped=1.0), BUILDER)
    assert not (tmp_path / "cats").exists()


def test_sizes_and_options_are_checked() -> None:
    assert [byte_count(text) for text in ("100MB", "1GiB", "1.5k", "77")] == [100_000_000, 2**30, 1500, 77]
    with pytest.raises(argparse.ArgumentTypeError):
        byte_count("many")
    for wrong in ({"short_side_px": 0}, {"jpeg_quality": 101}, {"processes": -1}, {"max_skipped": 2.0}):
        with pytest.raises(ConfigError, match="--"):
            BuildOptions(**wrong)
