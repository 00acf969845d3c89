"""How fast does open_clip train a captioner? python benchmarks/coca.py --flickr8k DIR --open-clip VENV

open_clip's own command and loader, CoCa with the captioning loss alone, beside ``pvtcap train``: the same photos and
captions at 224 px, AdamW, float32, one process with all cores and one that decodes, captions a second in the log of
each, the first steps left out:

    open_clip      a Vision Transformer (12 layers of 192, patches of 16), two layers of text and two with
                   cross-attention of 512; a caption a row of 32 tokens, each with its photo; everything is trained
    pvtcap         PVT-Tiny (12 blocks), four layers of 512, five captions a photo, packed; the encoder is frozen
    pvtcap, all    the same with the encoder trained, too

These are not the same models: CoCa comes with no PVT and no BERT. Multiply-adds of the encoders at 224 px are 1.3 and
2.1 billion, of the decoders' layers about the same; CoCa's vocabulary is CLIP's. So it tells what who comes from
open_clip gets, and not what packing alone is worth: train_step.py and whole_job.py tell that.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from results import Row, report

ROOT = Path(__file__).parents[1]
PX, LENGTH, WIDTH, WARM_UP = 224, 32, 512, 2
WAYS = {"pvtcap": "projection+decoder", "pvtcap, all": "projection+decoder+encoder"}
MODEL = {
    "embed_dim": WIDTH,
    "vision_cfg": {
        "image_size": PX, "layers": 12, "width": 192, "patch_size": 16, "head_width": 64, "output_tokens": True,
        "attentional_pool": True, "attn_pooler_queries": (PX // 32) ** 2, "attn_pooler_heads": 8,
    },
    "text_cfg": {
        "context_length": LENGTH, "vocab_size": 49408, "layers": 2, "heads": 8, "width": WIDTH, "embed_cls": True,
        "output_tokens": True,
    },
    "multimodal_cfg": {
        "context_length": LENGTH, "vocab_size": 49408, "width": WIDTH, "heads": 8, "layers": 2, "dim_head": 64,
        "mlp_ratio": 4,
    },
    "custom_text": True,
}  # fmt: skip
COCA = (
    "import sys, open_clip; open_clip.add_model_config(sys.argv.pop(1));"
    "from open_clip_train.main import main; main(sys.argv[1:])"
)


def run(*words: object) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [str(word) for word in words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def build(folder: Path, args: argparse.Namespace) -> None:
    """shards/ for us; for open_clip clip/, with a sample a caption."""
    from pvtcap.shardset import ShardReader, ShardSet

    names = (args.flickr8k / "Flickr_8k.trainImages.txt").read_text().split()[: args.photos]
    (folder / "list.txt").write_text("\n".join(names) + "\n")
    words = ["--images", args.flickr8k / "images", "--captions", args.flickr8k / "Flickr8k.token.txt"]
    words += ["--list", folder / "list.txt", "--out", folder / "shards"]
    run(sys.executable, "-m", "pvtcap", "shards", "flickr8k", *words)
    (folder / "clip").mkdir()
    shardset = ShardSet.open(folder / "shards")
    with ShardReader(shardset) as reader:
        samples = [reader.read(shard, index) for shard, size in enumerate(shardset.sizes) for index in range(size)]
    for turn in range(5):
        with tarfile.open(folder / "clip" / f"{turn}.tar", "w") as tar:
            for sample in samples:
                for kind, content in (("jpg", sample.photo), ("txt", sample.captions[turn].encode())):
                    member = tarfile.TarInfo(f"{sample.key}_{turn}.{kind}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def by_open_clip(folder: Path, args: argparse.Namespace) -> list[float]:
    model = folder / "coca_small.json"
    model.write_text(json.dumps(MODEL))
    words = ["--train-data", str(folder / "clip" / "{0..4}.tar"), "--dataset-type", "webdataset"]
    words += ["--train-num-samples", (WARM_UP + args.steps) * args.rows, "--batch-size", args.rows, "--workers", 1]
    words += ["--model", "coca_small", "--precision", "fp32", "--device", "cpu", "--epochs", 1, "--lr", 5e-4]
    words += ["--coca-contrastive-loss-weight", 0, "--coca-caption-loss-weight", 1, "--warmup", 20]
    words += ["--log-every-n-steps", 1, "--logs", folder, "--name", "coca", "--save-frequency", 0]
    told = run(args.open_clip / "bin" / "python", "-c", COCA, model, *words)
    return [float(rate) for rate in re.findall(r"Train Epoch: .* ([0-9.e+-]+)/s,", told)][WARM_UP:]


def by_pvtcap(folder: Path, args: argparse.Namespace, name: str) -> list[float]:
    out = folder / name.replace(", ", "-")
    tree: dict[str, Any] = {
        "run": {"dir": str(out)},
        "data": {
            "train": str(folder / "shards"), "captions_per_photo": 5, "global_batch": args.rows // 5, "image_px": PX,
            "workers": 1,
        },
        "text": {"vocab": "train", "vocab_size": 8000, "prompt": "", "max_tokens": LENGTH},
        "model": {
            "encoder": "pvt_v2_b1", "encoder_weights": "scratch", "decoder": "scratch", "decoder_layers": 4,
            "decoder_width": WIDTH, "decoder_heads": 8, "decoder_feedforward": 4 * WIDTH,
        },
        "train": {"what": WAYS[name], "steps": WARM_UP + args.steps, "log_every_steps": 1},
        "optim": {"lr": 5e-4, "warmup_steps": 20},
    }  # fmt: skip
    if WAYS[name] == "projection+decoder":
        import timm
        from safetensors.torch import save_file

        tree["model"]["encoder_weights"] = str(folder / "encoder.safetensors")
        save_file(timm.create_model("pvt_v2_b1", pretrained=False).state_dict(), folder / "encoder.safetensors")
    config = folder / f"{out.name}.yaml"
    config.write_text(yaml.safe_dump(tree))
    run(sys.executable, "-m", "pvtcap", "train", config)
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rates = [line["speed/captions_per_second"] for line in lines if line["kind"] == "train"]
    return [float(rate) for rate in rates[WARM_UP:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--flickr8k", type=Path, required=True, help="folder with images/, Flickr8k.token.txt, its lists"
    )
    parser.add_argument(
        "--open-clip", type=Path, required=True, metavar="VENV", help="environment with open_clip_torch"
    )
    parser.add_argument("--photos", type=int, default=512)
    parser.add_argument("--rows", type=int, default=80, help="captions a step (default %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="that are measured (default %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder, args)
        rates = {"open_clip": by_open_clip(folder, args)} | {name: by_pvtcap(folder, args, name) for name in WAYS}
    rows = [
        Row.of("training beside open_clip's CoCa", "captions/s", {name: rates[name], "open_clip": rates["open_clip"]})
        for name in WAYS
    ]
    options = {"photos": args.photos, "rows": args.rows, "steps": args.steps}
    medians = {name: statistics.median(found) for name, found in rates.items()}
    title = f"{args.rows} captions a step, {PX} px, {torch.get_num_threads()} threads"
    report("coca", title, rows, {"options": options, "medians": medians, "captions_per_s": rates})


if __name__ == "__main__":
    main()
