"""A picture of photos with their captions, for TensorBoard and for eyes."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CELL_PX, TEXT_PX, MARGIN_PX, COLUMNS = 224, 118, 8, 4
_LINE_PX, _CHARACTERS = 15, 34


@dataclass(frozen=True)
class Entry:
    """One photo (encoded bytes), what the model says, and a reference if there is one."""

    photo: bytes
    caption: str
    reference: str = ""


def draw(entries: Sequence[Entry], path: Path) -> None:
    """Write a PNG: photos in rows of four, the caption in black, the reference in grey."""
    columns = min(COLUMNS, len(entries))
    rows = -(-len(entries) // columns)
    width, height = CELL_PX + MARGIN_PX, CELL_PX + TEXT_PX
    canvas = Image.new("RGB", (columns * width + MARGIN_PX, rows * height + MARGIN_PX), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(13)
    for number, entry in enumerate(entries):
        x, y = MARGIN_PX + number % columns * width, MARGIN_PX + number // columns * height
        with Image.open(io.BytesIO(entry.photo)) as image:
            photo = image.convert("RGB")
        # Small pictures are enlarged: a 64-pixel drawing is as visible as a photo.
        scale = CELL_PX / max(photo.size)
        photo = photo.resize((max(1, round(photo.width * scale)), max(1, round(photo.height * scale))))
        canvas.paste(photo, (x, y))
        y += CELL_PX + 4
        for text, colour, most in ((entry.caption, "black", 4), (entry.reference, "#808080", 3)):
            for line in textwrap.wrap(text, _CHARACTERS)[:most]:
                pen.text((x, y), line, fill=colour, font=font)
                y += _LINE_PX
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(path)
