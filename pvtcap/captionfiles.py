"""Files of captions as datasets publish them: Flickr's token files and Karpathy's JSON, read into one form.

    NAME.jpg#0<TAB>A child in a pink dress …                           Flickr8k.token.txt, results_20130124.token
    {"images": [{"filename", "split", "sentences": [{"raw"}], …}, …]}  dataset_flickr8k.json, …

What is wrong with a line is kept, with its reason, for the builder to report.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pvtcap import jsonfile
from pvtcap.errors import ShardError
from pvtcap.photosource import PHOTO_SUFFIXES
from pvtcap.shardset import SkippedItem


@dataclass
class CaptionFile:
    """Captions by photo name, in file order; ``notes`` are remarks for people, ``skipped`` what could not be used."""

    captions: dict[str, list[str]] = field(default_factory=dict)
    skipped: list[SkippedItem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def select(self, list_path: Path) -> CaptionFile:
        """Only the photos that a list names, one name a line, in its order. Raises ShardError when none is there."""
        names = read_names(list_path)
        chosen = {name: self.captions[name] for name in names if name in self.captions}
        if not chosen:
            raise ShardError(
                "no photo of the list has captions",
                where=list_path,
                got=", ".join(names[:3]),
                wanted=f"names such as {next(iter(self.captions))}",
            )
        missing = [SkippedItem(key=name, reason="no captions") for name in names if name not in self.captions]
        notes = [
            *self.notes,
            f"captioned photos that are not in {list_path.name}: {len(self.captions) - len(chosen):,}",
        ]
        return CaptionFile(chosen, self.skipped + missing, notes)


def read_captions(path: Path, list_path: Path | None = None, splits: str | None = None) -> CaptionFile:
    """Read a token file, or Karpathy's JSON when ``path`` ends in .json.

    ``splits`` (``"train,restval"``) chooses from a JSON, ``list_path`` (a file of names) from either. Raises
    ShardError for a file that is neither, and for a choice that the file does not offer.
    """
    if path.suffix.lower() == ".json":
        found = _read_karpathy(path, splits)
    elif splits is not None:
        raise ShardError(
            "a token file has no splits",
            where=path,
            got=f"--split {splits}",
            do="Give --list with the split's file of names.",
        )
    else:
        found = _read_token_file(path)
    return found if list_path is None else found.select(list_path)


def read_text(path: Path) -> str:
    """A text file's content, a byte-order mark left out. Raises ShardError when it is missing or not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ShardError(
            "not UTF-8 text",
            where=path,
            got=f"byte {error.object[error.start]:#x} at {error.start:,}",
            do=f"Convert it: iconv -f latin1 -t utf-8 {path.name} > NEW.",
        ) from None
    except OSError as error:
        raise ShardError(f"cannot read the file: {error.strerror}", where=path) from None


def read_names(path: Path) -> list[str]:
    """A list of names, one a line, each once. Raises ShardError when the file is missing or not UTF-8."""
    return list(dict.fromkeys(line.strip() for line in read_text(path).split("\n") if line.strip()))


def read_json(path: Path) -> Any:
    """A JSON file's content. Raises ShardError when it is missing or not JSON."""
    return jsonfile.parse(read_text(path), path, ShardError)


def is_photo_name(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in PHOTO_SUFFIXES


def _read_token_file(path: Path) -> CaptionFile:
    found = CaptionFile()
    not_photos: dict[str, int] = {}
    num_mended = 0
    # Split at line ends only: str.splitlines would also split a caption at a form feed or U+2028.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(.+?)#(\d+)(?:(\s+)(.*))?", line)
        if match is None:
            found.skipped.append(
                SkippedItem(key=f"line {number}", reason="not a caption line", detail=line.strip()[:80])
            )
            continue
        name, gap, caption = match[1].strip(), match[3], match[4] or ""
        num_mended += bool(caption) and "\t" not in gap
        if is_photo_name(name):
            found.captions.setdefault(name, []).append(caption)
        else:
            not_photos[name] = not_photos.get(name, 0) + 1
    for name, count in not_photos.items():
        found.skipped.append(SkippedItem(key=name, reason="not a photo's name", detail=f"its captions: {count}"))
    if not found.captions:
        got = f"{found.skipped[0].key}: {found.skipped[0].detail}" if found.skipped else "an empty file"
        raise ShardError(
            "no captions in the file", where=path, got=got, wanted="lines such as NAME.jpg#0<TAB>A caption"
        )
    if num_mended:
        found.notes.append(f"lines of {path.name} mended, spaces where the tab should be: {num_mended:,}")
    return found


def _read_karpathy(path: Path, splits: str | None) -> CaptionFile:
    content = read_json(path)
    found = CaptionFile()
    offered: set[str] = set()
    wanted = None if splits is None else {split.strip() for split in splits.split(",")}
    try:
        for image in content["images"]:
            offered.add(image["split"])
            if wanted is None or image["split"] in wanted:
                name = str(PurePosixPath(image.get("filepath", "")) / image["filename"])
                found.captions.setdefault(name, []).extend(sentence["raw"] for sentence in image["sentences"])
    except (KeyError, TypeError, AttributeError) as error:
        raise ShardError(
            "not one of Karpathy's files",
            where=path,
            got=f"{type(error).__name__}: {error}",
            wanted="{'images': [{'filename', 'split', 'sentences': [{'raw'}]}]}",
        ) from None
    if unknown := (wanted or set()) - offered:
        raise ShardError("no such split", where=path, got=", ".join(sorted(unknown)), wanted=", ".join(sorted(offered)))
    return found
