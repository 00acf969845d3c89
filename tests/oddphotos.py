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
        "MPO": encoded(one, "MPO", save_all=True, append_images=[picture((45, 30))]),
        "CMYK": encoded(one.convert("CMYK")),
        "PNG": encoded(one, "PNG"),
        "palette": encoded(one.convert("P"), "PNG"),
        "clear": encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG"),
        "WebP": encoded(one, "WEBP"),
        **{f"orientation {number}": turned(number) for number in range(1, 10)},
        "turned PNG": turned(6, "PNG"),
    }
