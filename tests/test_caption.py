"""pytest tests/test_caption.py: photos from anywhere, and the picture of captions."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from PIL import Image, ImageFont
from test_checkpoint import write

from pvtcap import sheet
from pvtcap.api import Captioner
from pvtcap.caption import caption_photos, count_photos, find_photos
from pvtcap.config import Config
from pvtcap.errors import ShardError


def encoded(colour: str = "teal", kind: str = "JPEG", size: tuple[int, int] = (50, 40)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, kind)
    return buffer.getvalue()


@pytest.fixture
def places(tmp_path: Path) -> Path:
    (tmp_path / "folder/below").mkdir(parents=True)
    (tmp_path / "one.png").write_bytes(encoded("red", "PNG"))
    (tmp_path / "folder/b.jpg").write_bytes(encoded())
    (tmp_path / "folder/below/a.webp").write_bytes(encoded("blue", "WEBP"))
    (tmp_path / "folder/notes.txt").write_text("not a photo, and not looked at")
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tmp_path / "folder/b.jpg", "x/b.jpg")
        tar.add(tmp_path / "folder/notes.txt", "x/notes.txt")
        tar.add(tmp_path / "one.png", "x/one.png")
    return tmp_path


def test_files_folders_and_tars(places: Path) -> None:
    found = list(find_photos([places / "one.png", places / "folder", places / "photos.tar"]))
    assert [Path(name).relative_to(places).as_posix() for name, _ in found] == [
        "one.png", "folder/b.jpg", "folder/below/a.webp", "photos.tar:x/b.jpg", "photos.tar:x/one.png",
    ]  # fmt: skip
    assert found[3][1] == found[1][1]


def test_places_without_photos(places: Path) -> None:
    (places / "empty").mkdir()
    (places / "text.tar").write_text("this is no tar")
    (places / "odd/folder.jpg").mkdir(parents=True)
    (places / "odd2").mkdir()
    os.mkfifo(places / "odd2/fifo.jpg")
    for place, says in (
        ("empty", "no photo in this folder"),
        ("none.jpg", "no such photo, folder or tar"),
        ("text.tar", "not a readable tar"),
        ("odd", r"folder\.jpg: unreadable photo"),
        ("odd2", r"fifo\.jpg: unreadable photo; got not a plain file"),
    ):
        with pytest.raises(ShardError, match=says) as caught:
            list(find_photos([places / place]))
        assert str(places / place) in str(caught.value)


def test_tars_that_are_not_what_they_seem(tmp_path: Path) -> None:
    """Links are named and not followed, damage is not taken for the end, and no claim of a size is believed."""

    def tar_with(kind: bytes, size: int = 0, name: str = "bad.jpg") -> Path:
        path = tmp_path / "photos.tar"
        header = tarfile.TarInfo(name)
        header.type, header.linkname, header.size = kind, name, size
        good = tarfile.TarInfo("good.jpg")
        good.size = len(encoded())
        body = good.tobuf() + encoded().ljust(-(-good.size // 512) * 512, b"\0")
        path.write_bytes(body + header.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
        return path

    ten_gb = 10 << 30
    for words, says in (
        ((tarfile.SYMTYPE,), "bad.jpg: a symbolic link, not a photo"),
        ((tarfile.LNKTYPE,), "bad.jpg: a hard link, not a photo"),
        ((tarfile.FIFOTYPE, 0, "\x1b[2J.jpg"), "'\\x1b[2J.jpg': a FIFO, not a photo"),
        ((tarfile.REGTYPE, ten_gb), "cut off: a member of 10,737,418,240 bytes"),
        ((tarfile.XHDTYPE, ten_gb), "a header that claims 10,737,418,240 bytes"),
    ):
        with pytest.raises(ShardError) as caught:
            list(find_photos([tar_with(*words)]))
        assert says in str(caught.value)
    path = tar_with(tarfile.REGTYPE, ten_gb)
    os.truncate(path, ten_gb + 10_000)  # holes: it is as large as it says
    with pytest.raises(ShardError, match=r"bad\.jpg: photo too large; got 10,737,418,240 bytes"):
        list(find_photos([path]))


def test_a_caption_each_in_order_and_an_error_for_what_is_no_photo(config: Config, places: Path) -> None:
    captioner = Captioner.from_checkpoint(write(config, 1), "cpu")
    photos = list(find_photos([places / "folder", places / "photos.tar"])) * 2
    assert len(photos) == 8
    captioned = list(caption_photos(captioner, photos, captioner.search()))
    assert [(item.name, item.photo) for item in captioned] == photos
    # Beam search cut into batches of four gives each photo what it gets alone.
    alone = [next(caption_photos(captioner, [photo], captioner.search())).caption for photo in photos[:4]]
    assert [item.caption for item in captioned] == alone * 2
    with_bad = list(caption_photos(captioner, [*photos[:2], ("bad.jpg", b"no"), *photos[2:4]], captioner.search()))
    assert [item.caption for item in with_bad] == [*alone[:2], None, *alone[2:]]
    assert str(with_bad[2].error).startswith("bad.jpg: not a photo")
    assert json.loads(with_bad[2].as_json()) == {"photo": "bad.jpg", "error": with_bad[2].error}
    assert json.loads(with_bad[0].as_json()).keys() == {"photo", "caption", "score"}


def test_standard_input_is_a_photo_or_a_list(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def given(data: bytes) -> list[tuple[str, bytes]]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
        return list(find_photos([Path("-")]))

    for kind in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"):
        assert given(encoded(kind=kind)) == [("-", encoded(kind=kind))]
    names = f"{places}/one.png\n\n{places}/folder\n".encode()
    assert [Path(name).name for name, _ in given(names)] == ["one.png", "b.jpg", "a.webp"]
    with pytest.raises(ShardError, match="nowhere: no such photo"):
        given(b"nowhere\n")
    assert count_photos([places / "one.png", places / "folder"]) == 3
    assert count_photos([places / "photos.tar"]) is count_photos([Path("-")]) is None


def test_the_sheet_shows_photos_in_rows_with_text_below(tmp_path: Path) -> None:
    entries = [
        sheet.Entry(encoded("red", size=(40, 80)), "a tall red picture", "the reference"),
        *(sheet.Entry(encoded("blue"), f"number {number}") for number in range(4)),
    ]
    sheet.draw(entries, tmp_path / "deep/er/sheet.png")
    with Image.open(tmp_path / "deep/er/sheet.png") as image:
        image.load()
    width, height = sheet.CELL_PX + sheet.MARGIN_PX, image.height
    assert image.width == 4 * width + sheet.MARGIN_PX
    assert height > 2 * sheet.CELL_PX
    red = image.getpixel((sheet.MARGIN_PX + 50, sheet.MARGIN_PX + 100))
    assert isinstance(red, tuple)
    assert red[0] > 240
    assert red[1] < 10
    # Some of the text is black: it was written, and under the photo.
    band = image.crop((sheet.MARGIN_PX, sheet.CELL_PX + 10, width, height)).convert("L")
    assert min(band.tobytes()) < 60


def test_the_sheet_wraps_captions_and_makes_room_for_all(tmp_path: Path) -> None:
    font = ImageFont.load_default(13)
    lines = sheet.wrapped("a dog runs over the green grass , " * 3 + "https" + "w" * 60 + " .", font, 200, 50)
    assert all(font.getlength(line.removesuffix(" .").removesuffix(" ,")) <= 200 for line in lines)
    assert "".join(lines).replace(" ", "").endswith("w" * 60 + ".")
    assert sheet.wrapped("a dog " * 100, font, 200, 2)[1].endswith("…")
    assert sheet.wrapped("", font, 200, 2) == []
    heights = []
    for more in ((), ("another one",), ("another one", "a third")):
        sheet.draw([sheet.Entry(encoded("red"), "one", more=more)], tmp_path / "sheet.png")
        with Image.open(tmp_path / "sheet.png") as image:
            heights.append(image.height)
    assert heights[0] < heights[1] < heights[2]
