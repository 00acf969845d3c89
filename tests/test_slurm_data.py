"""pytest tests/test_slurm_data.py: shards as an array job, and from photos to scores as one submission."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import yaml
from conftest import ROOT, tiny_tree
from PIL import Image
from slurmcluster import SlurmCluster, missing_programs
from test_conceptual_captions import LOOPBACK, QUICK, run, samples, serve, write_table

from pvtcap.shardset import ShardSet

pytestmark = pytest.mark.skipif(
    bool(missing_programs()), reason=f"no Slurm on this machine: {', '.join(missing_programs())}"
)
FLICKR8K = ROOT.parent / "shared" / "data" / "flickr8k"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def test_an_array_builds_parts_of_which_one_is_killed_and_joined_they_are_a_single_build(
    cluster: SlurmCluster, tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(40):
        Image.effect_noise((120, 90), 60).convert("RGB").save(photos / f"{number}.jpg")
    script, parts, joined = str(ROOT / "slurm" / "shards.sbatch"), tmp_path / "parts", tmp_path / "joined"
    with contextlib.closing(serve(photos, tmp_path / "port")) as serving:
        server = next(serving)
        # Slowly: the first shard of a part is there a second before its last.
        rows = [(f"photo {number}", f"{server.address}/slow/{number}.jpg") for number in range(40)]
        table = write_table(tmp_path / "table.tsv", rows)
        words = (
            "conceptual-captions",
            "--tsv",
            str(table),
            *LOOPBACK,
            *QUICK,
            "--per-host",
            "2",
            "--samples-per-shard",
            "4",
        )
        single = run(*words[1:], out=tmp_path / "single")
        array = cluster.sbatch("--array", "1-3", script, *words, "--out", str(parts), cwd=tmp_path)
        join = cluster.sbatch(
            "--dependency", f"afterok:{array}", script, "join", *(str(parts / f"part-{part}") for part in (1, 2, 3)),
            "--out", str(joined), cwd=tmp_path,
        )  # fmt: skip
        while not list((parts / "part-1").glob("*.tar")):
            assert cluster.state(f"{array}_1") in ("PENDING", "RUNNING", "COMPLETED"), cluster.account(array)
            time.sleep(0.02)
        assert cluster.run("scontrol", "requeue", f"{array}_1").returncode == 0
        cluster.wait(join, "COMPLETED", timeout=200, hurry=f"{array}_1")
    assert samples(ShardSet.open(joined)) == samples(single)
    logs = sorted(path.name for path in tmp_path.glob("pvtcap-shards-*.log"))
    assert logs[:3] == [f"pvtcap-shards-{array}-{part}.log" for part in (1, 2, 3)]


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="shared/data/flickr8k is not here")
def test_one_submission_leads_from_photos_to_scores(cluster: SlurmCluster, tmp_path: Path) -> None:
    tree = tiny_tree(tmp_path, tmp_path)
    tree["train"] |= {"steps": 4, "what": "projection+decoder"}
    weights = tmp_path / "encoder.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("pvt_v2_b0", num_classes=0).state_dict(), weights)
    tree["model"] |= {"encoder_weights": str(weights), "encoder_stages": 4}
    file, data = tmp_path / "tiny.yaml", tmp_path / "data"
    file.write_text(yaml.safe_dump(tree))
    dev = str(FLICKR8K / "Flickr_8k.devImages.txt")
    cluster.environment |= {
        "SHARDS": f"flickr8k --images {FLICKR8K / 'images'} --captions {FLICKR8K / 'Flickr8k.token.txt'} "
        "--short-side-px 64",
        "TRAIN_LIST": dev, "VAL_LIST": dev, "FEATURES": "1", "NODES": "2",
    }  # fmt: skip
    done = cluster.run(str(ROOT / "slurm" / "pipeline.sh"), str(file), str(data), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    cluster.wait(int(done.stdout), "COMPLETED", timeout=500)
    report = json.loads((data / "scores" / "scores.json").read_text())
    assert report["num_photos"] == 500
    assert report["scores"]["Bleu_1"] is not None
    assert ShardSet.open(data / "train-features").manifest.features is not None
