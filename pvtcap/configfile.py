"""A Config from a YAML file and words of the command line.

    config = load("configs/flickr30k.yaml", ["optim.lr=5e-5", "data.global_batch=128"])

Precedence, lowest first: the defaults of ``config``, the file, then ``section.key=value`` words. A file holds only
what differs from the defaults. An unknown key is an error with a suggestion; a number typed as ``3e-4`` (which YAML
reads as a string) is the number.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from pvtcap import recipes
from pvtcap.config import Config, EvaluateConfig
from pvtcap.errors import ConfigError, did_you_mean

# ValueError: a number of thousands of digits. RecursionError: brackets, hundreds deep.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


class _Loader(yaml.SafeLoader):
    """YAML without its dates: in ``run.dir=2026-12-01`` that is a name, and 2026-12-41 another."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def load(name: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (a path, or the name of a shipped one: ``flickr30k``) and apply ``a.b=c`` overrides."""
    path = recipes.find_config(name)
    tree = read_yaml(path) or {}
    if not isinstance(tree, dict):
        raise ConfigError("a configuration is a mapping of sections", where=path, got=type(tree).__name__)
    for word in overrides:
        _override(tree, word)
    return parse(tree, where=path)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; ConfigError when it cannot be read or is none."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"cannot read it: {error.strerror}", where=path) from None
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#x} at {error.start:,}"
        raise ConfigError("not UTF-8 text", where=path, got=got, do="Save it as UTF-8.") from None
    except _NOT_YAML as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", where=path) from None


def parse(tree: dict[str, Any], where: object) -> Config:
    """Validate a tree of plain values; ConfigError names the first thing wrong with it."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
    dotted = ".".join(str(part) for part in first["loc"])
    place = [part for part in first["loc"] if isinstance(part, str)]  # without the numbers of a list's items
    if first["type"] == "extra_forbidden":
        known = _known_keys(place[:-1])
        hint = did_you_mean(place[-1], known) or _other_section(place[-1]) or f"Known here: {', '.join(known)}."
        raise ConfigError(f"unknown key '{dotted}'", where=where, do=hint)
    message = first["msg"].removeprefix("Value error, ").lower().removeprefix("input should be ")
    if first["type"] == "path_type":
        message = "a path"
    if first["type"] == "value_error":
        raise ConfigError(first["msg"].removeprefix("Value error, "), where=f"{where}: {dotted}" if dotted else where)
    raise ConfigError(f"bad value for '{dotted}'", where=where, got=repr(first["input"]), wanted=message)


def evaluating(config: Config, changed: dict[str, Any]) -> EvaluateConfig:
    """The evaluate section with other values, checked like a file's."""
    tree = config.model_dump(mode="json")
    return parse({**tree, "evaluate": {**tree["evaluate"], **changed}}, where="evaluate").evaluate


def flat(tree: dict[str, Any], above: str = "") -> dict[str, Any]:
    """A configuration's tree as ``section.key`` and value; lists are values."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def _override(tree: dict[str, Any], word: str) -> None:
    dotted, equals, value = word.partition("=")
    if not equals or not dotted:
        raise ConfigError("not an override", got=repr(word), wanted="section.key=value, such as optim.lr=1e-4")
    *sections, key = dotted.split(".")
    branch = tree
    for section in sections:
        branch = branch.setdefault(section, {})
        if not isinstance(branch, dict):
            raise ConfigError(f"'{section}' in '{dotted}' is a value, not a section")
    try:
        read = yaml.load(value, _Loader)
    except _NOT_YAML:
        read = value
    # run.dir=20261201 is a name, and text.prompt= no prompt; but where null must not be, it is nobody's name either.
    wanted = _types_at(sections, key)
    typed = {str, Path} & wanted and type(read) not in {*wanted, list, dict} and (read is not None or not value)
    branch[key] = value if typed else read


def _types_at(sections: Sequence[str], key: str) -> set[Any]:
    """What a key may be: the members of a union, or the one type; nothing for a key that there is not."""
    model = _model_at(sections)
    if model is None or key not in model.model_fields:
        return set()
    annotation = model.model_fields[key].annotation
    return set(get_args(annotation)) if get_origin(annotation) in (Union, types.UnionType) else {annotation}


def _model_at(sections: Sequence[str]) -> type[BaseModel] | None:
    model: type[BaseModel] = Config
    for section in sections:
        annotation = model.model_fields[section].annotation if section in model.model_fields else None
        options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType, tuple) else (annotation,)
        model_options = [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
        if not model_options:
            return None
        model = model_options[0]
    return model


def _known_keys(sections: Sequence[str]) -> list[str]:
    model = _model_at(sections)
    return list(model.model_fields) if model else []


def _other_section(key: str) -> str | None:
    homes = [name for name in Config.model_fields if key in _known_keys([name])]
    return f"Did you mean '{homes[0]}.{key}'?" if homes else None
