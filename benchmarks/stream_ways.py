"""The ways of making a training batch that ``stream.py`` compares; each imports its own library when it is asked for.

``WAYS[name](folder, workers, first)`` gives batches of ``BATCH`` photos of ``SIDE_PX`` px without end, from batch
``first`` on, out of what ``stream.py`` has written to the folder.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

SIDE_PX, BATCH, MIN_AREA = 384, 32, 0.5
Batches = Iterator[Any]


def pvtcap(folder: Path, workers: int, first: int) -> Batches:
    """All that this file uses of pvtcap's stream."""
    from pvtcap.config import DataConfig, batch_plan
    from pvtcap.dist import World
    from pvtcap.sources import Sources
    from pvtcap.stream import View, train_batches
    from pvtcap.text import CaptionTokenizer

    train = str(folder / "shards")
    data = DataConfig(train=train, global_batch=BATCH, image_px=SIDE_PX, crop_min_area=MIN_AREA, workers=workers)
    view = View(data, CaptionTokenizer(json.loads((folder / "vocab.json").read_text())), max_tokens=40)
    plan, world = batch_plan(data, 1), World.alone("cpu")
    return train_batches(Sources.open(data), view, plan, world, seed=0, first_step=first, lent=True)


def begin_workers() -> None:
    """As 'pvtcap train' does at its start, before seconds of importing DeepSpeed; here it is waited for.

    Each process would read the script that started it again, and what this one imports takes 50 ms; pvtcap's own script
    is not read again, and webdataset's processes are forked from this one.
    """
    from pvtcap.processes import begin_server, forking_server

    begin_server(["pvtcap.stream", "__main__"])
    first = forking_server([]).Process(target=int)
    first.start()
    first.join()


def photos_in_memory(folder: Path, first: int) -> Iterator[bytes]:
    photos = [path.read_bytes() for path in sorted((folder / "photos").iterdir())[: BATCH * 32]]
    return itertools.islice(itertools.cycle(photos), first * BATCH, None)


def by_pixels(folder: Path, workers: int, first: int) -> Batches:
    from pvtcap import pixels

    photos, draw = photos_in_memory(folder, first), np.random.default_rng(0)
    batch = pixels.room(BATCH, SIDE_PX)
    while True:
        for place, raw in zip(batch, photos, strict=False):
            pixels.augmented(raw, "", SIDE_PX, MIN_AREA, 0.5, pixels.CropDraw.of(draw), out=place)
        yield batch


def by_pillow(folder: Path, workers: int, first: int) -> Batches:
    photos, draw = photos_in_memory(folder, first), np.random.default_rng(0)
    while True:
        batch = np.empty((BATCH, SIDE_PX, SIDE_PX, 3), np.uint8)
        for place, raw in zip(batch, photos, strict=False):
            with Image.open(io.BytesIO(raw)) as image:
                photo = image.convert("RGB")
            crop, flip = drawn_crop(photo.width, photo.height, draw)
            photo = photo.crop(crop).resize((SIDE_PX, SIDE_PX), Image.Resampling.BICUBIC)
            place[:] = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else photo
        yield torch.from_numpy(batch)


def by_simplejpeg(folder: Path, workers: int, first: int) -> Batches:
    import simplejpeg
    from torch.nn.functional import interpolate

    photos, draw = photos_in_memory(folder, first), np.random.default_rng(0)
    while True:
        batch = []
        for raw in itertools.islice(photos, BATCH):
            photo = simplejpeg.decode_jpeg(raw, "RGB")
            (left, top, right, bottom), flip = drawn_crop(photo.shape[1], photo.shape[0], draw)
            crop = torch.from_numpy(np.ascontiguousarray(photo[top:bottom, left:right]))
            square = interpolate(crop[None].permute(0, 3, 1, 2), [SIDE_PX, SIDE_PX], mode="bicubic", antialias=True)
            batch.append(square.flip(3) if flip else square)
        yield torch.cat(batch)


def drawn_crop(width: int, height: int, draw: np.random.Generator) -> tuple[tuple[int, int, int, int], bool]:
    """(left, top, right, bottom) with the photo's aspect, and whether to mirror it."""
    area, top, left, flip = draw.random(4)
    share = (MIN_AREA + (1 - MIN_AREA) * area) ** 0.5
    inner = round(width * share), round(height * share)
    x, y = round(left * (width - inner[0])), round(top * (height - inner[1]))
    return (x, y, x + inner[0], y + inner[1]), bool(flip < 0.5)


def transform() -> Callable[[Image.Image], torch.Tensor]:
    """As open_clip prepares photos for training."""
    from torchvision import transforms as t

    crop = t.RandomResizedCrop(SIDE_PX, scale=(MIN_AREA, 1.0), interpolation=t.InterpolationMode.BICUBIC)
    normalize = t.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    return t.Compose([crop, to_rgb, t.RandomHorizontalFlip(), t.ToTensor(), normalize])


def to_rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def webdataset(folder: Path, workers: int, first: int, skip_undecoded: bool = False) -> Batches:
    import webdataset as wds

    start = first * BATCH if skip_undecoded else 0
    dataset = wds.DataPipeline(
        wds.SimpleShardList(sorted(str(path) for path in (folder / "shards").glob("*.tar"))),
        wds.shuffle(100),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        wds.shuffle(1000),
        lambda samples: itertools.islice(samples, start, None),
        wds.decode("pilrgb"),
        wds.to_tuple("jpg", "json"),
        wds.map_tuple(transform(), None),
        wds.batched(BATCH, partial=False),
    )
    batches = iter(wds.WebLoader(dataset.repeat(), batch_size=None, num_workers=workers))
    return itertools.islice(batches, 0 if skip_undecoded else first, None)


def webdataset_reading(folder: Path, workers: int, first: int) -> Batches:
    return webdataset(folder, workers, first, skip_undecoded=True)


def open_clip(folder: Path, workers: int, first: int) -> Batches:
    from open_clip import get_tokenizer, image_transform
    from open_clip_train.data import get_wds_dataset

    tars = [str(path) for path in sorted((folder / "clip").glob("*.tar"))]
    args = argparse.Namespace(train_data=tars, train_num_samples=10**6, train_data_upsampling_factors=None)
    vars(args).update(dataset_resampled=False, seed=0, batch_size=BATCH, world_size=1, workers=workers)
    prepare = image_transform(SIDE_PX, is_train=True, aug_cfg={"scale": (MIN_AREA, 1.0)})
    data = get_wds_dataset(args, prepare, is_train=True, tokenizer=get_tokenizer("ViT-B-32"))
    return iter(data.dataloader)


def streaming(folder: Path, workers: int, first: int) -> Batches:
    from streaming import StreamingDataset

    prepare = transform()

    class Photos(StreamingDataset):
        def __getitem__(self, number: int) -> Any:
            sample = super().__getitem__(number)
            return prepare(sample["image"]), sample["captions"]

    dataset = Photos(local=str(folder / "mds"), shuffle=True, batch_size=BATCH)
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, num_workers=workers, drop_last=True, persistent_workers=workers > 0
    )
    return itertools.islice(itertools.chain.from_iterable(itertools.repeat(loader)), first, None)


# With what each imports before its time begins to count.
WAYS: dict[str, tuple[Callable[[Path, int, int], Batches], tuple[str, ...]]] = {
    "pixels": (by_pixels, ("pvtcap.pixels",)),
    "simplejpeg": (by_simplejpeg, ("simplejpeg", "torch.nn.functional")),
    "pillow": (by_pillow, ()),
    "pvtcap": (pvtcap, ("pvtcap.stream",)),
    "webdataset": (webdataset, ("webdataset", "torchvision")),
    "webdataset, reading": (webdataset_reading, ("webdataset", "torchvision")),
    "open_clip": (open_clip, ("open_clip_train.data", "open_clip")),
    "streaming": (streaming, ("streaming", "torchvision")),
}
