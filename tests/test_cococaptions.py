"""pytest tests/test_cococaptions.py: files of annotations that are dirty, damaged, or something else.

What the builder makes of sound ones is in test_coco.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_builders import fails, run
from test_coco import draw, official, skipped, write_json, zipped

DIRTY_IMAGES: list[Any] = [
    {"id": 1, "file_name": "1.jpg"},
    {"id": 2, "file_name": "2.jpg"},
    {"id": 1, "file_name": "3.jpg"},
    {"id": 4, "file_name": "2.jpg"},
    {"id": 5, "file_name": "../secret.jpg"},
    {"id": 6, "file_name": "a/../../secret2.jpg"},
    {"id": 7, "file_name": "/etc/secret3.jpg"},
    {"id": 8, "file_name": "gone.jpg"},
    {"id": 9, "file_name": "uncaptioned.jpg"},
    {"id": 10, "file_name": "passwd"},
    {"id": 11, "file_name": "half\ud800.jpg"},
    {"id": 12, "file_name": "zero\0.jpg"},
    {"id": "13", "file_name": "1.jpg"},
    {"id": True, "file_name": "1.jpg"},
    {"id": 14},
    {"id": 15, "file_name": ["1.jpg"]},
    "16.jpg",
    {"id": 17, "file_name": "x" * 300 + ".jpg"},
    {"id": 18, "file_name": "folder.jpg"},
]
DIRTY_ANNOTATIONS: list[Any] = [
    {"id": 1, "image_id": 1, "caption": " one\nof  two "},
    {"id": 2, "image_id": 1, "caption": ""},
    {"id": 1, "image_id": 2, "caption": "again"},
    {"id": 3, "image_id": 2, "caption": 3},
    {"id": 4, "image_id": 2, "caption": None},
    {"id": 5, "image_id": 2},
    {"id": 6, "image_id": "2", "caption": "text"},
    {"id": None, "image_id": 2, "caption": "text"},
    ["a list"],
    {"id": 7, "image_id": 77, "caption": "nowhere"},
    {"id": 8, "image_id": 2, "caption": "half \ud83d a pair"},
    *({"id": 100 + image_id, "image_id": image_id, "caption": "more"} for image_id in (4, 5, 6, 7, 8, 17, 18)),
]


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_dirt_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    photos = tmp_path / "photos"
    for number in (1, 2):
        draw(photos / f"{number}.jpg", number)
    draw(photos / "secret.jpg", 5)
    draw(tmp_path / "secret.jpg", 5)
    (photos / "folder.jpg").mkdir()
    annotations = official(tmp_path, DIRTY_IMAGES, DIRTY_ANNOTATIONS)
    place = photos if kind == "folder" else zipped(photos, "photos")
    words = ("--images", place, "--annotations", annotations, "--max-skipped", "1")
    shardset = run("coco", *words, out=tmp_path / "dirty")
    assert list(shardset.captions()) == [("one of two",), ("half ? a pair",)]
    assert shardset.manifest.skipped == {
        "caption of no image": 1,
        "duplicate annotation id": 1,
        "duplicate image_id": 1,
        "duplicate key": 1,
        "empty caption": 1,
        "malformed annotation": 6,
        "malformed image": 5,
        "missing photo": 2 if kind == "folder" else 3,  # a folder in a ZIP is no member of that name
        "name outside the folder": 3,
        "no captions": 1,
        "not a photo's name": 3,
    } | ({"unreadable photo": 1} if kind == "folder" else {})
    told = capsys.readouterr().out
    assert "captions mended, newlines and stray spaces: 2" in told
    assert "../secret.jpg" in told
    items = skipped(shardset)
    assert items[:5] == [
        {"key": "image 1", "reason": "duplicate image_id", "detail": "3.jpg: same as 1.jpg"},
        {"key": "image 10", "reason": "not a photo's name", "detail": '"passwd"'},
        {"key": "image 11", "reason": "not a photo's name", "detail": r'"half\ud800.jpg"'},
        {"key": "image 12", "reason": "not a photo's name", "detail": r'"zero\u0000.jpg"'},
        {
            "key": "captions_val2017.json images[12]",
            "reason": "malformed image",
            "detail": 'id: got "13", wanted a whole number',
        },
    ]
    details = {item["key"].removeprefix("captions_val2017.json "): item["detail"] for item in items}
    assert details["images[13]"] == "id: got true, wanted a whole number"
    assert details["images[14]"] == "file_name: got nothing, wanted text"
    assert details["images[15]"] == "file_name: got a list, wanted text"
    assert details["images[16]"] == 'got "16.jpg", wanted an object'
    assert details["annotations[3]"] == "caption: got 3, wanted text"
    assert details["annotations[4]"] == details["annotations[5]"] == "caption: got nothing, wanted text"
    assert details["annotations[8]"] == "got a list, wanted an object"
    assert (details["caption 7"], details["uncaptioned"]) == ("image_id 77", "image_id 9")


IMAGE = {"id": 1, "file_name": "1.jpg"}
CAPTION = {"id": 1, "image_id": 1, "caption": "One."}
TWO_LISTS = 'wanted a list "images" and a list "annotations"'
NOT_COCO = f"not COCO's annotations; got {{}}; {TWO_LISTS}"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "not JSON: Expecting value: line 1 column 1 (char 0)"),
        ('{"images": [', "not JSON: Expecting value: line 1 column 13 (char 12)"),
        ("[]", NOT_COCO.format("a list")),
        ('"text"', NOT_COCO.format('"text"')),
        ("{}", NOT_COCO.format("images: got nothing")),
        ({"annotations": [CAPTION]}, NOT_COCO.format("images: got nothing")),
        ({"images": {}, "annotations": []}, NOT_COCO.format("images: got an object")),
        ({"images": [], "annotations": "x"}, NOT_COCO.format('annotations: got "x"')),
        (
            {"images": [IMAGE]},
            NOT_COCO.format("annotations: got nothing") + ". Is it a file for --karpathy?",
        ),
        ({"images": [], "annotations": []}, "no captions to be used; got no captions at all"),
        ({"images": [IMAGE], "annotations": []}, "no captions to be used; got no captions at all"),
        (
            {"images": [], "annotations": [CAPTION]},
            "no captions to be used; got caption 1 (caption of no image: image_id 1)",
        ),
        (
            {"images": [IMAGE], "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4]}]},
            "no captions to be used; got captions.json annotations[0] "
            "(malformed annotation: caption: got nothing, wanted text)",
        ),
    ],
)
def test_files_that_are_no_annotations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, complaint: str
) -> None:
    path = tmp_path / "captions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    told = fails(capsys, "coco", "--images", tmp_path, "--annotations", path, out=tmp_path / "x")
    assert told == f"pvtcap: error: {path}: {complaint}\n"


def test_json_that_python_will_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "captions.json"
    words = ("--images", tmp_path, "--annotations", path)
    for content in ("[" * 100_000, '{"images": [], "annotations": [' + "1" * 5000 + "]}"):
        path.write_text(content)
        assert f"{path}: not JSON: " in fails(capsys, "coco", *words, out=tmp_path / "x")
    path.write_bytes(b'{"images": "caf\xe9"}')
    assert "not UTF-8 text; got byte 0xe9 at 15" in fails(capsys, "coco", *words, out=tmp_path / "x")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"images": [IMAGE], "annotations": [CAPTION]}, "not Karpathy's dataset_coco.json; got annotations; "
         'wanted a list "images". Is it a file for --annotations?'),
        ({"annotations": [CAPTION]}, "not Karpathy's dataset_coco.json; got images: got nothing; "
         'wanted a list "images"'),
        ({"images": [IMAGE]}, "no captions to be used; got {} images[0] (malformed image: split: got nothing, "
         "wanted text)"),
        ({"images": 3}, 'not Karpathy\'s dataset_coco.json; got images: got 3; wanted a list "images"'),
        # Flickr's file, which has no cocoid
        ({"images": [{"filename": "1.jpg", "split": "val", "sentences": []}]}, "no captions to be used; "
         "got {} images[0] (malformed image: cocoid: got nothing, wanted a whole number)"),
        ({"images": [{"split": "dev"}, {"split": "test"}]}, "no such split; got val; wanted dev, test"),
    ],
)  # fmt: skip
def test_files_that_are_not_karpathys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: object, complaint: str
) -> None:
    path = write_json(tmp_path / "dataset.json", content)
    told = fails(capsys, "coco", "--images", tmp_path, "--karpathy", path, "--split", "val", out=tmp_path / "x")
    assert told == f"pvtcap: error: {path}: {complaint.format(path.name)}\n"
