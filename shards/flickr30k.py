"""pvtcap shards flickr30k --images DIR|ZIP --captions dataset_flickr30k.json --split train --out DIR

Flickr30k (Young et al., 2014): 31,783 photos with five captions each. ``--images`` is the folder of photos or their
ZIP, which is read without unpacking. The captions are Karpathy's ``dataset_flickr30k.json`` with ``--split``, by which
everybody reports (29,000 train, 1,014 val, 1,000 test), or the dataset's own ``results_20130124.token``, with
``--list`` to choose photos. A photo's image_id is the number in its name, whichever file its captions come from.
"""

from __future__ import annotations

import argparse
from pathlib import Path, PurePosixPath

from pvtcap.captionfiles import read_captions
from pvtcap.shardwriter import Candidate, PhotoPlace, SkippedItem, run_builder


def candidates(args: argparse.Namespace) -> list[Candidate | SkippedItem]:
    photos = PhotoPlace(args.images)
    found = read_captions(args.captions, args.list, args.split)
    for note in found.notes:
        print(note)
    return [*found.skipped, *(candidate(name, captions, photos) for name, captions in found.captions.items())]


def candidate(name: str, captions: list[str], photos: PhotoPlace) -> Candidate:
    stem = PurePosixPath(name).stem
    image_id = int(stem) if stem.isdecimal() else stem
    return Candidate(key=stem, image_id=image_id, captions=tuple(captions), source="flickr30k", photo=photos.find(name))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "pvtcap shards flickr30k", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR|ZIP", help="the photos")
    parser.add_argument(
        "--captions", type=Path, required=True, metavar="FILE", help="results_20130124.token or a .json"
    )
    parser.add_argument("--list", type=Path, metavar="FILE", help="only the photos named in it, one a line")
    parser.add_argument("--split", metavar="NAME[,NAME]", help="only these splits of a .json")
    run_builder("flickr30k", parser, candidates, argv)


if __name__ == "__main__":
    main()
