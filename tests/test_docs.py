"""pytest tests/test_docs.py: what README and docs/ name is there and current. test_docs_typed.py types it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from pvtcap.config import Config
from pvtcap.configreference import reference

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
