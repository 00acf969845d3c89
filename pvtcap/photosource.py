"""Where a photo comes from on its way into a shard: a file, a member of a ZIP, or bytes that are there already.

    PhotoFile(path) | PhotoInZip(path, member) | PhotoBytes(data)     read_photo(source) ─▶ bytes, or BadPhoto

A source is cheap to make and to send to another process; only ``read`` touches the disk.
"""

from __future__ import annotations

import os
import stat
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Protocol

from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
MAX_PHOTO_BYTES = 256 << 20  # encoded; no camera's photo is near it, and a ZIP can expand to anything

# What zipfile makes of a wrong byte: a wrong name, or a version that it does not know.
_DAMAGED_ZIP = (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError)


class PhotoSource(Protocol):
    """Anything that gives a photo's bytes; it is pickled to the worker that reads it."""

    def read(self) -> bytes:
        """The encoded photo. Raises OSError, or BadPhoto with a reason of its own."""


@dataclass(frozen=True, slots=True)
class PhotoFile:
    path: Path

    def read(self) -> bytes:
        # O_NONBLOCK: a FIFO of that name would wait for a writer.
        with open(self.path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise BadPhoto("unreadable photo", "not a plain file")
            _check_bytes(found.st_size)
            return file.read()


@dataclass(frozen=True, slots=True)
class PhotoInZip:
    """A member of a ZIP, read without unpacking."""

    path: Path
    member: str

    def read(self) -> bytes:
        try:
            archive = _open_zip(self.path)
            member = archive.getinfo(self.member)
            _check_bytes(member.file_size)
            # zipfile unpacks as much as is asked for of these two, and all that there is of the others.
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise BadPhoto("unreadable photo", f"neither stored nor deflated in {self.path.name}")
            with archive.open(member) as file:
                return file.read(member.file_size)
        except KeyError:
            raise FileNotFoundError(f"no {self.member} in {self.path}") from None
        except (*_DAMAGED_ZIP, zlib.error, EOFError, RuntimeError) as error:
            raise BadPhoto("unreadable photo", str(error)) from error


@dataclass(frozen=True, slots=True)
class PhotoBytes:
    data: bytes

    def read(self) -> bytes:
        return self.data


@dataclass(frozen=True, slots=True)
class PhotoOutside:
    """A name such as ``../../etc/passwd``, which leads out of the folder of photos: never read."""

    name: str

    def read(self) -> bytes:
        raise BadPhoto("name outside the folder", self.name)


@dataclass(frozen=True, slots=True)
class PhotoMissing:
    """A photo that no place has; known before it is read."""

    name: str

    def read(self) -> bytes:
        raise BadPhoto("missing photo", f"no {self.name} among the photos")


class PhotoPlace:
    """Where a dataset's photos are: a folder, or a ZIP.

    A folder is asked by relative path. A ZIP is asked by member name or, as archives differ in the folder that they
    wrap around the photos, by base name. Raises ShardError when ``path`` is neither.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: dict[str, list[str]] | None = None
        self._listed: dict[str, frozenset[str]] = {}
        if path.is_dir():
            return
        if not path.exists():
            raise ShardError("no such folder or ZIP of photos", where=path)
        self._members = {}
        try:
            with zipfile.ZipFile(path) as archive:
                for member in (name for name in archive.namelist() if not name.endswith("/")):  # "/": a folder
                    self._members.setdefault(PurePosixPath(member).name, []).append(member)
        except _DAMAGED_ZIP as error:
            # Of one that was cut short the end is lacking, by which zipfile knows them.
            with path.open("rb") as file:
                begins_as_zip = file.read(4) == b"PK\x03\x04"
            if not begins_as_zip:
                raise ShardError("neither a folder nor a ZIP of photos", where=path) from None
            raise ShardError(f"damaged ZIP: {error}", where=path, do="Copy or download it again.") from None

    def find(self, name: str) -> PhotoFile | PhotoInZip | PhotoOutside:
        """The source of one photo, which may turn out to be missing when it is read."""
        if self._members is None:
            if _leads_outside(name):
                return PhotoOutside(name)
            return PhotoFile(self.path / os.path.normpath(name))
        members = self._members.get(PurePosixPath(name).name, [])
        if name in members or not members:
            return PhotoInZip(self.path, name)
        if len(members) > 1:
            raise ShardError(
                "several photos of one name in the ZIP",
                where=self.path,
                got=", ".join(members[:3]),
                do="Unpack it and give the folder that is meant.",
            )
        return PhotoInZip(self.path, members[0])

    def has(self, name: str) -> bool:
        """Whether a photo of this name is there. A folder is listed once, which is quicker than asking for each."""
        folder, _, base = os.path.normpath(name).rpartition("/")
        return base in (self._names(folder) if self._members is None else self._members)

    def _names(self, folder: str) -> frozenset[str]:
        if folder not in self._listed:
            try:
                self._listed[folder] = frozenset(entry.name for entry in (self.path / folder).iterdir())
            except PermissionError as error:
                raise ShardError(f"cannot read the folder: {error.strerror}", where=self.path / folder) from None
            except (OSError, ValueError):  # no such folder, or nothing that can be the name of one
                self._listed[folder] = frozenset()
        return self._listed[folder]


class PhotoPlaces:
    """Several folders and ZIPs that hold a dataset's photos together. Raises ShardError when a path is neither."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self.places = [PhotoPlace(path) for path in paths]

    def find(self, *names: str) -> PhotoSource:
        """The source of one photo that may have any of these ``names``, in the first place that has it.

        A name that leads outside is never read, whether a folder or a ZIP is asked.
        """
        for name in names:
            if _leads_outside(name):
                return PhotoOutside(name)
        for place in self.places:
            for name in names:
                if place.has(name):
                    return place.find(name)
        return PhotoMissing(names[0])


def read_photo(source: PhotoSource) -> bytes:
    """The bytes of a photo; every failure to read it is a BadPhoto."""
    try:
        return source.read()
    except FileNotFoundError as error:
        raise BadPhoto("missing photo", str(error)) from error
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte or half a surrogate pair
        raise BadPhoto("unreadable photo", str(error)) from error


def close_zips() -> None:
    """Close the archives that ``PhotoInZip.read`` keeps open in this process."""
    _open_zip.cache_clear()


def _leads_outside(name: str) -> bool:
    path = os.path.normpath(name)
    return path.startswith("/") or path.split("/")[0] == ".."


def _check_bytes(size: int) -> None:
    if size > MAX_PHOTO_BYTES:
        raise BadPhoto("photo too large (bytes)", f"{size:,}; wanted at most {MAX_PHOTO_BYTES:,}")


@lru_cache(maxsize=4)
def _open_zip(path: Path) -> zipfile.ZipFile:
    # Opening an archive reads its whole directory: once a process, not once a photo.
    return zipfile.ZipFile(path)
