"""One schema for YAML files, `--set` flags and Python; a key that does not exist is an error that names the nearest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from . import detectors, optimizers, pml, thresholds, trunks
from .data.roles import Fractions
from .errors import OsmlError, unknown_name
from .registry import check_arguments


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


class DataConfig(Section):
    """Reading and preparing images."""

    image_size: Literal["auto"] | Annotated[int, Field(ge=4, le=2048)] = "auto"
    """Side in pixels; auto = the images' own up to 64, else 224."""
    channels: Literal["auto", 1, 3] = "auto"
    augment: Literal["auto", "none"] | list[dict[str, Any]] = "auto"
    """auto, none, or a list of torchvision transforms by name: `[{name: RandomRotation, degrees: 10}]`."""
    fractions: Fractions = Fractions()
    """How each known class is cut into data roles where the data do not say."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"


class ModelConfig(Section):
    """The network."""

    trunk: NamedPart = Part(name="auto")
    """auto (small_cnn up to 64 pixels, resnet18 above), small_cnn, a torchvision model, package.module:factory."""
    weights: str | None = None
    """A local file, or torchvision weights by name such as DEFAULT."""
    frozen: bool = False
    """Train the embedder only."""
    embedder: Literal["auto", "linear", "mlp", "identity"] = "auto"
    embedding_size: Annotated[int, Field(ge=2)] = 64
    output: Literal["auto", "embedder", "trunk"] = "auto"
    """What the embeddings are taken from; auto = chosen on validation, and the embedder where there is nothing to
    choose by."""
    unit_norm: bool = True

    @field_validator("trunk")
    @classmethod
    def _trunk_exists(cls, part: Part) -> Part:
        trunks.check(part.name, part.args)
        return part


class TrainingConfig(Section):
    """The training run."""

    epochs: Annotated[int, Field(ge=0)] | Literal["auto"] = "auto"
    """auto = 30, and 0 for embeddings, which are then taken as they are."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    schedule: Literal["cosine", "constant"] = "cosine"
    patience: Annotated[int, Field(ge=1)] | None = None
    """Stop after so many epochs without a better validation OSCR and keep the best; needs pseudo-unknown classes."""


class Config(Section):
    """All that `osml train` can be told."""

    seed: Annotated[int, Field(ge=0, le=2**32 - 1)] = 0
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """The share of known items that may be rejected."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    loss: NamedPart = Part(name="ArcFaceLoss", margin=20, scale=16)
    miner: NamedPart | None = None
    sampler: NamedPart | None = None
    optimizer: NamedPart = Part(name="AdamW", lr=2e-3, weight_decay=1e-3)
    loss_optimizer: NamedPart | None = None
    """For the loss's own proxies; None = as `optimizer`."""
    training: TrainingConfig = TrainingConfig()
    detector: NamedPart = Part(name="auto")
    """auto = chosen on validation among all detectors and their search spaces."""
    threshold: NamedPart = Part(name="conformal")

    @field_validator("loss", "miner", "sampler")
    @classmethod
    def _part_exists(cls, part: Part | None, info) -> Part | None:
        if part is not None:
            pml.check(info.field_name, part.name, part.args)
        return part

    @field_validator("optimizer", "loss_optimizer")
    @classmethod
    def _optimizer_exists(cls, part: Part | None) -> Part | None:
        if part is not None:
            optimizers.check(part.name, part.args)
        return part

    @field_validator("detector", "threshold")
    @classmethod
    def _can_be_made(cls, part: Part, info) -> Part:
        registry = {"detector": detectors, "threshold": thresholds}[info.field_name]
        if info.field_name == "detector" and part.name == "auto":
            check_arguments("detector", "auto", part.args, [])
        else:
            registry.create(part.name, **part.args)
        return part


Schema = TypeVar("Schema", bound=Section)


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file and of `section.key=value` overrides, both optional."""
    values = read_yaml(file) if file is not None else {}
    for override in overrides:
        apply_override(values, override)
    return make_config(values)


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


def make_config(values: Mapping[str, Any], schema: type[Schema] = Config) -> Schema:
    """A checked configuration of plain values; the first thing that is wrong with them is one line of OsmlError."""
    try:
        return schema.model_validate(dict(values))
    except ValidationError as error:
        raise _in_one_line(error, schema) from error


def apply_override(values: dict[str, Any], override: str) -> None:
    """Set `loss.margin=20` in nested values; the name of a part may stand where the part does."""
    key, equals, text = override.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise OsmlError(f"cannot read --set '{override}': expected section.key=value, such as loss.margin=20")
    if len(path) == 2 and path[1] == "name":
        path = path[:1]  # another part takes none of the old one's arguments with it
    for i, step in enumerate(path[:-1]):
        below = values.get(step)
        if below is None:
            default = Config.model_fields.get(step).default if i == 0 and step in Config.model_fields else None
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
