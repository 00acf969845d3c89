"""pytest tests/test_docs_typed.py: every command line in README and docs/ is typed as it stands there, on small data.

Pages are typed from top to bottom in one folder, which has what they name. Nothing changes but what ``SMALLER`` says:
fewer processes, steps and pictures. What cannot be typed here, ``ELSEWHERE`` names, with the test that runs it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import heldport
import pytest
import yaml
from conftest import ROOT, build_shapes, tiny_tree
from featuresets import save_encoder
from PIL import Image
from test_conceptual_captions import Server, serve

from pvtcap.configfile import parse
from pvtcap.shardset import ShardReader, ShardSet

# A page may use what one before it has made.
PAGES = (
    "README",
    "docs/evaluation",
    "docs/monitoring",
    "docs/streaming",
    "docs/training",
    "docs/weights",
    "docs/slurm",
)
COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:pvtcap|launch/\w+\.sh|make|cp|source|python|tail|sbatch|srun|git|cd) ")
PYTHON = re.compile(r"(?:import|captioner|pvt, blip, projection|ids|model|tokenizer)\b")
NUM_PHOTOS = 24
ELSEWHERE = {
    "make ": "make check and make test are what .ci/run runs; make demo is the same job as tests/test_end_to_end.py",
    "git clone": "CI has cloned",
    "cd pvtcap": "CI has cloned",
    "source .venv/bin/activate": "PATH has it here",
    "sbatch ": "tests/test_slurm.py, on a real cluster",
    "srun ": "tests/test_slurm.py, on a real cluster",
    "tail -F pvtcap-train": "there is a log where sbatch ran: tests/test_slurm.py",
    "pvtcap fetch-weights": "tests/test_weightfetch.py, without the hub",
    "pvtcap train configs/flickr30k.yaml model.encoder_weights=weights/…": "tests/test_weightfetch.py, without the hub",
}
SMALLER = {
    "NPROC=8": "NPROC=2",
    "--nodes 4 --gpus-per-node 8": "--nodes 1 --gpus-per-node 2",
    "--num-samples 4000": "--num-samples 40",
    "--num-samples 300": "--num-samples 20",
    "tail -f": "tail",
    " [--only-trained]": " --only-trained",
    "/data/cc12m": "elsewhere/cc12m",
    "--contact you@example.org": "--contact you@example.org --allow-private-addresses 127.0.0.0/8",
    "train configs/flickr30k.yaml optim.lr=1e-4": "train configs/flickr30k.yaml optim.lr=1e-4 run.dir=runs/flickr30k",
}


def typed(page: str) -> list[str]:
    """The lines of its indented blocks that a shell is to get, continued ones joined, without comments."""
    text = (ROOT / f"{page}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [re.split(r"\s+# ", line)[0].strip() for line in text.splitlines() if line.startswith("    ")]
    return [line for line in lines if COMMAND.match(f"{line} ")]


def is_typed_here(line: str) -> bool:
    return not line.startswith(tuple(ELSEWHERE))


def test_each_line_left_out_is_on_a_page() -> None:
    lines = [line for page in PAGES for line in typed(page)]
    for start, where in ELSEWHERE.items():
        assert any(line.startswith(start) for line in lines), start
        for test in re.findall(r"tests/\w+\.py", where):
            assert (ROOT / test).exists(), where
    others = {page.relative_to(ROOT).with_suffix("").as_posix() for page in (ROOT / "docs").glob("*.md")} - {*PAGES}
    for page in others:
        assert typed(page) == [], f"{page} belongs into PAGES"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir()
    for number in range(12):
        Image.effect_noise((150, 120), 60).convert("RGB").save(tmp_path / "served" / f"{number}.jpg")
    yield from serve(tmp_path / "served", tmp_path / "port")


@pytest.fixture
def port() -> Iterator[str]:
    with heldport.hold() as held:
        yield str(held.getsockname()[1])


def test_every_command_does_what_the_pages_say(tmp_path: Path, server: Server, port: str) -> None:
    folder = tmp_path / "pvtcap"
    _furnish(folder, server)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PORT": port,
                   "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT),
                   "HF_HOME": str(tmp_path / "hub")}  # fmt: skip
    said, count = "", 0
    for page in PAGES:
        for line in filter(is_typed_here, typed(page)):
            _before(line, folder)
            for words, fewer in SMALLER.items():
                line = line.replace(words, fewer)
            if line.startswith("launch/tensorboard.sh"):
                _tensorboard_answers(line, folder, environment)
                continue
            done = subprocess.run(
                line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
            )
            assert done.returncode == 0, f"{page}: {line}\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
            said += done.stdout
            count += 1
    assert count > 25
    assert "holiday.jpg" in said
    for left in (
        "mine-info", "runs/mine/test/report.html", "captions.png", "my-captioner/config.json", "report.html",
        "data/coco-test/manifest.json", "data/cc3m/manifest.json", "runs/profiled/profile", "mine.safetensors",
    ):  # fmt: skip
        assert (folder / left).exists(), left
    with Image.open(folder / "captions.png") as sheet:
        assert sheet.width > 200
    _python(folder, environment)


def _furnish(folder: Path, server: Server) -> None:
    """What the pages take for granted: photos with captions, COCO's files, tars and a table of URLs of others."""
    build_shapes(folder / "drawn", "train", NUM_PHOTOS, NUM_PHOTOS)
    (folder / "photos").mkdir()
    captions: dict[int, tuple[str, ...]] = {}
    with ShardReader(ShardSet.open(folder / "drawn")) as reader:
        for index in range(NUM_PHOTOS):
            sample = reader.read(0, index)
            (folder / "photos" / f"{index}.jpg").write_bytes(sample.photo)
            captions[index] = sample.captions
    rows = [f'{index}.jpg,"{text}"' for index, texts in captions.items() for text in texts]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *rows]) + "\n")
    for name in ("holiday", "dog", "photo"):
        shutil.copy(folder / "photos" / "0.jpg", folder / f"{name}.jpg")
    for name in ("launch", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("laion", "elsewhere/cc12m"):
        (folder / name).mkdir(parents=True)
        for tar in (folder / "drawn").glob("*.tar"):
            shutil.copy(tar, folder / name)
    urls = [f"A thing number {number}\t{server.address}/ok/{number}.jpg" for number in range(12)]
    (folder / "Train_GCC-training.tsv").write_text("\n".join(urls) + "\n")
    _coco(folder, captions)


def _coco(folder: Path, captions: dict[int, tuple[str, ...]]) -> None:
    """train2017 and its annotations, ZIPs of 2014, and Karpathy's file of a photo for each of two splits."""
    with zipfile.ZipFile(folder / "train2017.zip", "w") as archive:
        for index in captions:
            archive.write(folder / "photos" / f"{index}.jpg", f"train2017/{index:012d}.jpg")
    tree = {
        "images": [{"id": index, "file_name": f"{index:012d}.jpg"} for index in captions],
        "annotations": [
            {"id": 10 * index + number, "image_id": index, "caption": text}
            for index, texts in captions.items()
            for number, text in enumerate(texts)
        ],
    }
    with zipfile.ZipFile(folder / "annotations_trainval2017.zip", "w") as archive:
        archive.writestr("annotations/captions_train2017.json", json.dumps(tree))
        archive.writestr("annotations/instances_train2017.json", "{}")
    images = []
    for number, (year, split) in enumerate((("train2014", "train"), ("val2014", "test"))):
        name = f"COCO_{year}_{number:012d}.jpg"
        with zipfile.ZipFile(folder / f"{year}.zip", "w") as archive:
            archive.write(folder / "photos" / f"{number}.jpg", f"{year}/{name}")
        sentences = [{"raw": text, "sentid": 10 * number + place} for place, text in enumerate(captions[number])]
        about = {"filepath": year, "filename": name, "split": split, "cocoid": number, "imgid": number}
        images.append({**about, "sentences": sentences, "sentids": [one["sentid"] for one in sentences]})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def _before(line: str, folder: Path) -> None:
    """What its user would have done by now."""
    runs = folder / "runs"
    if line.startswith("NPROC=8 launch/local.sh train configs/mine.yaml optim"):
        assert (folder / "configs" / "mine.yaml").exists(), "cp configs/flickr30k.yaml configs/mine.yaml"
        _edit_configurations(folder)
        for name in ("mine-test", "mine-val", "coco-val"):
            (folder / "data" / name).symlink_to(folder / "data" / "mine")
        shutil.copy(next((folder / "data" / "mine").glob("*.tar")), folder / "more.tar")
    elif line.startswith("pvtcap compare") and not (runs / "other").exists():
        for name in ("other", "a", "b"):
            (runs / name).symlink_to(runs / "mine")
    elif line.startswith("pvtcap score"):
        _coco_results(folder)
    elif "data.val=data/mine-val-features" in line:
        # Its configuration is not that of runs/mine, whose folder it would go on in.
        (folder / "data" / "mine-val-features").symlink_to(folder / "data" / "mine-features")
        (runs / "mine").rename(runs / "from-photos")
    elif line.startswith("pvtcap export runs/mine --to hf --out mine-hf"):
        shutil.rmtree(runs / "mine")
        (runs / "from-photos").rename(runs / "mine")


def _edit_configurations(folder: Path) -> None:
    """The copy of flickr30k.yaml, and it, as who has no GPU and 24 photos would."""
    tree: dict[str, Any] = tiny_tree(folder, folder)
    tree["data"] |= {"train": "data/mine", "val": "data/mine"}
    tree["train"] = {"what": "projection+decoder", "steps": 4}
    tree["run"]["dir"] = "runs/mine"
    tree["model"]["encoder_weights"] = str(save_encoder(folder / "encoder.safetensors", 0))
    parse(tree, "mine.yaml")
    for name in ("mine", "flickr30k"):
        (folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump(tree))


def _coco_results(folder: Path) -> None:
    """results.json as evaluate wrote it, twice over, and its references in COCO's format."""
    for name in ("results", "mine", "theirs"):
        shutil.copy(folder / "runs" / "mine" / "test" / "results.json", folder / f"{name}.json")
    rows = [json.loads(line) for line in (folder / "runs/mine/test/captions.jsonl").read_text().splitlines()]
    annotations = [
        {"id": 100 * n + m, "image_id": row["image_id"], "caption": caption}
        for n, row in enumerate(rows)
        for m, caption in enumerate(row["references"])
    ]
    images = [{"id": row["image_id"]} for row in rows]
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": annotations}))


def _tensorboard_answers(line: str, folder: Path, environment: dict[str, str]) -> None:
    with subprocess.Popen(line.split(), cwd=folder, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{environment['PORT']}/data/runs", timeout=5) as page:
                        runs = json.load(page)
                except OSError:
                    assert process.poll() is None
                    assert time.monotonic() < until
                    time.sleep(0.2)
                else:
                    if runs:
                        break
        finally:
            process.kill()
    assert any(run.startswith("mine") for run in runs)


def _python(folder: Path, environment: dict[str, str]) -> None:
    """The lines of Python, in one program; a photo and its pixels are there."""
    before = [
        "import torch, pvtcap",
        "from PIL import Image",
        "from transformers import AutoModel, AutoTokenizer",
        "image, pixels = Image.open('dog.jpg'), torch.zeros(1, 3, 32, 32)",
    ]
    # BLIP's heads are 64 wide and its first token is number 30,522; these are not.
    not_blips = {'.pth")': '.pth", heads=2)', "max_length=20": "max_length=20, bos_token_id=5, eos_token_id=3"}
    lines = [
        functools.reduce(lambda line, words: line.replace(*words), not_blips.items(), line.strip())
        for page in ("README", "docs/weights")
        for line in (ROOT / f"{page}.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("    ") and PYTHON.match(line.strip())
    ]
    assert len(lines) > 8
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*before, *lines, "assert captioner.caption(['dog.jpg'])[0].text"])],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
