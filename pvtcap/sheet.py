"""A picture of photos with their captions, for TensorBoard and for eyes."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL_PX, MARGIN_PX, COLUMNS = 224, 8, 4
_FONT_PX, _LINE_PX, _GAP_PX = 13, 16, 4
_TEXT_PX = CELL_PX - 8  # so that two columns of text stand apart
_MOST_LINES = 4  # of one caption; a longer one ends in dots

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Entry:
    """One photo (encoded bytes), its caption, a reference or name in grey if there is one, and ``more`` captions."""

    photo: bytes
    caption: str
    reference: str = ""
    more: tuple[str, ...] = ()


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Write a PNG: photos in rows of four, captions in black, the reference in grey; a row is as high as it needs."""
    columns = min(COLUMNS, len(entries))
    font = ImageFont.load_default(_FONT_PX)
    texts = [list(_lines(entry, font)) for entry in entries]
    starts = range(0, len(entries), columns)
    heights = [CELL_PX + 2 * MARGIN_PX + max(map(_height, texts[start : start + columns])) for start in starts]
    canvas = Image.new("RGB", (columns * (CELL_PX + MARGIN_PX) + MARGIN_PX, sum(heights) + MARGIN_PX), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (entry, lines) in enumerate(zip(entries, texts, strict=True)):
        row, column = divmod(number, columns)
        x, y = MARGIN_PX + column * (CELL_PX + MARGIN_PX), MARGIN_PX + sum(heights[:row])
        photo = _fitted(entry.photo)
        canvas.paste(photo, (x, y + CELL_PX - photo.height))  # a wide one stands on its caption
        y += CELL_PX + _GAP_PX
        for line, colour, gap_px in lines:
            pen.text((x, y), line, fill=colour, font=font)
            y += _LINE_PX + gap_px
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)


def wrapped(text: str, font: Font, width_px: int, most_lines: int) -> list[str]:
    """``text`` in lines of at most ``width_px``, a hanging full stop aside; what ``most_lines`` do not hold is dots."""
    lines: list[str] = []
    for word in text.split():
        hanging = len(word) == 1 and not word.isalnum()  # many datasets put a space before the last full stop
        if lines and (hanging or font.getlength(f"{lines[-1]} {word}") <= width_px):
            lines[-1] += f" {word}"
            continue
        # A word that no line can hold, such as an address, is broken.
        while len(word) > 1 and font.getlength(word) > width_px:
            most = next(most for most in range(len(word) - 1, 0, -1) if font.getlength(word[:most]) <= width_px)
            lines.append(word[:most])
            word = word[most:]
        lines.append(word)
    if len(lines) <= most_lines:
        return lines
    last = lines[most_lines - 1]
    while last and font.getlength(f"{last}…") > width_px:
        last = last[:-1]
    return [*lines[: most_lines - 1], f"{last}…"]


def _lines(entry: Entry, font: Font) -> Iterator[tuple[str, str, int]]:
    """The lines below a photo, each with its colour and the gap behind it in pixels."""
    captions = (entry.caption, *entry.more)
    for text, colour in (*((caption, "black") for caption in captions), (entry.reference, "#808080")):
        lines = wrapped(text, font, _TEXT_PX, _MOST_LINES)
        for number, line in enumerate(lines, start=1):
            yield line, colour, _GAP_PX if number == len(lines) else 0


def _height(lines: list[tuple[str, str, int]]) -> int:
    return _GAP_PX + sum(_LINE_PX + gap_px for _, _, gap_px in lines)


def _fitted(photo: bytes) -> Image.Image:
    """The photo, its long side as long as a cell: small pictures are enlarged, a 64-pixel drawing is as visible."""
    with Image.open(io.BytesIO(photo)) as image:
        rgb = image.convert("RGB")
    scale = CELL_PX / max(rgb.size)
    return rgb.resize((max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale))))
