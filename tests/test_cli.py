"""pytest tests/test_cli.py: the command as a user types it, in processes of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import ROOT, torchrun
from test_checkpoint import write
from test_train import losses

from pvtcap.config import Config
from pvtcap.configfile import parse
from pvtcap.shardset import ShardSet


def pvtcap(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pvtcap", *map(str, words)]
    return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a failed command: exit code 2, one line of ours, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("pvtcap: error")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture
def yaml_file(tree: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def damaged_copy(shapes: Path, tmp_path: Path, how: str) -> Path:
    folder = tmp_path / "damaged"
    if how == "missing folder":
        return folder
    shutil.copytree(shapes / "train", folder)
    shardset = ShardSet.open(folder)
    tar = folder / shardset.manifest.shards[0].file
    if how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "truncated tar":
        tar.write_bytes(tar.read_bytes()[:-5000])
    elif how == "not a photo":
        # In every sample, so that the first batch has one.
        raw = bytearray(tar.read_bytes())
        for offset, size in shardset.load_index(0).photos:
            raw[offset : offset + size] = b"x" * size
        tar.write_bytes(raw)
    return folder


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing folder", "no such shard folder"),
        ("no manifest", "shard folder without a manifest.json"),
        ("truncated tar", "truncated tar; got"),
        ("not a photo", r"sample train-0000\d\d: too many photos cannot be decoded: not a photo; got 1 in epoch 0"),
    ],
)
def test_training_on_damaged_shards(shapes: Path, yaml_file: Path, tmp_path: Path, how: str, says: str) -> None:
    folder = damaged_copy(shapes, tmp_path, how)
    line = one_line(pvtcap("train", yaml_file, f"data.train={folder}"))
    assert re.search(says, line)
    assert str(folder) in line
    # Damage that only reading finds is found after the run began; a checkpoint there is not.
    assert (tmp_path / "run").exists() == (how == "not a photo")
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["optim.learning_rate=1"], "unknown key 'optim.learning_rate'"),
        (["optim.warmup=1"], "Did you mean 'warmup_steps'?"),
        (["data.global_batch=9", "data.micro_batch=2"], "got global_batch 9, micro_batch 2, 1 rank"),
        (["data.train=null"], "no training data"),
        (["train.steps=null"], "Set train.epochs or train.steps"),
        (["model.encoder=pvt_v3"], "not a PVT v2 encoder"),
        (["--resume", "nowhere"], "nowhere: no such checkpoint folder"),
    ],
)
def test_words_that_cannot_be_run(yaml_file: Path, tmp_path: Path, words: list[str], says: str) -> None:
    assert says in one_line(pvtcap("train", yaml_file, *words))
    assert not (tmp_path / "run").exists()


def test_two_ranks_say_it_once_and_the_launcher_keeps_the_exit_code(yaml_file: Path, tmp_path: Path) -> None:
    for word, says in (
        ("optim.lrr=1", "Did you mean 'lr'?"),
        ("data.global_batch=7", "got global_batch 7, micro_batch 3, 2 ranks; wanted a multiple of 6"),
        (f"data.train={tmp_path}/none", "no such shard folder"),
    ):
        assert says in one_line(torchrun(2, "-m", "pvtcap", "train", str(yaml_file), word))
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model(config: Config, yaml_file: Path, tmp_path: Path, shapes: Path) -> None:
    folder = write(config, 3)
    line = one_line(pvtcap("train", yaml_file, "model.decoder_width=64", f"run.dir={tmp_path}/new", "--resume", folder))
    assert "cannot resume: model is not what the checkpoint was made with" in line
    assert not (tmp_path / "new").exists()
    # The same through the weights: a manifest that says one model over another one's tensors.
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config"]["model"]["decoder_width"] = 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    line = one_line(pvtcap("evaluate", folder, "--data", shapes / "val", "--out", tmp_path / "out"))
    assert "weights of another model" in line
    assert not (tmp_path / "out").exists()


def test_photos_and_captions_that_are_none(config: Config, tmp_path: Path) -> None:
    folder = write(config, 3)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_text("this is not a photo")
    done = pvtcap("caption", folder, tmp_path / "photos/cat.jpg")
    assert "cat.jpg: not a photo" in one_line(done)
    assert done.stdout == ""
    (tmp_path / "captions.csv").write_text("file,caption\ncat.jpg,a cat\n")
    build = ["shards", "folder", "--images", tmp_path / "photos", "--captions", tmp_path / "captions.csv"]
    assert "got cat (not a photo)" in one_line(pvtcap(*build, "--out", tmp_path / "shards"))
    (tmp_path / "captions.csv").write_text('file,caption\ncat.jpg,"  "\n')
    assert "got cat (no caption)" in one_line(pvtcap(*build, "--out", tmp_path / "shards"))
    assert not (tmp_path / "shards").exists()


def test_the_shards_command(shapes: Path, tmp_path: Path) -> None:
    helped = pvtcap("shards", "--help")
    assert "builders: coco, conceptual-captions, flickr30k, flickr8k, folder, shapes" in helped.stdout
    for word in ("info", "verify"):
        assert f"pvtcap shards {word} DIR" in helped.stdout
        explained = pvtcap("shards", word, "--help")
        assert (explained.returncode, "--json" in explained.stdout) == (0, True)
        assert "required: DIR" in one_line(pvtcap("shards", word))
    assert "Did you mean 'shapes'" in one_line(pvtcap("shards", "shape", "--out", tmp_path / "out"))
    assert "Did you mean 'verify'" in one_line(pvtcap("shards", "verfy", shapes / "train"))
    verified = pvtcap("shards", "verify", shapes / "train")
    assert (verified.returncode, "nothing wrong" in verified.stdout) == (0, True)
    damaged = damaged_copy(shapes, tmp_path, "not a photo")
    verified = pvtcap("shards", "verify", damaged)
    assert verified.returncode == 1
    assert "sha256" in verified.stdout


def test_shards_as_json(shapes: Path, tmp_path: Path) -> None:
    """One object on stdout and nothing else, whatever else is said."""
    done = pvtcap("shards", "info", shapes / "train", "--json", "--out", tmp_path / "pictures")
    assert (done.returncode, json.loads(done.stdout)["num_samples"]) == (0, 48)
    assert done.stderr.count("drawn: ") == 2
    assert "48" in pvtcap("shards", "info", shapes / "train").stdout
    done = pvtcap("shards", "verify", shapes / "train", "--json")
    sizes = [tar.stat().st_size for tar in (shapes / "train").glob("*.tar")]
    whole = {"num_shards": 3, "num_samples": 48, "bytes_read": sum(sizes), "problems": [], "ok": True}
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"path": str(shapes / "train"), **whole}
    damaged = damaged_copy(shapes, tmp_path, "truncated tar")
    done = pvtcap("shards", "verify", damaged, "--json", "--processes", "1")
    found = json.loads(done.stdout)
    assert (done.returncode, found["ok"], found["num_samples"]) == (1, False, 48)
    assert found["problems"][0].keys() == {"shard", "key", "problem"}
    # A name that rich would read as markup that nobody opened.
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "[red] [bold.tar"
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    done = pvtcap("shards", "verify", damaged)
    assert (done.returncode, "[red] [bold.tar" in done.stdout, done.stderr) == (1, True, "")
    (damaged / "manifest.json").write_text("{")
    for word in ("info", "verify"):
        done = pvtcap("shards", word, damaged, "--json")
        assert "not a valid Manifest" in one_line(done)
        assert done.stdout == ""


def test_words_about_pvtcap_itself(tmp_path: Path) -> None:
    assert re.fullmatch(r"pvtcap \d+\.\d+\.\d+\S*( \([0-9a-f]{40}\+?\))?\n", pvtcap("--version").stdout)
    assert pvtcap("where", "launch/local.sh").stdout.strip() == str(ROOT / "launch/local.sh")
    assert pvtcap("copy", "configs/shapes.yaml", cwd=tmp_path).returncode == 0
    assert (tmp_path / "shapes.yaml").is_file()
    assert "Did you mean 'configs/shapes.yaml'" in one_line(pvtcap("where", "configs/shape.yaml"))


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; sys.argv = ['pvtcap', '--help']\nfrom pvtcap.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print('heavy:', sorted({'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "heavy: []" in done.stdout


def test_a_run_killed_at_any_moment_goes_on_with_the_same_losses(tree: dict[str, Any], tmp_path: Path) -> None:
    """SIGKILL, which nothing can prepare for, to launcher and ranks; then the same words again."""
    tree["train"] |= {"steps": 30}
    tree["checkpoint"] = {"every_steps": 5}
    tree["data"] |= {"workers": 1}
    for name in ("whole", "killed"):
        tree["run"]["dir"] = str(tmp_path / name)
        (tmp_path / f"{name}.yaml").write_text(parse(tree, "test").to_yaml())
    words = [sys.executable, str(ROOT / "launch/torchrun.py"), "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "pvtcap", "train", str(tmp_path / "killed.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = tmp_path / "killed" / "log.jsonl"
    running = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while not (log.is_file() and len(log.read_text().splitlines()) >= 12):
            assert running.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        # torchrun gives each rank a session of its own: killing the launcher's group would leave them running.
        launcher = psutil.Process(running.pid)
        everyone = [*launcher.children(recursive=True), launcher]
        for process in everyone:
            process.kill()
        psutil.wait_procs(everyone)
        running.wait()
    assert max(losses(tmp_path / "killed")) < 30
    for name in ("killed", "whole"):
        done = torchrun(2, "-m", "pvtcap", "train", str(tmp_path / f"{name}.yaml"))
        assert done.returncode == 0, done.stderr[-4000:]
        assert ("going on from step" in done.stdout) == (name == "killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert sorted(losses(tmp_path / "whole")) == list(range(1, 31))
