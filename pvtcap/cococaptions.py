"""COCO's files of captions, the official annotations and Karpathy's JSON, read into one form.

    {"images": [{"id", "file_name"}], "annotations": [{"id", "image_id", "caption"}]}              captions_val2017.json
    {"images": [{"cocoid", "filepath", "filename", "split", "sentences": [{"sentid", "raw"}]}]}    dataset_coco.json

COCO published the same photos under two names, COCO_val2014_000000000042.jpg in 2014 and 000000000042.jpg in 2017:
the twelve digits say which photo it is, whatever the year and the folder. What is wrong with a record is kept, with
its reason, for the builder to report.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pvtcap.candidate import clean_caption
from pvtcap.captionfiles import is_photo_name, read_json, read_names
from pvtcap.errors import ShardError
from pvtcap.shardset import SkippedItem

_COCO_NAME = re.compile(r"(?:COCO_(?:train|val|test)20\d\d_)?(\d{12})\.jpg")
_COCO_FOLDERS = {"train2014": "COCO_train2014_", "val2014": "COCO_val2014_", "train2017": "", "val2017": ""}
_KINDS = {int: "a whole number", str: "text", list: "a list"}


@dataclass(slots=True)
class CocoImage:
    """A photo by COCO's number and by its name in the file, with all its captions in file order."""

    image_id: int
    name: str
    captions: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return PurePosixPath(self.name).stem

    def names(self) -> list[str]:
        """Under which names the photo may be found: its own, then where COCO's releases have it."""
        base = PurePosixPath(self.name).name
        names = [self.name, base]
        if match := _COCO_NAME.fullmatch(base):
            for folder, prefix in _COCO_FOLDERS.items():
                names += [f"{folder}/{prefix}{match[1]}.jpg", f"{prefix}{match[1]}.jpg"]
        return list(dict.fromkeys(names))


@dataclass
class CocoCaptions:
    """Photos with captions in file order; ``notes`` are remarks for people, ``skipped`` what could not be used."""

    images: list[CocoImage]
    skipped: list[SkippedItem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def select(self, list_path: Path) -> CocoCaptions:
        """Only the photos that a list names, one name a line, in the order of ``images``.

        A name of 2014 chooses a photo of 2017 too. Raises ShardError when no photo of the list is there.
        """
        names = {_identity(name): name for name in read_names(list_path)}
        chosen = [image for image in self.images if _identity(image.name) in names]
        if not chosen:
            raise ShardError(
                "no photo of the list has captions",
                where=list_path,
                got=", ".join(list(names.values())[:3]) or "an empty file",
                wanted=f"names such as {self.images[0].name}",
            )
        there = {_identity(image.name) for image in chosen}
        missing = [
            SkippedItem(key=name, reason="not in the annotations")
            for identity, name in names.items()
            if identity not in there
        ]
        others = len(self.images) - len(chosen)
        notes = [*self.notes, f"photos of the annotations that are not in {list_path.name}: {others:,}"]
        return CocoCaptions(chosen, self.skipped + missing, notes)

    def usable(self, limit: int | None = None) -> CocoCaptions:
        """The first ``limit`` photos that have captions (all by default), and a note of how many captions are mended.

        A photo before them that has no captions becomes a SkippedItem.
        """
        images: list[CocoImage] = []
        skipped = list(self.skipped)
        for image in self.images:
            if len(images) == limit:
                break
            if image.captions:
                images.append(image)
            else:
                skipped.append(SkippedItem(key=image.key, reason="no captions", detail=f"image_id {image.image_id}"))
        notes = list(self.notes)
        if limit is not None:
            notes.append(f"only the first {len(images):,} of {len(self.images):,} photos, by --limit")
        if num_mended := sum(_is_mended(caption) for image in images for caption in image.captions):
            notes.append(f"captions mended, newlines and stray spaces: {num_mended:,}")
        return CocoCaptions(images, skipped, notes)


def read_annotations(paths: list[Path]) -> CocoCaptions:
    """Read COCO's official annotations, several files as if they were one.

    Raises ShardError for a file that is none, and when there is no caption in any.
    """
    collected = _Collected()
    for path in paths:
        _add_annotations(collected, path)
    return collected.captions(paths, notes=[])


def read_karpathy(path: Path, splits: str) -> CocoCaptions:
    """Read the ``splits`` (``"val"``, ``"val,test"``) of Karpathy's dataset_coco.json.

    ``train`` means train and restval, the 113,287 photos that everyone trains on; ``restval`` alone is itself. Raises
    ShardError for a file that is not Karpathy's, for a split that it does not have, and when there is no caption.
    """
    asked = {split.strip() for split in splits.split(",")}
    wanted = asked | {"restval"} if "train" in asked else asked
    collected = _Collected()
    offered: Counter[str] = Counter()
    (images,) = _lists(path, "images")
    for number, record in enumerate(images):
        where = f"{path.name} images[{number}]"
        if not collected.sound(where, "malformed image", record, split=str):
            continue
        offered[record["split"]] += 1
        if record["split"] in wanted:
            _add_karpathy_image(collected, where, record)
    if offered and not asked <= offered.keys():
        raise ShardError("no such split", where=path, got=splits, wanted=", ".join(sorted(offered)))
    counts = " + ".join(f"{offered[split]:,} {split}" for split in sorted(wanted, reverse=True))  # train, then restval
    joined = ", restval joined to train as everyone does" if wanted != asked else ""
    return collected.captions([path], notes=[f"photos of {path.name}: {counts}{joined}"])


class _Collected:
    """The photos of one or several files as they are read, and what was left out of them."""

    def __init__(self) -> None:
        self.images: dict[int, CocoImage] = {}
        self.skipped: list[SkippedItem] = []
        self._caption_ids: set[int] = set()

    def sound(self, where: str, reason: str, record: Any, **fields: type) -> bool:
        """Whether a record of the JSON is an object with these fields; if not, it is skipped for ``reason``."""
        fault = _fault(record, fields)
        if fault is not None:
            self.skip(where, reason, fault)
        return fault is None

    def skip(self, key: str, reason: str, detail: str) -> None:
        self.skipped.append(SkippedItem(key=key, reason=reason, detail=detail))

    def add_image(self, image_id: int, name: str) -> CocoImage | None:
        """A photo without captions as yet; None when it is skipped."""
        if not is_photo_name(name) or not _can_be_a_file(name):
            self.skip(f"image {image_id}", "not a photo's name", _shown(name))
        elif image_id in self.images:
            self.skip(f"image {image_id}", "duplicate image_id", f"{name}: same as {self.images[image_id].name}")
        else:
            self.images[image_id] = CocoImage(image_id, name)
            return self.images[image_id]
        return None

    def add_caption(self, caption_id: int, image: CocoImage | None, caption: str, place: str) -> None:
        if caption_id in self._caption_ids:
            self.skip(f"caption {caption_id}", "duplicate annotation id", place)
        elif image is None:
            self.skip(f"caption {caption_id}", "caption of no image", place)
        else:
            self._caption_ids.add(caption_id)
            image.captions.append(caption)

    def captions(self, paths: list[Path], notes: list[str]) -> CocoCaptions:
        """All of it. Raises ShardError when there is no caption."""
        if not self._caption_ids:
            first = ", ".join(f"{item.key} ({item.reason}: {item.detail})" for item in self.skipped[:1])
            where = ", ".join(map(str, paths))
            raise ShardError("no captions to be used", where=where, got=first or "no captions at all")
        return CocoCaptions(list(self.images.values()), self.skipped, notes)


def _add_annotations(collected: _Collected, path: Path) -> None:
    # In a function of its own, so that one file's JSON is let go before the next is read.
    images, annotations = _lists(path, "images", "annotations")
    for number, record in enumerate(images):
        if collected.sound(f"{path.name} images[{number}]", "malformed image", record, id=int, file_name=str):
            collected.add_image(record["id"], record["file_name"])
    for number, record in enumerate(annotations):
        where = f"{path.name} annotations[{number}]"
        if collected.sound(where, "malformed annotation", record, id=int, image_id=int, caption=str):
            image = collected.images.get(record["image_id"])
            collected.add_caption(record["id"], image, record["caption"], f"image_id {record['image_id']}")


def _add_karpathy_image(collected: _Collected, where: str, record: dict[str, Any]) -> None:
    record.setdefault("filepath", "")
    if not collected.sound(where, "malformed image", record, cocoid=int, filepath=str, filename=str, sentences=list):
        return
    image = collected.add_image(record["cocoid"], str(PurePosixPath(record["filepath"]) / record["filename"]))
    if image is None:
        return
    for number, sentence in enumerate(record["sentences"]):
        if collected.sound(f"{where} sentences[{number}]", "malformed annotation", sentence, sentid=int, raw=str):
            collected.add_caption(sentence["sentid"], image, sentence["raw"], f"image_id {image.image_id}")


def _lists(path: Path, *names: str) -> list[list[Any]]:
    """The lists of these names in COCO's file, or in Karpathy's, which has no annotations; raises ShardError."""
    content = read_json(path)
    fault = _fault(content, dict.fromkeys(names, list))
    wanted, there = "annotations" in names, isinstance(content, dict) and "annotations" in content
    if fault is None and there == wanted:
        return [content[name] for name in names]
    # Whoever takes one of the two files for the other is told so.
    taken_for_other = there != wanted and isinstance(content, dict) and "images" in content
    raise ShardError(
        "not COCO's annotations" if wanted else "not Karpathy's dataset_coco.json",
        where=path,
        got="annotations" if fault is None else fault.partition(", wanted ")[0].removeprefix("got "),
        wanted=" and ".join(f'a list "{name}"' for name in names),
        do=f"Is it a file for {'--karpathy' if wanted else '--annotations'}?" if taken_for_other else None,
    )


def _fault(record: Any, fields: dict[str, type]) -> str | None:
    """What keeps a record of the JSON from being an object with these fields; None when nothing does."""
    if not isinstance(record, dict):
        return f"got {_shown(record)}, wanted an object"
    for name, kind in fields.items():
        # A bool is an int to Python, but not a number to COCO.
        if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
            return f"{name}: got {_shown(record.get(name))}, wanted {_KINDS[kind]}"
    return None


def _shown(value: Any) -> str:
    """A value of the JSON in a few ASCII letters."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else json.dumps(value)[:60]


def _identity(name: str) -> str:
    """What two names of one photo have in common: COCO's twelve digits, or the whole name of any other photo."""
    match = _COCO_NAME.fullmatch(PurePosixPath(name).name)
    return name if match is None else match[1]


def _can_be_a_file(name: str) -> bool:
    """JSON can carry zero bytes and half surrogate pairs, a file's name cannot."""
    return "\0" not in name and name == name.encode("utf-8", "replace").decode()


def _is_mended(caption: str) -> bool:
    return clean_caption(caption) not in (caption, "")
