"""pytest tests/test_coco_real.py: COCO's own val2017 annotations, of whose 5,000 photos 128 are at hand."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from test_builders import DATA, fails, run
from test_coco import skipped, tars

from pvtcap.shardset import ShardReader
from pvtcap.shardverify import verify

COCO = DATA / "coco"
NAMES = COCO / "karpathy_split_names"

needs_coco = pytest.mark.skipif(not COCO.is_dir(), reason="shared/data/coco is not here")


@pytest.fixture(scope="module")
def val2017() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((COCO / "annotations/captions_val2017.json").read_text())
    return content


@needs_coco
def test_real_coco_with_most_photos_missing(
    tmp_path: Path, val2017: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    present = {photo.name for photo in (COCO / "val2017").iterdir()}
    images = [image for image in val2017["images"] if image["file_name"] in present]
    captions: dict[int, list[str]] = {image["id"]: [] for image in val2017["images"]}
    num_dirty = 0
    for annotation in val2017["annotations"]:
        clean = " ".join(annotation["caption"].split())
        num_dirty += clean != annotation["caption"]
        captions[annotation["image_id"]].append(clean)
    wanted = [(image["id"], tuple(captions[image["id"]])) for image in images]

    words = ("--annotations", COCO / "annotations/captions_val2017.json")
    assert "4,872 of 5,000 candidates had to be left out" in fails(
        capsys, "coco", "--images", COCO / "val2017", *words, out=tmp_path / "x"
    )
    words += ("--max-skipped", "0.98", "--samples-per-shard", "50")
    shardset = run("coco", "--images", COCO / "val2017", *words, out=tmp_path / "folder/val2017")
    told = capsys.readouterr().out
    assert f"captions mended, newlines and stray spaces: {num_dirty:,}\n" in told
    assert num_dirty == 3803
    assert "missing photo │ 4,872 │ 000000397133" in told

    with ShardReader(shardset) as reader:
        samples = [reader.read(shard, index) for shard, size in enumerate(shardset.sizes) for index in range(size)]
    assert [(sample.image_id, sample.captions) for sample in samples] == wanted
    assert (shardset.num_samples, shardset.num_captions) == (128, sum(len(texts) for _, texts in wanted)) == (128, 641)
    assert sum(len(texts) == 6 for _, texts in wanted) == 1
    assert not any("\n" in caption or "  " in caption for sample in samples for caption in sample.captions)
    assert {Image.open(io.BytesIO(sample.photo)).mode for sample in samples} == {"RGB"}

    missing = [image["file_name"] for image in val2017["images"] if image["file_name"] not in present]
    assert shardset.manifest.skipped == {"missing photo": 4872} == {"missing photo": len(missing)}
    assert [item["key"] + ".jpg" for item in skipped(shardset)] == missing
    assert verify(shardset.path) == []

    with zipfile.ZipFile(tmp_path / "val2017.zip", "w") as file:
        for photo in sorted((COCO / "val2017").iterdir(), reverse=True):
            file.write(photo, f"val2017/{photo.name}")
    again = run("coco", "--images", tmp_path / "val2017.zip", *words, out=tmp_path / "zip/val2017")
    assert tars(again) == tars(shardset)
    assert skipped(again) == skipped(shardset)


@needs_coco
def test_real_list_of_2014_chooses_photos_of_2017(
    tmp_path: Path, val2017: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    listed = {int(Path(name).stem[-12:]) for name in (NAMES / "coco_test.txt").read_text().split()}
    chosen = [image for image in val2017["images"] if image["id"] in listed]
    present = [image["id"] for image in chosen if (COCO / "val2017" / image["file_name"]).exists()]
    words = ("--images", COCO / "val2017", "--annotations", COCO / "annotations/captions_val2017.json")
    words += ("--list", NAMES / "coco_test.txt", "--max-skipped", "1")
    shardset = run("coco", *words, out=tmp_path / "test")
    assert f"photos of the annotations that are not in coco_test.txt: {5000 - len(chosen):,}" in capsys.readouterr().out
    assert [int(key) for key in shardset.keys()] == present  # noqa: SIM118
    assert (len(listed), len(chosen), len(present)) == (5000, 593, 12)
    assert shardset.manifest.skipped == {"missing photo": 581, "not in the annotations": 4407}
    limited = run("coco", *words, "--limit", 100, out=tmp_path / "100")
    assert limited.num_samples == sum(image["id"] in present for image in chosen[:100])
    assert limited.manifest.skipped == {"missing photo": 100 - limited.num_samples, "not in the annotations": 4407}
