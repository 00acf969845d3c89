"""pytest tests/test_builders.py"""

from __future__ import annotations

import io
import itertools
import json
import runpy
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from pvtcap.shardset import ShardReader, ShardSet
from pvtcap.shardverify import verify

SHARDS = Path(__file__).parents[1] / "shards"
DATA = Path(__file__).parents[2] / "shared/data"
FLICKR8K = DATA / "flickr8k"

needs_flickr8k = pytest.mark.skipif(not FLICKR8K.is_dir(), reason="shared/data/flickr8k is not here")


def run(builder: str, *words: object, out: Path) -> ShardSet:
    """Run a builder in this process, as ``pvtcap shards`` would, and open what it built."""
    script(builder)([*map(str, words), "--out", str(out), "--processes", "1"])
    return ShardSet.open(out)


def fails(capsys: pytest.CaptureFixture[str], builder: str, *words: object, out: Path) -> str:
    """Run a builder that must fail; gives its one line on stderr, and sees that nothing was left behind."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        script(builder)([*map(str, words), "--out", str(out), "--processes", "1"])
    assert caught.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("pvtcap: error: ")
    assert told.count("\n") == 1
    assert not out.exists()
    return told


def script(builder: str) -> Callable[[list[str]], None]:
    main: Callable[[list[str]], None] = runpy.run_path(str(SHARDS / f"{builder}.py"))["main"]
    return main


def text_of(shardset: ShardSet, key: str) -> tuple[int | str, tuple[str, ...], tuple[int, int]]:
    with ShardReader(shardset) as reader:
        for shard, size in enumerate(shardset.sizes):
            for index in range(size):
                if reader.key(shard, index) == key:
                    sample = reader.read(shard, index)
                    return sample.image_id, sample.captions, (sample.width, sample.height)
    raise AssertionError(key)


def draw(path: Path, width: int = 40, height: int = 30) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), "teal").save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for name in ("1.jpg", "2.png", "cats/3.jpg", "4.jpg"):
        draw(tmp_path / "photos" / name)
    return tmp_path / "photos"


@pytest.mark.parametrize("builder", ["coco", "flickr30k", "flickr8k", "folder", "shapes"])
def test_help_and_docstring_open_with_the_command(builder: str) -> None:
    done = subprocess.run(
        [sys.executable, SHARDS / f"{builder}.py", "--help"], capture_output=True, text=True, check=True
    )
    assert "--samples-per-shard" in done.stdout
    text = (SHARDS / f"{builder}.py").read_text()
    assert text.startswith(f'"""pvtcap shards {builder} --')


def test_folder_from_jsonl(tmp_path: Path, photos: Path) -> None:
    rows = [
        {"file": "1.jpg", "captions": ["one", " two\nlines "]},
        {"image": "2.png", "caption": "a drawing"},
        {"file_name": "./cats/3.jpg", "caption": "a cat"},
        {"file": "1.jpg", "caption": "three"},
    ]
    captions = tmp_path / "captions.jsonl"
    captions.write_text("\ufeff" + "\n".join(json.dumps(row) for row in rows) + "\n\n", encoding="utf-8")
    shardset = run("folder", "--images", photos, "--captions", captions, out=tmp_path / "mine")
    assert list(shardset.keys()) == ["1", "2", "cats_3"]
    assert text_of(shardset, "1") == ("1", ("one", "two lines", "three"), (40, 30))
    assert text_of(shardset, "cats_3")[0] == "cats/3"
    assert verify(tmp_path / "mine") == []


def test_folder_from_csv(tmp_path: Path, photos: Path) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text('file,caption\n1.jpg,one\n2.png,"a ""drawing"",\nof two lines"\n1.jpg,two\n')
    shardset = run("folder", "--images", photos, "--captions", captions, out=tmp_path / "mine")
    assert list(shardset.captions()) == [("one", "two"), ('a "drawing", of two lines',)]


def test_folder_reports_what_it_left_out(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (photos / "broken.jpg").write_text("no photo")
    draw(tmp_path / "secret.jpg")
    captions = tmp_path / "captions.jsonl"
    names = ["1.jpg", "gone.jpg", "../secret.jpg", "cats/../../secret.jpg", str(tmp_path / "secret.jpg"), "broken.jpg"]
    lines = [json.dumps({"file": name, "captions": ["a cat", ""]}) for name in names]
    captions.write_text("\n".join([*lines, "no json", '{"file": "2.png"}', '{"file": "2.png", "captions": [3]}']))
    words = ("--images", photos, "--captions", captions)
    told = fails(capsys, "folder", *words, out=tmp_path / "mine")
    assert "8 of 9 candidates had to be left out" in told
    shardset = run("folder", *words, "--max-skipped", "0.9", out=tmp_path / "mine")
    assert shardset.manifest.skipped == {
        "missing photo": 1,
        "name outside the folder": 3,
        "not a photo": 1,
        "not a caption line": 3,
        "empty caption": 1,
    }
    table = capsys.readouterr().out
    assert "name outside the folder" in table
    assert "../secret.jpg" in table


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("captions.jsonl", b"", "nothing to build from"),
        ("captions.csv", b"photo,text\n1.jpg,one\n", "wrong header"),
        ("captions.xlsx", b"", "unknown kind of caption file"),
        ("captions.csv", b"file,caption\n1.jpg,caf\xe9\n", "not UTF-8"),
        (None, b"", "No such file"),
    ],
)
def test_folder_with_a_bad_caption_file(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], name: str | None, content: bytes, complaint: str
) -> None:
    captions = tmp_path / (name or "captions.jsonl")
    if name is not None:
        captions.write_bytes(content)
    assert complaint in fails(capsys, "folder", "--images", photos, "--captions", captions, out=tmp_path / "mine")


def test_folder_without_its_photos(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    captions = tmp_path / "captions.csv"
    captions.write_text("file,caption\n1.jpg,one\n")
    words = ("--captions", captions)
    assert "no such folder" in fails(capsys, "folder", "--images", tmp_path / "none", *words, out=tmp_path / "mine")
    assert "not a folder" in fails(capsys, "folder", "--images", captions, *words, out=tmp_path / "mine")
    assert "--jpeg-quality" in fails(
        capsys, "folder", "--images", photos, *words, "--jpeg-quality", "0", out=tmp_path / "mine"
    )


TOKENS = """\
1.jpg#0\tone .
1.jpg#1\tone again .
2.png#0  spaces for a tab .
3.jpg.1#0\tno photo
no caption line
4.jpg#0\t
4.jpg#1\tfour
5.jpg#0
"""


def test_flickr_token_file(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, names = tmp_path / "tokens.txt", tmp_path / "list.txt"
    tokens.write_text(TOKENS)
    words = ("--images", photos, "--captions", tokens, "--max-skipped", "0.9")
    shardset = run("flickr8k", *words, out=tmp_path / "all")
    assert list(shardset.keys()) == ["1", "2", "4"]
    assert list(shardset.captions()) == [("one .", "one again ."), ("spaces for a tab .",), ("four",)]
    assert shardset.manifest.skipped == {
        "not a photo's name": 1,
        "not a caption line": 1,
        "empty caption": 1,
        "no caption": 1,
    }
    assert "mended, spaces where the tab should be: 1" in capsys.readouterr().out
    names.write_text("4.jpg\n\n9.jpg\n1.jpg\n")
    shardset = run("flickr30k", *words, "--list", names, out=tmp_path / "listed")
    assert list(shardset.keys()) == ["4", "1"]
    assert text_of(shardset, "4")[0] == 4
    assert shardset.manifest.skipped["no captions"] == 1
    assert "not in list.txt: 2" in capsys.readouterr().out
    names.write_text("9.jpg\n")
    assert "no photo of the list has captions" in fails(capsys, "flickr8k", *words, "--list", names, out=tmp_path / "x")
    assert "has no splits" in fails(capsys, "flickr8k", *words, "--split", "val", out=tmp_path / "x")
    tokens.write_text("nothing of use\n")
    assert "no captions in the file" in fails(capsys, "flickr8k", *words, out=tmp_path / "x")


def test_karpathy_json_and_a_zip(tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, captions = tmp_path / "photos.zip", tmp_path / "dataset_flickr8k.json"
    with zipfile.ZipFile(archive, "w") as file:
        for photo in sorted(photos.rglob("*.*")):
            file.write(photo, f"Flicker8k_Dataset/{photo.name}")
    images = [
        {"filename": name, "split": split, "imgid": number, "sentences": [{"raw": f"caption of {name}"}]}
        for number, (name, split) in enumerate(
            [("1.jpg", "train"), ("2.png", "val"), ("3.jpg", "restval"), ("4.jpg", "test")]
        )
    ]
    captions.write_text(json.dumps({"images": images, "dataset": "flickr8k"}))
    words = ("--images", archive, "--captions", captions)
    shardset = run("flickr8k", *words, "--split", "train,restval", out=tmp_path / "train")
    assert list(shardset.captions()) == [("caption of 1.jpg",), ("caption of 3.jpg",)]
    assert shardset.manifest.build["split"] == "train,restval"
    assert len(shardset.manifest.build["captions_sha256"]) == 64
    assert "images_sha256" not in shardset.manifest.build
    assert run("flickr30k", *words, out=tmp_path / "all").num_samples == 4
    assert "no such split; got dev; wanted restval, test, train, val" in fails(
        capsys, "flickr8k", *words, "--split", "dev", out=tmp_path / "x"
    )
    captions.write_text(json.dumps({"annotations": []}))
    assert "not one of Karpathy's files" in fails(capsys, "flickr8k", *words, out=tmp_path / "x")
    captions.write_text("{")
    assert "not JSON" in fails(capsys, "flickr8k", *words, out=tmp_path / "x")


def test_shapes_are_deterministic_and_hold_compositions_back(tmp_path: Path) -> None:
    train = run("shapes", "--num-samples", 300, "--image-px", 32, out=tmp_path / "a/train")
    run("shapes", "--num-samples", 300, "--image-px", 32, out=tmp_path / "b/train")
    for file in (tmp_path / "a/train").iterdir():
        assert file.read_bytes() == (tmp_path / "b/train" / file.name).read_bytes()
    val = run("shapes", "--num-samples", 100, "--image-px", 32, "--split", "val", out=tmp_path / "val")
    other = run("shapes", "--num-samples", 100, "--image-px", 32, "--seed", 1, out=tmp_path / "other")
    assert list(train.captions())[:100] != list(other.captions())
    # "a small red circle at the top": what val shows is new as a whole, and familiar word by word and pair by pair.
    shown = [{tuple(captions[0].split(maxsplit=4)[1:]) for captions in each.captions()} for each in (train, val)]
    assert shown[0].isdisjoint(shown[1])
    drawing = runpy.run_path(str(SHARDS / "shapes.py"))
    all_shown = {split: set(drawing["compositions"](split)) for split in ("train", "val")}
    assert [len(all_shown["train"]), len(all_shown["val"])] == [360, 40]
    for pair in itertools.combinations(range(4), 2):
        seen, asked = ({tuple(words[i] for i in pair) for words in all_shown[split]} for split in ("train", "val"))
        assert asked <= seen
    assert all(len(set(captions)) == 5 for captions in train.captions())
    with ShardReader(train) as reader:
        image = Image.open(io.BytesIO(reader.read(0, 0).photo))
        assert image.size == (32, 32)
        assert image.convert("L").getextrema() != (0, 0)


def test_shapes_that_cannot_be_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to build from" in fails(capsys, "shapes", "--num-samples", 0, out=tmp_path / "none")
    words = ("--num-samples", 1, "--image-px", 8)
    assert "--image-px: too small" in fails(capsys, "shapes", *words, out=tmp_path / "none")


def test_the_colour_in_the_caption_is_in_the_picture(tmp_path: Path) -> None:
    drawing = runpy.run_path(str(SHARDS / "shapes.py"))
    shardset = run("shapes", "--num-samples", 60, out=tmp_path / "shapes")
    with ShardReader(shardset) as reader:
        for index in range(60):
            sample = reader.read(0, index)
            _, _, colour, _, place = sample.captions[0].split(maxsplit=4)
            image = Image.open(io.BytesIO(sample.photo)).convert("RGB")
            found = image.getpixel(tuple(round(64 * at) for at in drawing["PLACES"][place]))
            wanted = drawing["COLOURS"][colour]
            assert isinstance(found, tuple)
            assert max(abs(a - b) for a, b in zip(found, wanted, strict=True)) < 60, (index, sample.captions[0])


def test_ctrl_c_says_that_it_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--num-samples", "30", "--image-px", "16", "--samples-per-shard", "5", "--processes", "1"]
    words += ["--out", str(tmp_path / "shapes")]
    frombytes = Image.frombytes
    drawn = 0

    def interrupted(*args: object) -> Image.Image:
        nonlocal drawn
        drawn += 1
        if drawn == 25:
            raise KeyboardInterrupt
        return frombytes(*args)  # type: ignore[arg-type]

    main = script("shapes")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "frombytes", interrupted)
        with pytest.raises(SystemExit) as caught:
            main(words)
    assert caught.value.code == 130
    assert "interrupted; finished shards are kept" in capsys.readouterr().err
    main(words)
    assert "15 samples were there from an interrupted run" in capsys.readouterr().out
    assert verify(tmp_path / "shapes") == []


@needs_flickr8k
def test_real_flickr8k_with_its_dirt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = tmp_path / "names.txt"
    chosen = (FLICKR8K / "Flickr_8k.trainImages.txt").read_text().split()[:198]
    # A photo that decodes although it is visibly broken, and the one whose caption lacks its tab.
    chosen += [name for name in ("1798209205_77dbf525b0.jpg", "496555371_3e1ee0d97d.jpg") if name not in chosen]
    names.write_text("\n".join(chosen))
    words = ("--images", FLICKR8K / "images", "--captions", FLICKR8K / "Flickr8k.token.txt", "--list", names)
    shardset = run("flickr8k", *words, "--short-side-px", 64, "--samples-per-shard", 64, out=tmp_path / "flickr8k")
    told = capsys.readouterr().out
    assert "lines of Flickr8k.token.txt mended, spaces where the tab should be: 1" in told
    assert f"captioned photos that are not in names.txt: {5000 - len(chosen):,}" in told
    assert "not a photo's name" in told
    assert "2258277193_586949ec62.jpg.1" in told
    assert (shardset.num_samples, shardset.num_captions) == (len(chosen), 5 * len(chosen))
    assert shardset.manifest.skipped == {"not a photo's name": 1}
    image_id, captions, size = text_of(shardset, "496555371_3e1ee0d97d")
    assert (image_id, size) == ("496555371_3e1ee0d97d", (64, 64))
    assert captions[3] == "One black and white dog and two brown and white dogs moving on sand ."
    assert verify(tmp_path / "flickr8k") == []


@needs_flickr8k
def test_real_flickr8k_photos_are_stored_untouched(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join((FLICKR8K / "Flickr_8k.devImages.txt").read_text().split()[:20]))
    words = ("--images", FLICKR8K / "images", "--captions", FLICKR8K / "Flickr8k.token.txt", "--list", names)
    shardset = run("flickr8k", *words, out=tmp_path / "flickr8k")
    with ShardReader(shardset) as reader:
        for index in range(20):
            sample = reader.read(0, index)
            assert sample.photo == (FLICKR8K / "images" / f"{sample.key}.jpg").read_bytes()


@pytest.mark.skipif(not (DATA / "flickr30k").is_dir(), reason="shared/data/flickr30k is not here")
def test_real_flickr30k_captions_without_photos(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "photos").mkdir()
    words = ("--images", tmp_path / "photos", "--captions", DATA / "flickr30k/results_20130124.token")
    told = fails(capsys, "flickr30k", *words, out=tmp_path / "flickr30k")
    assert "2,014 of 2,014 candidates had to be left out" in told
    assert "1018148011 (missing photo)" in told


@pytest.mark.skipif(not (DATA / "broken/grayscale").is_dir(), reason="shared/data/broken is not here")
def test_real_grey_photos_become_rgb(tmp_path: Path) -> None:
    names = sorted(file.name for file in (DATA / "broken/grayscale").iterdir())
    captions = tmp_path / "captions.csv"
    captions.write_text("file,caption\n" + "".join(f"{name},a grey photo\n" for name in names))
    shardset = run("folder", "--images", DATA / "broken/grayscale", "--captions", captions, out=tmp_path / "grey")
    assert shardset.num_samples == len(names)
    with ShardReader(shardset) as reader:
        for index in range(len(names)):
            assert Image.open(io.BytesIO(reader.read(0, index).photo)).mode == "RGB"
