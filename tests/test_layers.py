"""pytest tests/test_layers.py: which module may import which, read from the source.

Every module of pvtcap has a level; it may import modules of lower levels only. Training and evaluation share one and so
never meet but in the command line. A recipe in shards/ may use what README shows for builders of one's own.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LEVELS = [
    {"errors", "imports"},
    {
        "shardformat",
        "processes",
        "hostmemory",
        "preemption",
        "spikes",
        "stallwatch",
        "libraryerrors",
        "rankreading",
        "jsonfile",
        "distribution",
        "addresses",
        "certificates",
        "robots",
        "filelock",
        "weightnames",
    },
    {
        "runlog",
        "remote",
        "gpudropout",
        "shardfiles",
        "bootstrap",
        "java",
        "jobs",
        "ptb",
        "cocofiles",
        "weightfiles",
        "jpeg",
    },
    {"gpuattention", "gpuresidual", "gpuloss", "shardcache", "deepspeedops", "zerogradients", "onednn"},
    {"cpuloss", "recipes", "dist", "loader", "order", "shardset", "tarwalk", "scorers"},
    {
        "stepfolders",
        "readahead",
        "config",
        "metrics",
        "photo",
        "featureformat",
        "sheet",
        "htmlreport",
        "evalparts",
        "scoretable",
    },
    {"runfolder", "scaling", "pixels"},
    {
        "photosource",
        "configfile",
        "comparison",
        "chart",
        "shardinfo",
        "urltable",
        "weightreport",
        "zerostate",
        "storedphoto",
    },
    {"nodecheck", "doctor"},
    {"scoring", "text", "candidate", "encoder", "projection", "infotable", "infopictures", "fetch"},
    {"shardtar", "tarsamples", "download", "sources", "batch"},
    {"shardfolder", "buildreport", "flops", "eventfiles", "packing"},
    {"bertlayers", "shardwriter", "shardverify", "stream", "featurefolder", "photoviews"},
    {"decoder"},
    {"captioner", "captionfiles", "shardindex", "shardjoin"},
    {"weights", "engine", "monitor", "ledger", "cococaptions", "dryrun", "profile"},
    {"frozenencoder", "audit", "rankmemory"},
    {"checkpoint"},
    {"modelcard", "api", "combinedmodel", "saving", "resuming", "elastic", "heatmaps"},
    {"job"},
    {"plan", "runreport", "configreference"},
    {"afterstep"},
    {"train", "evaluate", "caption", "features", "shardcommands", "export", "weightfetch"},
    {"evaluationcommands", "modelcommands"},
    {"cli"},
    {"__main__"},
]
BUILDERS_MAY_USE = {
    "pvtcap.errors",
    "pvtcap.shardset",
    "pvtcap.shardwriter",
    "pvtcap.captionfiles",
    "pvtcap.cococaptions",
}
DOWNLOADERS_MAY_USE = {"pvtcap.addresses", "pvtcap.download", "pvtcap.fetch", "pvtcap.urltable"}
LAUNCHERS_MAY_USE = {"torch", "psutil"}


def imports(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in it: ``from pvtcap import config`` counts as pvtcap.config."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {f"pvtcap.{a.name}" for a in node.names} if node.module == "pvtcap" else {node.module}
    return found - {"pvtcap.__version__"}


def test_every_module_has_a_level_and_imports_downwards_only() -> None:
    level = {f"pvtcap.{name}": number for number, names in enumerate(LEVELS) for name in names}
    modules = {f"pvtcap.{path.stem}": path for path in (ROOT / "pvtcap").glob("*.py") if path.stem != "__init__"}
    assert modules.keys() == level.keys()
    for name, path in modules.items():
        for imported in imports(path):
            if imported.startswith("pvtcap"):
                assert level[imported] < level[name], f"{name} imports {imported}"


def test_nothing_in_pvtcap_imports_the_recipes_or_the_tests() -> None:
    for path in (ROOT / "pvtcap").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"shards", "launch", "tests"}, path


@pytest.mark.parametrize("path", sorted((ROOT / "shards").glob("*.py")), ids=lambda path: path.stem)
def test_builders_use_the_writers_and_nothing_else_of_pvtcap(path: Path) -> None:
    ours = {name for name in imports(path) if name.startswith("pvtcap")}
    assert ours <= BUILDERS_MAY_USE | (DOWNLOADERS_MAY_USE if path.stem == "conceptual_captions" else set())
    assert ours


@pytest.mark.parametrize("path", sorted((ROOT / "launch").glob("*.py")), ids=lambda path: path.stem)
def test_launchers_do_not_know_pvtcap(path: Path) -> None:
    outside = {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names
    siblings = {other.stem for other in path.parent.glob("*.py")}
    assert outside <= LAUNCHERS_MAY_USE | siblings


def test_torchrun_is_started_in_one_place() -> None:
    # This file names it too, hence the two halves.
    name = "torch.distributed" + ".run"
    folders = ("pvtcap", "shards", "launch", "configs", "tests")
    users = [path for folder in folders for path in (ROOT / folder).iterdir() if path.is_file()]
    assert [path.name for path in users if name in path.read_text()] == ["torchrun.py"]


def test_only_dist_reads_what_the_launcher_says() -> None:
    for path in (ROOT / "pvtcap").glob("*.py"):
        words = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        readers = {"dist", "cli"}  # cli names its rank in the line of an error
        if path.stem not in readers:
            assert not words & {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}, path


def test_no_file_grows_beyond_reading() -> None:
    for folder in ("pvtcap", "shards", "launch"):
        for path in (ROOT / folder).glob("*.py"):
            assert len(path.read_text().splitlines()) <= 320, path
