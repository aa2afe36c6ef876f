"""Settings from YAML files, `--set` flags and Python, checked by pydantic; what is wrong is said in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from .errors import OsmlError, unknown_name


class Part(BaseModel):
    """Something chosen by name, with its own keyword arguments: `{name: ArcFaceLoss, margin: 20}` or `ArcFaceLoss`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def args(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


NamedPart = Annotated[Part, BeforeValidator(_named)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Schema = TypeVar("Schema", bound=Section)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """The keys and values of a YAML file; OsmlError where it holds no such thing."""
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader) or {}
    except OSError as error:
        raise OsmlError(f"cannot read the configuration '{file}': {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date such as 2001-99-99
        problem = " ".join(str(error).split())
        raise OsmlError(f"the configuration '{file}' is not YAML: {problem}") from error
    if not isinstance(values, dict):
        raise OsmlError(f"the configuration '{file}' must hold keys and values; it holds a {type(values).__name__}")
    return values


def checked(values: Mapping[str, Any], schema: type[Schema]) -> Schema:
    """A checked configuration of plain values; the first thing that is wrong with them is one line of OsmlError."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise _in_one_line(error, schema) from error


def apply_override(values: dict[str, Any], override: str, schema: type[Section]) -> None:
    """Set `loss.margin=20` in nested values of a schema; the name of a part may stand where the part does."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise OsmlError(f"cannot read --set '{override}': expected section.key=value, such as loss.margin=20")
    if len(path) == 2 and path[1] == "name":
        path = path[:1]  # another part takes none of the old one's arguments with it
    for i, step in enumerate(path[:-1]):
        below = values.get(step)
        if below is None:
            default = schema.model_fields[step].default if i == 0 and step in schema.model_fields else None
            below = default.model_dump() if isinstance(default, Part) else {}
        values[step] = below = _named(below)
        if not isinstance(below, dict):
            raise OsmlError(f"cannot set '{key}': '{step}' is a value, not a section")
        values = below
    try:
        values[path[-1]] = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise OsmlError(f"cannot read the value of --set '{override}': expected YAML, such as 20 or [1, 2]") from error


def _in_one_line(error: ValidationError, schema: type[Section]) -> OsmlError:
    first = error.errors()[0]
    if isinstance(cause := (first.get("ctx") or {}).get("error"), OsmlError):
        return cause
    section: Any = schema
    path: list[str] = []
    for step in map(str, first["loc"]):  # what is no field is one of the forms that a field may have
        if step in _fields(section):
            path.append(step)
            section = section.model_fields[step].annotation if hasattr(section, "model_fields") else None
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        wrong = ".".join([*path, str(first["loc"][-1])])
        return unknown_name("configuration key", wrong, [".".join([*path, f]) for f in _fields(section)])
    return OsmlError(f"configuration key '{'.'.join(path)}' = {first['input']!r} is wrong: {first['msg']}")


def _fields(section: Any) -> Iterable[str]:
    """The keys of a section, which is a pydantic model or a dataclass; a plain value has none."""
    return getattr(section, "model_fields", None) or getattr(section, "__dataclass_fields__", ())


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number, as in Python (YAML 1.1 wants 1.0e-3)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)
