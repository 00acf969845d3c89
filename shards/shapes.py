"""pvtcap shards shapes --num-samples 2000 --split train --out DIR

Drawn pictures of one shape each, with five captions in five phrasings: data for a first run and for tests, made
anywhere in seconds. A caption names size, colour, shape and place, so a wrong word breaks most of its 4-grams.

``--split val`` shows only compositions (of size, colour, shape and place) that train never does: a model that describes
them has not learned them by heart. A picture depends on (seed, split, number) alone.
"""

from __future__ import annotations

import argparse
import io
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageChops, ImageDraw

from pvtcap.errors import ConfigError
from pvtcap.shardwriter import Candidate, PhotoBytes, run_builder

RADIUS = {"small": 0.13, "large": 0.25}  # of the picture's side
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 220, 40),
    "purple": (130, 50, 170),
    "orange": (245, 140, 30),
    "white": (250, 250, 250),
    "black": (12, 12, 12),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = {
    "at the top": (0.5, 0.27),
    "at the bottom": (0.5, 0.73),
    "on the left": (0.27, 0.5),
    "on the right": (0.73, 0.5),
    "in the middle": (0.5, 0.5),
}
WORDS = {"size": tuple(RADIUS), "colour": tuple(COLOURS), "shape": SHAPES, "place": tuple(PLACES)}
HELD_OUT_EVERY = 10
PHRASINGS = (
    "a {size} {colour} {shape} {place}",
    "there is a {size} {colour} {shape} {place} of the picture",
    "{place} is a {size} {shape} that is {colour}",
    "the {shape} {place} is {colour} and {size}",
    "a {shape} that is {size} and {colour} can be seen {place}",
)
SUPERSAMPLING = 4


@dataclass(frozen=True)
class Drawings:
    num_samples: int
    split: str
    image_px: int
    seed: int

    def __len__(self) -> int:
        return self.num_samples

    def __iter__(self) -> Iterator[Candidate]:
        shown = compositions(self.split)
        for number in range(self.num_samples):
            rng = random.Random(f"{self.seed}/{self.split}/{number}")
            words = dict(zip(WORDS, rng.choice(shown), strict=True))
            jpeg = io.BytesIO()
            draw(words, self.image_px, rng).save(jpeg, "JPEG", quality=95, subsampling=0)
            captions = tuple(phrasing.format(**words) for phrasing in PHRASINGS)
            yield Candidate(f"{self.split}-{number:06d}", number, captions, "shapes", PhotoBytes(jpeg.getvalue()))


def compositions(split: str) -> list[tuple[str, ...]]:
    """What a split shows, as (size, colour, shape, place): val a tenth of them, train all others."""
    everything = list(itertools.product(*WORDS.values()))
    random.Random("held out").shuffle(everything)
    held_out = everything[::HELD_OUT_EVERY]
    return held_out if split == "val" else sorted(set(everything) - set(held_out))


def draw(words: dict[str, str], image_px: int, rng: random.Random) -> Image.Image:
    """One picture, ``image_px`` square: a shape, a little off in place, size, angle and colour, on a grainy grey."""
    side = image_px * SUPERSAMPLING
    grey = rng.randint(110, 150)
    image = Image.new("RGB", (side, side), jittered((grey, grey, grey), rng))
    x, y = (side * (at + rng.uniform(-0.03, 0.03)) for at in PLACES[words["place"]])
    radius = side * RADIUS[words["size"]] * rng.uniform(0.9, 1.1)
    colour = jittered(COLOURS[words["colour"]], rng)
    pen = ImageDraw.Draw(image)
    if words["shape"] == "circle":
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    else:
        turn = rng.uniform(-0.12, 0.12)
        corners = [
            (x + radius * r * math.sin(a + turn), y - radius * r * math.cos(a + turn))
            for r, a in outline(words["shape"])
        ]
        pen.polygon(corners, fill=colour)
    grain = Image.frombytes("L", (image_px, image_px), rng.randbytes(image_px**2)).point(lambda value: value // 16)
    return ImageChops.add(image.reduce(SUPERSAMPLING), grain.convert("RGB"), offset=-8)


def outline(shape: str) -> list[tuple[float, float]]:
    """A polygon's corners as (radius, angle in radians, clockwise from the top), for a shape of radius 1."""
    if shape == "cross":
        inner, outer, half = 0.3 * math.sqrt(2), math.hypot(1.0, 0.3), math.atan(0.3)
        arm = ((outer, -half), (outer, half), (inner, math.pi / 4))
        return [(r, a + quarter * math.pi / 2) for quarter in range(4) for r, a in arm]
    radii, start = {
        "square": ([1.15] * 4, math.pi / 4),
        "triangle": ([1.15] * 3, 0.0),
        "star": ([1.15, 0.48] * 5, 0.0),
    }[shape]
    return [(r, start + corner * 2 * math.pi / len(radii)) for corner, r in enumerate(radii)]


def jittered(colour: tuple[int, int, int], rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + rng.randint(-10, 10))) for value in colour)
    return red, green, blue


def candidates(args: argparse.Namespace) -> Drawings:
    if args.image_px < 16:
        raise ConfigError("too small to draw in", where="--image-px", got=args.image_px, wanted="16 or more")
    return Drawings(args.num_samples, args.split, args.image_px, args.seed)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "pvtcap shards shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-samples", type=int, required=True, metavar="N")
    parser.add_argument("--split", choices=("train", "val"), default="train")
    parser.add_argument("--image-px", type=int, default=64, metavar="N", help="side in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed is another set (default %(default)s)")
    run_builder("shapes", parser, candidates, argv)


if __name__ == "__main__":
    main()
