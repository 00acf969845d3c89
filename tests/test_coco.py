"""pytest tests/test_coco.py"""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from test_builders import fails, run, script, text_of

from pvtcap.shardset import ShardReader, ShardSet

# One photo a split, train and restval twice; the folder says which year's photos, not which split.
SPLITS = {9: "train", 25: "train", 30: "restval", 34: "val", 36: "test", 42: "restval"}
FOLDERS = {"train": "train2014", "restval": "val2014", "val": "val2014", "test": "val2014"}


def draw(path: Path, number: int, mode: str = "RGB") -> None:
    """A photo that can be told from the others by its width."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40 + number, 30), "teal").convert(mode).save(path, "JPEG")


def zipped(folder: Path, prefix: str) -> Path:
    archive = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for photo in sorted(folder.iterdir()):
            file.write(photo, f"{prefix}/{photo.name}")
    return archive


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def name_2014(number: int) -> str:
    return f"COCO_{FOLDERS[SPLITS[number]]}_{number:012d}.jpg"


def tars(shardset: ShardSet) -> list[bytes]:
    return [(shardset.path / entry.file).read_bytes() for entry in shardset.manifest.shards]


def skipped(shardset: ShardSet) -> list[dict[str, str]]:
    return [json.loads(line) for line in (shardset.path / "skipped.jsonl").read_text().splitlines()]


@pytest.fixture
def karpathy(tmp_path: Path) -> Path:
    """Karpathy's file in its true form, the splits mixed as they are in his."""
    images = [
        {
            "filepath": FOLDERS[split],
            "sentids": [10 * number, 10 * number + 1],
            "filename": name_2014(number),
            "imgid": place,
            "split": split,
            "sentences": [
                {"tokens": ["photo", str(number)], "raw": raw, "imgid": place, "sentid": 10 * number + count}
                for count, raw in enumerate([f"Photo {number}.", f"Photo\n{number} again. "])
            ],
            "cocoid": number,
        }
        for place, (number, split) in enumerate(SPLITS.items())
    ]
    return write_json(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})


@pytest.fixture
def coco2014(tmp_path: Path) -> tuple[Path, Path]:
    """The folders train2014 and val2014, as COCO's ZIPs unpack."""
    for number, split in SPLITS.items():
        draw(tmp_path / "coco" / FOLDERS[split] / name_2014(number), number)
    return tmp_path / "coco/train2014", tmp_path / "coco/val2014"


def official(tmp_path: Path, images: object, annotations: object, name: str = "captions_val2017.json") -> Path:
    return write_json(tmp_path / name, {"info": {}, "images": images, "licenses": [], "annotations": annotations})


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, Path]:
    """Photos 1, 2 and 3 in val2017, and their annotations: the images in the order 3, 1, 2, the captions in another."""
    for number in (1, 2, 3):
        draw(tmp_path / "val2017" / f"{number:012d}.jpg", number)
    images = [{"id": number, "file_name": f"{number:012d}.jpg"} for number in (3, 1, 2)]
    annotations = [
        {"id": 70 + count, "image_id": number, "caption": f"Caption {count}."}
        for count, number in enumerate([1, 2, 3, 1, 1, 2, 1, 1, 1, 1])
    ]
    return tmp_path / "val2017", official(tmp_path, images, annotations)


def test_annotations_in_the_order_of_their_images_with_all_captions(
    tmp_path: Path, three: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = three
    shardset = run("coco", "--images", images, "--annotations", annotations, out=tmp_path / "coco")
    assert list(shardset.keys()) == ["000000000003", "000000000001", "000000000002"]
    seven = tuple(f"Caption {count}." for count in (0, 3, 4, 6, 7, 8, 9))
    assert text_of(shardset, "000000000001") == (1, seven, (41, 30))
    assert shardset.manifest.skipped == {}
    assert "mended" not in capsys.readouterr().out
    build = shardset.manifest.build
    assert (build["images"], build["annotations"]) == ([str(images)], [str(annotations)])
    assert [len(digest) for digest in build["annotations_sha256"]] == [64]
    assert "images_sha256" not in build


def test_limit_takes_the_first_that_have_captions(
    tmp_path: Path, three: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--images", three[0], "--annotations", three[1], "--limit")
    shardset = run("coco", *words, 2, out=tmp_path / "two")
    assert list(shardset.keys()) == ["000000000003", "000000000001"]
    assert "only the first 2 of 3 photos, by --limit" in capsys.readouterr().out
    assert run("coco", *words, 9, out=tmp_path / "all").num_samples == 3
    assert fails(capsys, "coco", *words, 0, out=tmp_path / "x") == (
        "pvtcap: error: --limit: out of range; got 0; wanted 1 or more\n"
    )


@pytest.mark.parametrize("kind", ["folders", "zips", "both", "parent", "2017"])
def test_karpathys_train_is_train_and_restval(
    tmp_path: Path,
    karpathy: Path,
    coco2014: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    train, val = coco2014
    for number in SPLITS:
        draw(tmp_path / "train2017" / f"{number:012d}.jpg", number)
    places = {
        "folders": [train, val],
        "zips": [zipped(train, "train2014"), zipped(val, "val2014")],
        "both": [zipped(train, "."), val],
        "parent": [tmp_path / "coco"],
        "2017": [tmp_path / "train2017"],
    }[kind]
    words = ("--images", *places, "--karpathy", karpathy, "--split")
    shardset = run("coco", *words, "train", out=tmp_path / "train")
    told = capsys.readouterr().out
    assert "photos of dataset_coco.json: 2 train + 2 restval, restval joined to train as everyone does" in told
    assert "captions mended, newlines and stray spaces: 4" in told
    numbers = [9, 25, 30, 42]
    assert list(shardset.keys()) == [name_2014(number).removesuffix(".jpg") for number in numbers]
    for number in numbers:
        found = text_of(shardset, name_2014(number).removesuffix(".jpg"))
        assert found == (number, (f"Photo {number}.", f"Photo {number} again."), (40 + number, 30))
    assert len(shardset.manifest.build["karpathy_sha256"]) == 64
    # Wherever the photos come from, the bytes are those of the first kind.
    again = run("coco", "--images", train, val, "--karpathy", karpathy, "--split", "train", out=tmp_path / "2/train")
    assert tars(shardset) == tars(again)


@pytest.mark.parametrize(
    ("split", "numbers", "note"),
    [
        ("val", [34], "1 val\n"),
        ("restval", [30, 42], "2 restval\n"),
        ("val, test", [34, 36], "1 val + 1 test\n"),
        ("test,train", [9, 25, 30, 36, 42], "2 train + 1 test + 2 restval, restval joined to train as everyone does\n"),
        ("train,restval", [9, 25, 30, 42], "2 train + 2 restval\n"),
    ],
)
def test_other_splits_of_karpathys(
    tmp_path: Path,
    karpathy: Path,
    coco2014: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    split: str,
    numbers: list[int],
    note: str,
) -> None:
    # --images given twice adds up as well.
    words = ("--images", coco2014[0], "--images", coco2014[1], "--karpathy", karpathy, "--split", split)
    shardset = run("coco", *words, out=tmp_path / "split")
    assert [int(key[-12:]) for key in shardset.keys()] == numbers  # noqa: SIM118
    assert f"photos of dataset_coco.json: {note}" in capsys.readouterr().out


def test_a_zip_is_read_in_the_workers(tmp_path: Path, karpathy: Path, coco2014: tuple[Path, Path]) -> None:
    places = [str(zipped(folder, folder.name)) for folder in coco2014]
    words = ["--images", *places, "--karpathy", str(karpathy), "--split", "train,val,test", "--out"]
    for processes in ("1", "2"):
        script("coco")([*words, str(tmp_path / processes / "coco"), "--processes", processes])
    one, two = (ShardSet.open(tmp_path / processes / "coco") for processes in ("1", "2"))
    assert one.num_samples == 6
    assert tars(one) == tars(two)


def test_several_files_of_annotations_are_joined(tmp_path: Path, three: tuple[Path, Path]) -> None:
    train = [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg"}, {"id": 1, "file_name": "000000000001.jpg"}]
    captions = [
        {"id": 1, "image_id": 7, "caption": "Seven."},
        {"id": 2, "image_id": 2, "caption": "Of a photo in the other file."},
        {"id": 70, "image_id": 1, "caption": "Caption 0."},
    ]
    other = official(tmp_path, train, captions, "captions_train2014.json")
    draw(tmp_path / "train2014/COCO_train2014_000000000007.jpg", 7)
    words = ("--images", three[0], tmp_path / "train2014", "--annotations", three[1], other, "--max-skipped", "0.5")
    shardset = run("coco", *words, out=tmp_path / "joined")
    assert [int(key[-12:]) for key in shardset.keys()] == [3, 1, 2, 7]  # noqa: SIM118
    assert text_of(shardset, "000000000002")[1] == ("Caption 1.", "Caption 5.", "Of a photo in the other file.")
    assert shardset.manifest.skipped == {"duplicate image_id": 1, "duplicate annotation id": 1}
    assert len(shardset.manifest.build["annotations_sha256"]) == 2


def test_a_list_chooses_by_name_or_by_cocos_number(
    tmp_path: Path, three: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    names = tmp_path / "list.txt"
    names.write_text(
        "val2014/COCO_val2014_000000000002.jpg\n\n000000000003.jpg\nCOCO_train2014_000000000099.jpg\nown.jpg\n"
    )
    words = ("--images", three[0], "--annotations", three[1], "--list", names)
    assert "2 of 4 candidates had to be left out" in fails(capsys, "coco", *words, out=tmp_path / "x")
    shardset = run("coco", *words, "--max-skipped", "0.5", out=tmp_path / "listed")
    assert list(shardset.keys()) == ["000000000003", "000000000002"]  # the annotations' order, not the list's
    assert skipped(shardset) == [
        {"key": "COCO_train2014_000000000099.jpg", "reason": "not in the annotations", "detail": ""},
        {"key": "own.jpg", "reason": "not in the annotations", "detail": ""},
    ]
    assert "photos of the annotations that are not in list.txt: 1" in capsys.readouterr().out
    names.write_text("own.jpg\n")
    assert fails(capsys, "coco", *words, out=tmp_path / "x") == (
        f"pvtcap: error: {names}: no photo of the list has captions; got own.jpg; "
        "wanted names such as 000000000003.jpg\n"
    )


def test_grey_and_cmyk_become_rgb_and_other_names_stay_apart(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    modes = ["L", "CMYK", "RGB"]
    for number, mode in enumerate(modes, start=1):
        draw(photos / f"{number}.jpg", number, mode)
    draw(photos / "000000000009.jpg", 9)
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in (1, 2, 3, 9)]
    captions = [{"id": number, "image_id": number, "caption": "A square."} for number in (1, 2, 3, 9)]
    annotations = official(tmp_path, images, captions)
    words = ("--images", photos, "--annotations", annotations, "--max-skipped", "0.3")
    shardset = run("coco", *words, out=tmp_path / "coco")
    assert list(shardset.keys()) == ["1", "2", "3"]
    with ShardReader(shardset) as reader:
        for index, mode in enumerate(modes):
            stored = Image.open(io.BytesIO(reader.read(0, index).photo))
            with Image.open(photos / f"{index + 1}.jpg") as given:
                assert given.mode == mode
            assert (stored.format, stored.mode, stored.size) == ("JPEG", "RGB", (41 + index, 30))
    # 9.jpg is none of COCO's names, so 000000000009.jpg is another dataset's photo, whatever the id says.
    assert skipped(shardset) == [{"key": "9", "reason": "missing photo", "detail": "no 9.jpg among the photos"}]


def test_dirt_in_karpathys_file(
    tmp_path: Path, karpathy: Path, coco2014: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(karpathy.read_text())
    images = content["images"]
    val = {"filepath": "val2014", "filename": name_2014(34), "split": "val", "cocoid": 34, "sentences": []}
    images += [
        {"filename": "no split"},
        {**val, "cocoid": "50"},
        {**val, "cocoid": 51, "sentences": "none"},
        {**val, "cocoid": 52, "filename": "../../secret.jpg", "sentences": [{"sentid": 1, "raw": "a"}]},
        {**val, "cocoid": 53, "filename": "53.jpg"},
        {**val, "cocoid": 54, "filename": "54.jpg", "sentences": ["x", {"raw": "b"}, {"sentid": 340, "raw": "c"}]},
        {**val, "filename": "again.jpg"},
        {**val, "cocoid": "of another split, so nobody's business", "split": "test"},
    ]
    write_json(karpathy, content)
    words = ("--images", *coco2014, "--karpathy", karpathy, "--split", "val", "--max-skipped", "1")
    shardset = run("coco", *words, out=tmp_path / "val")
    assert shardset.num_samples == 1
    assert shardset.manifest.skipped == {
        "duplicate annotation id": 1,
        "duplicate image_id": 1,
        "malformed annotation": 2,
        "malformed image": 3,
        "name outside the folder": 1,
        "no captions": 2,
    }
    assert skipped(shardset)[0] == {
        "key": "dataset_coco.json images[6]",
        "reason": "malformed image",
        "detail": "split: got nothing, wanted text",
    }


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "no captions; wanted --annotations FILE [FILE ...], or --karpathy FILE --split NAME"),
        (
            ("--annotations", "a.json", "--split", "val"),
            "--split: COCO's own annotations have no splits; got val. "
            "Give --karpathy FILE instead of --annotations, or --list with the split's file of names.",
        ),
        (
            ("--annotations", "a.json", "--karpathy", "k.json", "--split", "val"),
            "--karpathy: the captions are named twice; got --annotations as well. "
            "Leave --annotations out, as Karpathy's file has the captions; or choose from them with --list.",
        ),
        (
            ("--karpathy", "k.json", "--split", "val", "--list", "list.txt"),
            "--karpathy: the photos are chosen twice; got --list as well. "
            "Choose with --split, or give --annotations instead of --karpathy.",
        ),
        (
            ("--karpathy", "k.json"),
            "--karpathy: no split chosen; wanted --split train, restval, val or test",
        ),
    ],
)
def test_options_that_do_not_go_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], complaint: str
) -> None:
    told = fails(capsys, "coco", "--images", tmp_path, *words, out=tmp_path / "x")
    assert told == f"pvtcap: error: {complaint}\n"


def test_a_photo_is_taken_from_the_first_place_that_has_it(tmp_path: Path, three: tuple[Path, Path]) -> None:
    images, annotations = three
    draw(tmp_path / "other/000000000001.jpg", 60)
    archive = zipped(tmp_path / "other", "val2017")
    for number, (places, width) in enumerate([((images, archive), 41), ((archive, images), 100)]):
        out = tmp_path / str(number)
        shardset = run("coco", "--images", *places, "--annotations", annotations, out=out)
        assert text_of(shardset, "000000000001")[2] == (width, 30)


def test_places_that_hold_no_photos(
    tmp_path: Path, three: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images, annotations = three
    words = ("--annotations", annotations, "--images", images)
    none, damaged = tmp_path / "none.zip", tmp_path / "damaged.zip"
    assert "none.zip: no such folder or ZIP" in fails(capsys, "coco", *words, none, out=tmp_path / "x")
    assert "neither a folder nor a ZIP" in fails(capsys, "coco", *words, annotations, out=tmp_path / "x")
    # Its list of members is at the end, and zipfile looks there: in a copy that lost its middle, and in half of one.
    whole = zipped(images, "val2017").read_bytes()
    for lost in (whole.replace(b"PK\x01\x02", b"PKPK"), whole[: len(whole) // 2]):
        damaged.write_bytes(lost)
        assert "damaged.zip: damaged ZIP" in fails(capsys, "coco", *words, damaged, out=tmp_path / "x")
