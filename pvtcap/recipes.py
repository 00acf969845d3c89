"""Where shards/, launch/, configs/ and slurm/ are: at the top of a checkout, or inside an installed wheel."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from pvtcap.errors import ConfigError, did_you_mean

FOLDERS = ("shards", "launch", "configs", "slurm")


def root() -> Path:
    """The folder that holds the four recipe folders."""
    package = Path(__file__).resolve().parent
    inside_wheel = package / "_recipes"
    return inside_wheel if inside_wheel.is_dir() else package.parent


def git_revision() -> str | None:
    """The commit of the checkout that runs, with '+' if files differ from it; None in an installed wheel."""
    if not (root() / ".git").exists() or shutil.which("git") is None:
        return None
    git = ["git", "-C", str(root())]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return commit.stdout.strip() + ("+" if changed.stdout else "") if commit.returncode == 0 else None


def find_config(name: str | Path) -> Path:
    """A configuration by path, or a shipped one by name (``flickr30k``, ``configs/flickr30k.yaml``)."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = root() / "configs" / f"{path.stem if path.suffix == '.yaml' else path.name}.yaml"
    if shipped.is_file() and path.parent in (Path(), Path("configs")):
        return shipped
    names = sorted(config.stem for config in (root() / "configs").glob("*.yaml"))
    hint = did_you_mean(path.stem, names) or f"Shipped ones: {', '.join(names)}."
    raise ConfigError("no such configuration", where=path, do=hint)


def find_builder(name: str, also: Iterable[str] = ()) -> Path:
    """A shard builder's script by its command-line name, such as ``conceptual-captions``.

    ``also`` are other words that a mistyped ``name`` may have meant.
    """
    path = root() / "shards" / f"{name.replace('-', '_')}.py"
    if path.is_file():
        return path
    names = sorted(builder.stem.replace("_", "-") for builder in path.parent.glob("*.py"))
    hint = did_you_mean(name, [*names, *also]) or f"Builders: {', '.join(names)}."
    raise ConfigError(f"no shard builder named '{name}'", do=hint)


def find(name: str) -> Path:
    """A shipped file by its place in the checkout, such as ``launch/local.sh``."""
    known = {f"{folder}/{path.name}": path for folder in FOLDERS for path in sorted((root() / folder).glob("*.*"))}
    if name not in known:
        raise ConfigError(
            "no such shipped file", got=name, do=did_you_mean(name, known) or f"Shipped: {', '.join(known)}."
        )
    return known[name]


def copy(name: str, to: Path) -> Path:
    """Copy a shipped file to a folder or a new name; never overwrites."""
    source = find(name)
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise ConfigError("not copied: the file exists already", where=target, do="Remove it or name another place.")
    shutil.copy(source, target)
    return target
