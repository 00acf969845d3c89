"""pytest tests/test_photosource.py: photos that are larger than any photo, and ZIPs with a wrong byte."""

from __future__ import annotations

import os
import struct
import tracemalloc
import zipfile
from pathlib import Path

import pytest

from pvtcap.errors import ShardError
from pvtcap.photo import BadPhoto
from pvtcap.photosource import MAX_PHOTO_BYTES, PhotoFile, PhotoInZip, PhotoPlace, close_zips, read_photo

TEN_GB = 10 << 30


def reason(source: PhotoFile | PhotoInZip) -> str:
    """Why it is not read; and it took little memory to say so."""
    tracemalloc.start()
    try:
        with pytest.raises(BadPhoto) as caught:
            read_photo(source)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
        close_zips()
    return caught.value.reason


def test_files_that_are_no_photos(tmp_path: Path) -> None:
    (tmp_path / "big.jpg").write_bytes(b"")
    os.truncate(tmp_path / "big.jpg", TEN_GB)
    os.mkfifo(tmp_path / "fifo.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    assert reason(PhotoFile(tmp_path / "big.jpg")) == "photo too large (bytes)"
    assert reason(PhotoFile(tmp_path / "fifo.jpg")) == "unreadable photo"
    assert reason(PhotoFile(tmp_path / "zero.jpg")) == "unreadable photo"
    assert reason(PhotoFile(tmp_path)) == "unreadable photo"
    assert reason(PhotoFile(tmp_path / "none.jpg")) == "missing photo"


def in_zip(path: Path, size: int, how: int, claimed: int | None = None) -> PhotoInZip:
    """A member of ``size`` zeros, of which the archive's directory claims another size."""
    with zipfile.ZipFile(path, "w", how) as archive, archive.open("a.jpg", "w", force_zip64=True) as file:
        for start in range(0, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - start)))
    if claimed is not None:
        raw = bytearray(path.read_bytes())
        struct.pack_into("<I", raw, raw.rindex(b"PK\x01\x02") + 24, claimed)
        path.write_bytes(raw)
    return PhotoInZip(path, "a.jpg")


def test_members_of_zips_that_expand(tmp_path: Path) -> None:
    archive = tmp_path / "photos.zip"
    assert read_photo(in_zip(archive, 1000, zipfile.ZIP_DEFLATED)) == bytes(1000)
    close_zips()
    assert reason(in_zip(archive, MAX_PHOTO_BYTES + 1, zipfile.ZIP_DEFLATED)) == "photo too large (bytes)"
    assert reason(in_zip(archive, 1000, zipfile.ZIP_DEFLATED, 2**32 - 2)) == "photo too large (bytes)"
    assert reason(in_zip(archive, 64 << 20, zipfile.ZIP_DEFLATED, 1000)) == "unreadable photo"  # claims little
    assert reason(in_zip(archive, 64 << 20, zipfile.ZIP_BZIP2, 1000)) == "unreadable photo"
    assert reason(in_zip(archive, 64 << 20, zipfile.ZIP_LZMA, 1000)) == "unreadable photo"


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
@pytest.mark.filterwarnings("ignore:Overlapped entries")  # Python 3.14, of one member that now begins in another
def test_a_zip_with_a_wrong_byte_is_read_or_said_to_be_damaged(tmp_path: Path, how: int) -> None:
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w", how) as archive:
        for name in ("a.jpg", "é.jpg"):  # the second is marked as UTF-8
            archive.writestr(name, bytes(range(100)))
    whole = path.read_bytes()
    ends = set()
    for at in range(len(whole)):
        for wrong in {0, 0xFF, whole[at] ^ 1} - {whole[at]}:
            path.write_bytes(whole[:at] + bytes([wrong]) + whole[at + 1 :])
            try:
                place = PhotoPlace(path)
            except ShardError as error:
                ends.add(str(error).partition(": ")[2].partition(":")[0])
                continue
            for name in ("a.jpg", "é.jpg"):
                try:
                    photo = read_photo(place.find(name))
                    assert photo in (bytes(range(100)), b"")  # of a size of 0 nothing is read: no photo to any decoder
                    ends.add("read")
                except BadPhoto as error:
                    ends.add(error.reason)
            close_zips()
    assert ends == {"read", "damaged ZIP", "missing photo", "unreadable photo", "photo too large (bytes)"}
