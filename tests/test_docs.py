"""pytest tests/test_docs.py: what README and docs/ say can be typed, is there, and is current."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, build_shapes, tiny_tree
from PIL import Image

from pvtcap.config import Config
from pvtcap.configfile import parse
from pvtcap.configreference import reference
from pvtcap.shardset import ShardReader, ShardSet

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(?:^|\s)(?:pvtcap(?! \d)|launch/local\.sh|slurm/\w+\.sbatch|slurm/pipeline\.sh)(?=\s|$)")


def commands(page: Path) -> list[str]:
    """Lines of its indented blocks and words in `…` that are commands, without their comments."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    words = re.findall(r"`([^`]+)`", re.sub(r"(?m)^    .*$", "", text))
    return [one for one in (re.split(r"\s+#", line)[0] for line in [*lines, *words]) if COMMAND.search(one)]


@cache
def help_of(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pvtcap", *words, "--help"], capture_output=True, text=True, check=True,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb"},
    )  # fmt: skip
    return done.stdout


def command_words(line: str) -> list[str]:
    """``train CONFIG --option``, however it is started."""
    words = shlex.split(line)
    place = next(n for n, word in enumerate(words) if COMMAND.fullmatch(word))
    rest, script = words[place + 1 :], Path(words[place]).stem
    of_script = {"train": "train", "evaluate": "evaluate", "shards": "shards", "features": "features"}
    return [of_script[script], *rest] if script in of_script else rest


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_exists(page: Path) -> None:
    for line in commands(page):
        if not (words := command_words(line)) or words[0].startswith("-") or words[0] in ("…", "|"):
            continue
        if words[0] not in help_of():
            assert words[0].isupper() or words[0].startswith(("configs/", "…")), line  # a configuration for a script
            continue
        many = 2 if words[0] == "shards" and len(words) > 1 and re.fullmatch(r"[a-z][a-z0-9-]+", words[1]) else 1
        for option in (word.partition("=")[0] for word in words[1:] if re.match(r"--[a-z]", word)):
            assert option in help_of(*words[:many]), f"{page.name}: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_and_link_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    sections = {name: field.annotation for name, field in Config.model_fields.items()}
    for section, key in re.findall(r"`(\w+)\.(\w+)(?:=[^`]*)?`", text):
        if (
            section in sections
            and section != "precision"
            and key not in ("py", "yaml", "json", "sbatch", "safetensors")
        ):
            model: Any = sections[section]
            assert key in model.model_fields, f"{page.name}: {section}.{key}"
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"
    for path in re.findall(r"`((?:configs|docs|launch|slurm|benchmarks|tests|shards)/[\w./-]+\.\w+)`", text):
        assert (ROOT / path).exists() or path == "configs/mine.yaml", f"{page.name}: {path}"


def test_the_reference_of_the_configuration_is_current() -> None:
    """Made by python -m pvtcap.configreference > docs/configuration.md"""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference()


def test_every_number_of_the_log_is_explained() -> None:
    """What the monitor and the scorers write, in docs/monitoring.md."""
    page = (ROOT / "docs" / "monitoring.md").read_text(encoding="utf-8")
    sources = "".join((ROOT / "pvtcap" / f"{name}.py").read_text() for name in ("monitor", "rankreading"))
    written = set(re.findall(r'"((?:train|speed|data|memory|val|checkpoint)/\w+)"', sources)) - {
        "val/captions",
        "val/worst",
    }
    assert len(written) > 20
    explained = page.replace(
        "`…_per_device`", "`speed/images_per_second_per_device` `speed/captions_per_second_per_device`"
    )
    assert {name for name in written if f"`{name}`" not in explained} == set()


def test_a_newcomer_types_what_the_readme_says(tmp_path: Path) -> None:
    """The commands for one's own photos, as they stand there; with fewer processes, and a small configuration."""
    build_shapes(tmp_path / "drawn", "train", 24, 24)
    (tmp_path / "photos").mkdir()
    rows = ["file,caption"]
    with ShardReader(ShardSet.open(tmp_path / "drawn")) as reader:
        for index in range(24):
            sample = reader.read(0, index)
            (tmp_path / "photos" / f"{index}.jpg").write_bytes(sample.photo)
            rows += [f'{index}.jpg,"{caption}"' for caption in sample.captions]
    (tmp_path / "captions.csv").write_text("\n".join(rows) + "\n")
    shutil.copy(tmp_path / "photos" / "0.jpg", tmp_path / "holiday.jpg")
    (tmp_path / "configs").mkdir()
    for name in ("launch", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "configs" / "flickr30k.yaml", tmp_path / "configs")
    blocks = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Your own photos")[2].partition("\n## ")[0]
    wanted = (
        *(
            "pvtcap shards folder",
            "pvtcap shards info",
            "pvtcap shards verify",
            "cp configs/",
            "NPROC=8 launch/local.sh",
        ),
        *(f"pvtcap {word}" for word in ("plan", "audit", "caption", "compare", "score", "export", "report")),
    )
    typed = [re.split(r"\s{2,}#|\s#\s", line)[0].strip() for line in blocks.splitlines() if line.startswith("    ")]
    typed = [line for line in typed if line.startswith(wanted)]
    assert [next(line for line in typed if line.startswith(start)) for start in wanted]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHON": sys.executable,
                   "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}  # fmt: skip
    said = ""
    for line in typed:
        if "train" in line.split():
            _prepare_training(tmp_path)
        if line.startswith("pvtcap compare"):
            (tmp_path / "runs" / "other").symlink_to(tmp_path / "runs" / "mine")
        if line.startswith("pvtcap score"):
            _coco_files(tmp_path)
        line = line.replace("NPROC=8", "NPROC=2").replace("--nodes 4 --gpus-per-node 8", "--nodes 1 --gpus-per-node 2")
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-1500:]}{done.stderr[-3000:]}"
        said += done.stdout
    assert "holiday.jpg" in said
    for left in ("mine-info", "runs/mine/test/report.html", "captions.png", "my-captioner/config.json", "report.html"):
        assert (tmp_path / left).exists(), left


def _prepare_training(folder: Path) -> None:
    """configs/mine.yaml, after the copy has been changed as its user would; the test data; a tar to caption."""
    tree = tiny_tree(folder, folder / "runs" / "mine")
    tree["data"] |= {"train": "data/mine", "val": "data/mine"}
    tree["train"]["steps"] = 4
    tree["run"]["dir"] = "runs/mine"
    parse(tree, "mine.yaml")
    assert (folder / "configs" / "mine.yaml").exists(), "cp configs/flickr30k.yaml configs/mine.yaml"
    (folder / "configs" / "mine.yaml").write_text(yaml.safe_dump(tree))
    (folder / "data" / "mine-test").symlink_to(folder / "data" / "mine")
    shutil.copy(next((folder / "data" / "mine").glob("*.tar")), folder / "more.tar")


def _coco_files(folder: Path) -> None:
    """results.json as evaluate wrote it, and its references in COCO's format."""
    shutil.copy(folder / "runs" / "mine" / "test" / "results.json", folder / "results.json")
    rows = [json.loads(line) for line in (folder / "runs/mine/test/captions.jsonl").read_text().splitlines()]
    annotations = [
        {"id": 100 * n + m, "image_id": row["image_id"], "caption": caption}
        for n, row in enumerate(rows)
        for m, caption in enumerate(row["references"])
    ]
    images = [{"id": row["image_id"]} for row in rows]
    (folder / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    with Image.open(folder / "captions.png") as sheet:
        assert sheet.width > 200
