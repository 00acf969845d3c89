"""docs/configuration.md, from the models in ``config``: python -m pvtcap.configreference > docs/configuration.md"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from pvtcap.config import Config

_HEAD = """# Configuration

Every key of a configuration file, with its type, default and meaning. Made by `python -m pvtcap.configreference`
from pvtcap/config.py; a test keeps it so. A file holds what differs from the defaults; `section.key=value` on the
command line goes before the file; a key that does not exist is an error. What ran, resolved, is in RUN/config.yaml.
"""


def reference() -> str:
    """The whole page."""
    sections, plain = [], []
    for name, field in Config.model_fields.items():
        model = field.annotation
        if isinstance(model, type) and issubclass(model, BaseModel):
            sections.append(f"\n## {name}\n\n{_table(model, f'{name}.')}")
        else:
            plain.append(_row(name, field))
    return f"{_HEAD}\n{_HEADINGS}{''.join(plain)}{''.join(sections)}"


_HEADINGS = "| key | type | default | |\n|---|---|---|---|\n"


def _table(model: type[BaseModel], above: str) -> str:
    return _HEADINGS + "".join(_row(f"{above}{name}", field) for name, field in model.model_fields.items())


def _row(key: str, field: Any) -> str:
    default = field.get_default(call_default_factory=True)
    shown = "required" if default is PydanticUndefined else f"`{_yaml(default)}`"
    text = (field.description or "").replace("|", "\\|")
    return f"| `{key}` | {_type(field)} | {shown} | {text} |\n"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type(field: Any) -> str:
    """As a person says it, with the limits: ``int ≥ 1``, ``one of a, b``."""
    name = _name(field.annotation)
    limits = "".join(
        f" {sign} {getattr(one, attribute):g}"
        for one in _metadata(field)
        for attribute, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤"))
        if getattr(one, attribute, None) is not None
    )
    number, maybe, null = name.partition(" or null")
    return number + limits + maybe + null


def _name(annotation: Any) -> str:
    origin, arguments = getattr(annotation, "__origin__", None), getattr(annotation, "__args__", ())
    if origin is None and not arguments:
        return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))
    if str(origin) == "typing.Literal":
        return "one of " + ", ".join(f"`{value}`" for value in arguments)
    if getattr(annotation, "__metadata__", None) is not None:
        return _name(origin)
    names = [_name(one) for one in arguments if one is not Ellipsis]
    return f"list of {names[0]}" if origin is tuple else " or ".join(names)


def _metadata(field: Any) -> list[Any]:
    """Limits of the field, and those within ``X | None``."""
    inner = [
        one for argument in getattr(field.annotation, "__args__", ()) for one in getattr(argument, "__metadata__", ())
    ]
    return [*field.metadata, *inner]


if __name__ == "__main__":
    print(reference(), end="")
