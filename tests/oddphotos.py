"""Photos of every kind that a decoder tells apart, drawn here."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Gradients and a coarse noise: something that has edges and survives JPEG."""
    width, height = size
    rng = np.random.default_rng(width * height)
    coarse = rng.integers(0, 255, (max(1, height // 16), max(1, width // 16), 3), dtype=np.uint8)
    noise = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    ramp = np.linspace(0, 255, width, dtype=np.float32)[None, :, None]
    return Image.fromarray(((noise + ramp) / 2).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **how: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture((40, 30)), kind, exif=exif)


def segment(marker: int, content: bytes) -> bytes:
    """Of a JPEG's head."""
    return bytes((0xFF, marker)) + (len(content) + 2).to_bytes(2) + content


def editors_notes() -> bytes:
    """As Photoshop leaves them, with a resolution and a name; an XMP whose own name was struck out, as COCO's are."""
    resolution = b"8BIM\x03\xed\0\0\0\0\0\x10" + bytes((0, 72, 0, 0, 0, 1, 0, 1)) * 2
    photoshop = b"Photoshop 3.0\0" + resolution + b"8BIM\x04\x04\x03cat\0\0\0\x02ab"
    xmp = b'XMP\0://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="6"/>'
    return segment(0xED, photoshop) + segment(0xEC, b"Ducky\0\1\0\4\0\0\0<\0") + segment(0xE1, xmp)


@lru_cache
def odd_photos() -> dict[str, bytes]:
    one = picture((90, 61))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    return {
        "4:4:4": encoded(one, subsampling=0),
        "4:2:2": encoded(one, subsampling=1),
        "4:2:0": encoded(one, subsampling=2),
        "progressive": encoded(one, progressive=True),
        "restarts": encoded(one, restart_marker_rows=1),
        "RGB inside": encoded(one, keep_rgb=True),
        "grey": encoded(one.convert("L")),
        "one pixel": encoded(picture((1, 1))),
        "profile": encoded(one, icc_profile=profile, comment=b"a comment"),
        "XMP": encoded(one, xmp=b'<x tiff:Orientation="6"/>'),
        "edited": encoded(one, extra=editors_notes()),
        "MPO": encoded(one, "MPO", save_all=True, append_images=[picture((45, 30))]),
        "CMYK": encoded(one.convert("CMYK")),
        "PNG": encoded(one, "PNG"),
        "palette": encoded(one.convert("P"), "PNG"),
        "clear": encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"),
        "WebP": encoded(one, "WEBP"),
        **{f"orientation {number}": turned(number) for number in range(1, 10)},
        "turned PNG": turned(6, "PNG"),
    }
