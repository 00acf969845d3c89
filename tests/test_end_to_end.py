"""pytest tests/test_end_to_end.py: real photos to captions, by the words of README."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

FLICKR8K = Path(__file__).parents[2] / "shared/data/flickr8k"


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line as a user types it, in a shell, with this Python's pvtcap."""
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", "-c", line], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return done


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="shared/data/flickr8k is not here")
def test_flickr8k_from_photos_to_captions(tree: dict[str, Any], tmp_path: Path) -> None:
    names = next(FLICKR8K.glob("*train*")).read_text().split()
    pvtcap, local = f"{sys.executable} -m pvtcap", f"NPROC=2 {ROOT}/launch/local.sh"
    images = next(path for path in FLICKR8K.iterdir() if path.is_dir())
    for part, chosen in (("train", names[:40]), ("val", names[40:52])):
        (tmp_path / f"{part}.txt").write_text("\n".join(chosen) + "\n")
        shell(
            f"{pvtcap} shards flickr8k --images {images} --captions {FLICKR8K}/Flickr8k.token.txt --list {part}.txt"
            f" --short-side-px 64 --samples-per-shard 16 --out data/{part}",
            tmp_path,
        )
        tree["data"][part] = f"data/{part}"
    tree["run"]["dir"] = "runs/photos"
    tree["text"] |= {"vocab_size": 300, "prompt": "a picture of "}
    tree["train"] |= {"epochs": 1, "steps": None, "val_every_steps": 5}
    tree["precision"] = "bf16"
    (tmp_path / "photos.yaml").write_text(yaml.safe_dump(tree))
    assert "val loss" in shell(f"{local} train photos.yaml evaluate.every_steps=5", tmp_path).stdout
    lines = [json.loads(line) for line in (tmp_path / "runs/photos/log.jsonl").read_text().splitlines()]
    kinds = Counter(line["kind"] for line in lines)
    assert kinds == {"train": 5, "val": 2, "checkpoint": 1, "captions": 1, "evaluate": 1}
    shell(f"{local} evaluate runs/photos --data data/val --num-beams 1 --out out", tmp_path)
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert sorted(row["image_id"] for row in results) == sorted(Path(name).stem for name in names[40:52])
    photo = images / names[99]
    told = shell(f"{pvtcap} caption runs/photos {photo} --sheet sheet.png", tmp_path).stdout
    assert told.startswith(f"{photo}\t")
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    assert "Bleu_4" in shell(f"{pvtcap} compare first=runs/photos/eval/step_00000005 second=out", tmp_path).stdout
