"""COCO's two JSON files of captions: RESULTS, [{"image_id": …, "caption": …}, …], and REFERENCES, {"annotations": […]}.

An id may be a number in one and the same number as text in the other: here ids are text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pvtcap import jsonfile
from pvtcap.errors import EvaluationError

_RESULTS = '[{"image_id": …, "caption": …}, …]'
_REFERENCES = '{"annotations": [{"image_id": …, "caption": …}, …]}'


def read_results(path: Path) -> dict[str, str]:
    """image id → its caption, in the file's order. Raises EvaluationError when it is no such file or an id is twice."""
    results: dict[str, str] = {}
    content = jsonfile.read(path, EvaluationError)
    if not isinstance(content, list):
        raise EvaluationError("not COCO's results", where=path, got=type(content).__name__, wanted=_RESULTS)
    for image_id, caption in _pairs(content, path, _RESULTS):
        if image_id in results:
            raise EvaluationError("two captions for one image", where=path, got=f"image_id {image_id}", wanted="one")
        results[image_id] = caption
    return results


def read_references(path: Path) -> dict[str, list[str]]:
    """image id → its reference captions, in the file's order. Raises EvaluationError when it is no such file."""
    content = jsonfile.read(path, EvaluationError)
    if not isinstance(content, dict) or not isinstance(content.get("annotations"), list):
        raise EvaluationError("not COCO's annotations of captions", where=path, wanted=_REFERENCES)
    references: dict[str, list[str]] = {}
    for image_id, caption in _pairs(content["annotations"], path, _REFERENCES):
        references.setdefault(image_id, []).append(caption)
    return references


def to_score(
    results: Mapping[str, str], references: Mapping[str, Sequence[str]], *, subset: bool
) -> dict[str, Sequence[str]]:
    """The references to score the results against: all, or with ``subset`` those of the captioned images."""
    if subset:
        return {id_: references[id_] for id_ in results if id_ in references}
    if left := [id_ for id_ in references if id_ not in results]:
        raise EvaluationError(
            "images without a caption",
            got=f"{len(left):,} of {len(references):,} ({', '.join(left[:3])}{', …' * (len(left) > 3)})",
            do="Caption them, or give --subset: CIDEr then counts words in the captioned images' references alone.",
        )
    return dict(references)


def _pairs(items: list[Any], path: Path, wanted: str) -> Iterator[tuple[str, str]]:
    for number, item in enumerate(items):
        fields = (item.get("image_id"), item.get("caption")) if isinstance(item, dict) else (None, None)
        if isinstance(fields[0], bool) or not isinstance(fields[0], (int, str)) or not isinstance(fields[1], str):
            got = json.dumps(item, ensure_ascii=False)[:100]
            raise EvaluationError("no caption of an image", where=f"{path}, item {number}", got=got, wanted=wanted)
        yield _utf8(str(fields[0])), _utf8(fields[1])


def _utf8(text: str) -> str:
    """JSON can carry half a surrogate pair, which no file and no scorer takes; "?" stands for it."""
    return text.encode(errors="replace").decode()
