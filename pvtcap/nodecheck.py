"""What a node of a Slurm job sees of what a command needs; launch/slurmnode.py compares the nodes. Loads no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pvtcap import __version__, configfile, recipes
from pvtcap.errors import ConfigError, PvtcapError
from pvtcap.shardset import MANIFEST, sha256_file
from pvtcap.stepfolders import latest, step_of


def check(words: list[str]) -> dict[str, Any]:
    """Facts of this node about ``pvtcap WORDS``, for JSON: version, places and what is there, and a problem or None.

    A place that is shared has the same fact on all nodes: a ShardSet its manifest's hash, a run folder its inode.
    """
    facts: dict[str, Any] = {
        "version": " ".join(filter(None, (__version__, recipes.git_revision()))),
        "places": {},
        "problem": None,
        "run": None,
        "last_step": None,
    }
    try:
        if words[:1] == ["train"]:
            _check_train(words[1:], facts)
        else:
            _check_paths(words[1:], facts)
    except PvtcapError as error:
        facts["problem"] = str(error)
    return facts


def _check_train(words: list[str], facts: dict[str, Any]) -> None:
    plain = [word for word in words if not word.startswith("-")]
    options = [word for word in words if word.startswith("--resume")]
    if options == ["--resume"]:  # its value is a word of its own
        plain.remove(words[words.index("--resume") + 1])
    if not plain:
        raise ConfigError("no configuration", do="Name one: train configs/flickr30k.yaml")
    config = configfile.load(plain[0], plain[1:])
    for path in (*(source.path for source in config.data.train), config.data.val):
        if path is not None and "://" not in path:
            facts["places"][path] = _shardset(Path(path))
    run = config.run.dir
    try:
        run.mkdir(parents=True, exist_ok=True)
        if not os.access(run, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise ConfigError("cannot write to the run folder", where=run, got=error.strerror) from None
    facts["places"][str(run)] = run.stat().st_ino
    facts["run"] = str(run)
    newest = latest(run / "checkpoints")
    facts["last_step"] = 0 if newest is None else step_of(newest)


def _check_paths(words: list[str], facts: dict[str, Any]) -> None:
    """``evaluate CHECKPOINT`` and ``features CONFIG``, each with --data DIR."""
    for word, option in zip(words, ["", *words], strict=False):
        if option == "--data" and "://" not in word:
            facts["places"][word] = _shardset(Path(word))
    if words and not words[0].startswith("-"):
        place = recipes.find_config(words[0]) if words[0].endswith(".yaml") else Path(words[0])
        if not place.exists():
            raise ConfigError("no such file or folder", where=place)
        facts["places"][words[0]] = place.stat().st_ino


def _shardset(folder: Path) -> str:
    if not (folder / MANIFEST).is_file():
        raise ConfigError(f"no ShardSet here (no {MANIFEST})", where=folder)
    return sha256_file(folder / MANIFEST)
