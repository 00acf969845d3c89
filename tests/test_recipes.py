"""pytest tests/test_recipes.py: what is shipped beside the code, in a checkout and in a wheel."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pvtcap import recipes
from pvtcap.captioner import Captioner
from pvtcap.config import batch_plan
from pvtcap.configfile import load
from pvtcap.errors import ConfigError

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_configuration_loads_and_says_what_to_expect(path: Path) -> None:
    config = load(path)
    assert load(path.stem) == load(f"configs/{path.name}") == config
    assert config.run.dir == Path("runs") / path.stem
    assert config.train.epochs or config.train.steps
    assert batch_plan(config.data, 2).global_batch == config.data.global_batch
    text = path.read_text()
    head = text[: text.index("\nrun:")]
    assert f"launch/local.sh train configs/{path.name}" in head
    for word in ("Hardware:", "Expected time:", "Expected score:"):
        assert word in head


def test_flickr30k_is_the_published_recipe() -> None:
    config = load("flickr30k")
    assert (config.train.epochs, config.data.global_batch, config.optim.lr) == (5, 64, 1e-4)
    assert (config.optim.warmup_steps, config.optim.weight_decay) == (500, 0.05)
    assert (config.model.encoder, config.model.encoder_weights) == ("pvt_v2_b1", "timm")
    assert config.model.decoder == "Salesforce/blip-image-captioning-base"


def test_the_cpu_configurations_build_a_model() -> None:
    for name in ("shapes", "flickr8k_tiny"):
        config = load(name)
        model = Captioner(config, config.text.vocab_size)
        assert set(model.trainable())


@pytest.mark.parametrize("path", sorted([*(ROOT / "launch").glob("*.sh"), ROOT / ".ci/run"]), ids=lambda p: p.name)
def test_scripts_parse_and_may_be_run(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert path.stat().st_mode & 0o111


def test_find_and_copy(tmp_path: Path) -> None:
    assert recipes.find("launch/local.sh") == ROOT / "launch" / "local.sh"
    assert recipes.find_builder("flickr8k") == ROOT / "shards" / "flickr8k.py"
    copied = recipes.copy("configs/shapes.yaml", tmp_path)
    assert copied.read_bytes() == (ROOT / "configs/shapes.yaml").read_bytes()
    with pytest.raises(ConfigError, match="not copied: the file exists already"):
        recipes.copy("configs/shapes.yaml", tmp_path)
    for wrong, says in (
        (lambda: recipes.find_config("flickr30"), "Did you mean 'flickr30k'"),
        (lambda: recipes.find_builder("flickr3k"), "Did you mean 'flickr30k'"),
        (lambda: recipes.find("configs/shape.yaml"), "Did you mean 'configs/shapes.yaml'"),
    ):
        with pytest.raises(ConfigError, match=says):
            wrong()


def test_a_wheel_carries_the_recipes(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for folder in ("shards", "launch", "configs"):
        for path in (ROOT / folder).iterdir():
            if path.is_file():
                assert f"pvtcap/_recipes/{folder}/{path.name}" in names
    assert not [name for name in names if name.split("/")[0] in ("shards", "tests", "launch", "benchmarks")]
    # As an installed wheel would: the package alone, far from the checkout.
    code = "from pvtcap import configfile, recipes; print(recipes.root(), configfile.load('shapes').run.dir)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.split() == [str(tmp_path / "site/pvtcap/_recipes"), "runs/shapes"]


def test_local_sh_starts_one_process_where_there_is_no_gpu(tmp_path: Path) -> None:
    for name in ("bash", "env", "dirname", "nproc", "wc"):  # and no nvidia-smi
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    environment = {"PATH": str(tmp_path), "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "launch" / "local.sh", "--version"], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pvtcap ")
