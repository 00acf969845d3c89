"""How long until the model is so good? python benchmarks/whole_job.py --flickr8k DIR --peer VENV

The whole job, on the same photos, captions, vocabulary, frozen encoder (pvt_v2_b1 with the same new weights) and a
decoder of the same size, AdamW, learning rates and ZeRO-2 in two processes of one thread each:

    transformers  its Trainer with DeepSpeed and BlipTextLMHeadModel: a caption a row, each with its photo, cropped and
                  resized by torchvision as BLIP trains; --rows of them a step
    pvtcap C      ``pvtcap train``, packed, C captions of each photo (--captions lists what is tried), as many captions
                  a step as the peer has rows

The peer trains for --minutes; the loss on all captions of the validation photos that it reaches is the goal of the
others. With --repeat they take so many turns, each with a goal of its own, and medians are told. Time is that of
training steps with their waiting for data; validation is left out for both. The peer needs accelerate, in an
environment that looks for torch where ours is: run.py makes it in environments/accelerate.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from results import Row, report
from torch import Tensor

ROOT = Path(__file__).parents[1]
RESUME_ME, PEER = 75, "transformers"
Point = tuple[float, float]  # seconds of training, validation loss


def tree(folder: Path, args: argparse.Namespace, captions: int) -> dict[str, Any]:
    """What both train: of the peer, ``data.global_batch`` is the rows of a step."""
    width = {"decoder_width": args.width, "decoder_heads": args.width // 64, "decoder_feedforward": 4 * args.width}
    return {
        "run": {"dir": str(folder / f"run-{captions}")},
        "data": {
            "train": str(folder / "train"), "val": str(folder / "val"), "captions_per_photo": captions,
            "global_batch": max(2, args.rows // captions // 2 * 2), "image_px": args.px, "workers": 1,
        },
        "text": {"vocab": str(folder / "vocab.txt"), "prompt": "a picture of ", "max_tokens": 32},
        "model": {
            "encoder": "pvt_v2_b1", "encoder_weights": str(folder / "encoder.pth"), "decoder": "scratch",
            "decoder_layers": args.layers, **width,
        },
        "train": {"steps": 100_000, "log_every_steps": 1, "val_every_steps": args.val_every},
        "optim": {"lr": args.lr, "warmup_steps": 20},
    }  # fmt: skip


def build(folder: Path, args: argparse.Namespace) -> None:
    import timm

    from pvtcap.shardset import ShardSet
    from pvtcap.text import CaptionTokenizer

    for name, names, most in (("train", "Flickr_8k.trainImages.txt", None), ("val", "Flickr_8k.devImages.txt", 100)):
        listed = folder / f"{name}.txt"
        listed.write_text("\n".join((args.flickr8k / names).read_text().split()[:most]) + "\n")
        words = ["--images", args.flickr8k / "images", "--captions", args.flickr8k / "Flickr8k.token.txt"]
        command = [sys.executable, "-m", "pvtcap", "shards", "flickr8k", *words, "--list", listed]
        subprocess.run([*map(str, command), "--out", str(folder / name)], check=True, capture_output=True, cwd=ROOT)
    captions = (text for group in ShardSet.open(folder / "train").captions() for text in group)
    (folder / "vocab.txt").write_text("\n".join(CaptionTokenizer.train(captions, 4000).vocab) + "\n")
    torch.manual_seed(0)
    torch.save(timm.create_model("pvt_v2_b1", num_classes=0).state_dict(), folder / "encoder.pth")


def samples_of(path: Path) -> list[Any]:
    from pvtcap.shardset import ShardReader, ShardSet

    shardset = ShardSet.open(path)
    reader = ShardReader(shardset, max_open=2)
    return [reader.read(shard, index) for shard, size in enumerate(shardset.sizes) for index in range(size)]


def peer(folder: Path, args: argparse.Namespace) -> None:
    """One rank of transformers' Trainer; rank 0 writes its points and its captions a second."""
    import io

    import torch.distributed as torch_dist
    from PIL import Image
    from torchvision import transforms as t
    from train_step import RowEach
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from pvtcap import pixels, weights
    from pvtcap.captioner import Captioner
    from pvtcap.configfile import parse
    from pvtcap.job import load_weights

    config = parse(tree(folder, args, 1), "benchmark")
    tokenizer = weights.load_vocab(config.text)
    crop = t.RandomResizedCrop(args.px, scale=(0.5, 1.0), interpolation=t.InterpolationMode.BICUBIC)
    prepare = t.Compose([crop, t.RandomHorizontalFlip(), t.PILToTensor()])

    def row(text: str) -> tuple[Tensor, Tensor]:
        ids = torch.as_tensor([*tokenizer.pack([[text]], 32).tokens[0], tokenizer.end_id])
        labels = ids.clone()
        labels[: len(tokenizer.prefix)] = -100
        return ids, labels

    class Rows(torch.utils.data.Dataset[Any]):
        def __init__(self) -> None:
            self.rows = [(sample.photo, text) for sample in samples_of(folder / "train") for text in sample.captions]

        def __len__(self) -> int:
            return len(self.rows)

        def __getitem__(self, number: int) -> Any:
            raw, text = self.rows[number]
            with Image.open(io.BytesIO(raw)) as image:
                return prepare(image.convert("RGB")), *row(text)

    def collate(rows: list[Any]) -> dict[str, Tensor]:
        photos, ids, labels = zip(*rows, strict=True)
        pad = torch.nn.utils.rnn.pad_sequence
        tokens = pad(list(ids), batch_first=True)
        return {
            "photos": torch.stack(photos), "tokens": tokens, "mask": (tokens > 0).long(),
            "labels": pad(list(labels), batch_first=True, padding_value=-100),
        }  # fmt: skip

    class Peer(RowEach):
        def forward(self, photos: Tensor, tokens: Tensor, labels: Tensor, mask: Tensor) -> Any:  # as Trainer wants it
            return {"loss": super().forward(photos, tokens, labels, mask)}

    torch.manual_seed(0)
    ours = Captioner(config, tokenizer.size)
    load_weights(ours, config, [], None)  # the encoder's; the rest is new
    model = Peer(ours, config.model.dropout)

    @torch.no_grad()
    def validation_loss() -> float:
        model.eval()
        total = torch.zeros(2, dtype=torch.float64)
        for sample in samples_of(folder / "val")[torch_dist.get_rank() :: 2]:
            photo = torch.empty(1, 3, args.px, args.px, dtype=torch.uint8)
            pixels.whole(sample.photo, "", args.px, out=photo[0])
            batch = collate([(photo[0], *row(text)) for text in sample.captions])
            labels = int((batch["labels"] != -100).sum())
            total += torch.tensor([float(model(**batch)["loss"]) * labels, labels])
        torch_dist.all_reduce(total)
        model.train()
        return float(total[0] / total[1])

    points: list[Point] = []

    class Watch(TrainerCallback):
        spent, begun, rates = 0.0, 0.0, list[float]()

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.begun = time.perf_counter()

        def on_step_end(self, arguments: Any, state: Any, control: Any, **_: Any) -> None:
            now = time.perf_counter()
            self.spent += now - self.begun
            self.rates.append(args.rows / (now - self.begun))
            enough = torch.tensor(float(self.spent > 60 * args.minutes))
            torch_dist.broadcast(enough, 0)
            if enough or state.global_step % args.val_every == 0:
                points.append((self.spent, validation_loss()))
            control.should_training_stop = bool(enough)
            self.begun = time.perf_counter()

    zero: dict[str, Any] = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    zero |= dict.fromkeys(
        ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto"
    )
    arguments = TrainingArguments(
        output_dir=str(folder / "peer"), per_device_train_batch_size=args.rows // 2, max_steps=100_000,
        learning_rate=args.lr, warmup_steps=20, lr_scheduler_type="cosine", weight_decay=0.05, max_grad_norm=1.0,
        use_cpu=True, ddp_backend="gloo", deepspeed=zero, dataloader_num_workers=1, dataloader_pin_memory=False,
        report_to=[], save_strategy="no", logging_steps=100_000, remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    watch = Watch()
    Trainer(model, arguments, data_collator=collate, train_dataset=Rows(), callbacks=[watch]).train()
    if torch_dist.get_rank() == 0:
        (folder / "peer.json").write_text(json.dumps({"points": points, "captions_per_s": watch.rates[3:]}))


def by_peer(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    options = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in SHARED]
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, "--one-rank", folder]
    run([str(args.peer / "bin" / "python"), *map(str, words), *options], 0)
    return dict(json.loads((folder / "peer.json").read_text()))


def by_pvtcap(folder: Path, work: Path, args: argparse.Namespace, captions: int) -> dict[str, Any]:
    config = work / f"{captions}.yaml"
    settings = tree(folder, args, captions)
    settings["run"]["dir"] = str(work / f"run-{captions}")
    config.write_text(yaml.safe_dump(settings))
    words = [str(ROOT / "launch" / "local.sh"), "train", str(config), f"train.stop_after_minutes={args.minutes}"]
    run(words, RESUME_ME)
    log = work / f"run-{captions}" / "log.jsonl"
    spent, rates, points = 0.0, list[float](), list[Point]()
    for line in map(json.loads, log.read_text().splitlines()):
        if line["kind"] == "train":
            spent += line["speed/step_seconds"]
            rates.append(line["speed/captions_per_second"])
        elif "val/loss" in line:
            points.append((spent, line["val/loss"]))
    return {"points": points, "captions_per_s": rates[3:]}


def run(command: list[str], wanted: int) -> None:
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "NPROC": "2", "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != wanted:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def seconds_to(goal: float, points: list[Point]) -> float | None:
    """Training seconds until the loss was ``goal``, on the line between the two points around it."""
    before: Point | None = None
    for seconds, loss in points:
        if loss <= goal:
            if before is None:
                return seconds
            share = (before[1] - goal) / (before[1] - loss)
            return before[0] + share * (seconds - before[0])
        before = seconds, loss
    return None


SHARED = ("px", "layers", "width", "rows", "lr", "minutes", "val_every")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flickr8k", type=Path, help="folder with images/, Flickr8k.token.txt and its lists")
    parser.add_argument("--peer", type=Path, metavar="VENV", help="environment with accelerate")
    parser.add_argument("--captions", type=int, nargs="+", default=[5, 2, 1], help="of a photo in a step")
    parser.add_argument("--rows", type=int, default=80, help="captions a step")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--val-every", type=int, default=10, help="steps")
    parser.add_argument("--minutes", type=float, default=6, help="that each trains")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--one-rank", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one_rank is not None:
        peer(args.one_rank, args)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder, args)
        turns = []
        for turn in range(args.repeat):
            work = folder / f"turn-{turn}"
            work.mkdir()
            found = {PEER: by_peer(folder, args)}
            for captions in args.captions:
                found[f"pvtcap {captions}"] = by_pvtcap(folder, work, args, captions)
            turns.append(found)
    title = f"{args.rows} captions a step, {args.layers} layers of {args.width}, {args.px} px, two processes"
    options = {name: getattr(args, name) for name in (*SHARED, "repeat")}
    report("whole_job", title, rows_of(turns), {"options": options, "turns": turns})


def rows_of(turns: list[dict[str, dict[str, Any]]]) -> list[Row]:
    """Rates are those of all steps of all turns; seconds, a turn's."""
    rows = []
    for name in [name for name in turns[0] if name != PEER]:
        rates = {one: [rate for found in turns for rate in found[one]["captions_per_s"]] for one in (name, PEER)}
        rows.append(Row.of("the whole job", "captions/s", rates, goal=3.5))
        seconds: dict[str, list[float]] = {name: [], PEER: []}
        goals = list[float]()
        for found in turns:
            points = {one: found[one]["points"] for one in seconds}
            goals.append(min(loss for _, loss in points[PEER]))
            took = {one: seconds_to(goals[-1], points[one]) for one in seconds}
            if took[name] is None:
                spent, loss = points[name][-1]
                print(f"{name}: {goals[-1]:.3f} not reached, {loss:.3f} after {spent:.0f} s")
            else:
                for one, value in took.items():
                    seconds[one].append(value or 0.0)
        if len(seconds[name]) == len(turns):
            what = f"until val loss {', '.join(f'{goal:.3f}' for goal in goals)}"
            rows.append(Row.of(what, "s", seconds, goal=1 / 0.4, less_is_better=True))
    return rows


if __name__ == "__main__":
    main()
