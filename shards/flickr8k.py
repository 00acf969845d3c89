"""pvtcap shards flickr8k --images DIR|ZIP --captions Flickr8k.token.txt --list Flickr_8k.trainImages.txt --out DIR

Flickr8k (Hodosh et al., 2013): 8,091 photos with five captions each. ``--images`` is the folder of photos or their ZIP,
which is read without unpacking. The captions are the dataset's own token file, with ``--list`` to choose a split's
photos, or Karpathy's ``dataset_flickr8k.json``, with ``--split train`` (or several: ``train,val``).

The token file has a name that is no photo and a line without its tab; both are reported, the second is mended.
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
    return Candidate(key=stem, image_id=stem, captions=tuple(captions), source="flickr8k", photo=photos.find(name))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "pvtcap shards flickr8k", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=Path, required=True, metavar="DIR|ZIP", help="the photos")
    parser.add_argument("--captions", type=Path, required=True, metavar="FILE", help="Flickr8k.token.txt or a .json")
    parser.add_argument("--list", type=Path, metavar="FILE", help="only the photos named in it, one a line")
    parser.add_argument("--split", metavar="NAME[,NAME]", help="only these splits of a .json")
    run_builder("flickr8k", parser, candidates, argv)


if __name__ == "__main__":
    main()
