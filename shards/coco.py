"""pvtcap shards coco --images train2014.zip val2014.zip --karpathy dataset_coco.json --split train --out DIR

COCO Captions (Chen et al., 2015), by Karpathy's splits or by COCO's own:

    --karpathy dataset_coco.json --split train    113,287 photos: Karpathy's train AND restval, joined as everyone does
                                                  (restval alone, val, test, and lists such as val,test work too)
    --annotations captions_train2017.json         all 118,287 photos of COCO's own split; several files are joined
    --annotations captions_train2014.json captions_val2014.json --list coco_test.txt
                                                  the photos that a list names, one a line; Karpathy's train without
                                                  restval is such a list, too

``--images`` are folders or ZIPs, which are read without unpacking: train2014 and val2014 for Karpathy's train, or the
folder that holds them. As COCO's photos of 2017 are those of 2014 under new names, train2017 and val2017 serve as well,
and a list with names of 2014 chooses from the annotations of 2017.

Photos stand in the order of the annotations. A photo's image_id is COCO's number, its key the stem of its name. All
captions are kept, six or seven too; newlines and stray spaces are mended and counted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pvtcap.cococaptions import CocoCaptions, CocoImage, read_annotations, read_karpathy
from pvtcap.errors import ConfigError
from pvtcap.shardwriter import Candidate, PhotoPlaces, SkippedItem, run_builder


def candidates(args: argparse.Namespace) -> list[Candidate | SkippedItem]:
    check_options(args)
    photos = PhotoPlaces(args.images)
    found = read(args).usable(args.limit)
    for note in found.notes:
        print(note)
    return [*found.skipped, *(candidate(image, photos) for image in found.images)]


def read(args: argparse.Namespace) -> CocoCaptions:
    if args.karpathy is not None:
        return read_karpathy(args.karpathy, args.split)
    found = read_annotations(args.annotations)
    return found if args.list is None else found.select(args.list)


def candidate(image: CocoImage, photos: PhotoPlaces) -> Candidate:
    return Candidate(
        key=image.key,
        image_id=image.image_id,
        captions=tuple(image.captions),
        source="coco",
        photo=photos.find(*image.names()),
    )


def check_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together: none is silently ignored."""
    if args.limit is not None and args.limit < 1:
        raise ConfigError("out of range", where="--limit", got=args.limit, wanted="1 or more")
    if args.karpathy is None and args.annotations is None:
        raise ConfigError("no captions", wanted="--annotations FILE [FILE ...], or --karpathy FILE --split NAME")
    if args.karpathy is None and args.split is not None:
        raise ConfigError(
            "COCO's own annotations have no splits",
            where="--split",
            got=args.split,
            do="Give --karpathy FILE instead of --annotations, or --list with the split's file of names.",
        )
    if args.karpathy is None:
        return
    if args.annotations is not None:
        raise ConfigError(
            "the captions are named twice",
            where="--karpathy",
            got="--annotations as well",
            do="Leave --annotations out, as Karpathy's file has the captions; or choose from them with --list.",
        )
    if args.list is not None:
        raise ConfigError(
            "the photos are chosen twice",
            where="--karpathy",
            got="--list as well",
            do="Choose with --split, or give --annotations instead of --karpathy.",
        )
    if args.split is None:
        raise ConfigError("no split chosen", where="--karpathy", wanted="--split train, restval, val or test")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        "pvtcap shards coco", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # "extend": given again, an option adds to its list instead of replacing it.
    parser.add_argument(
        "--images",
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR|ZIP",
        help="the photos; a photo is taken from the first that has it",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        nargs="+",
        action="extend",
        metavar="FILE",
        help="captions_{train,val}{2014,2017}.json; several are joined",
    )
    parser.add_argument("--karpathy", type=Path, metavar="FILE", help="dataset_coco.json; needs --split")
    parser.add_argument(
        "--split", metavar="NAME[,NAME]", help="of --karpathy: train (which is train AND restval), restval, val, test"
    )
    parser.add_argument("--list", type=Path, metavar="FILE", help="of --annotations: only the photos named in it")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N photos chosen, for a quick test")
    run_builder("coco", parser, candidates, argv)


if __name__ == "__main__":
    main()
