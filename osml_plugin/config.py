"""One schema for YAML files, `--set` flags and Python; a key that does not exist is an error that names the nearest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from . import detectors, optimizers, thresholds, trunks
from .data.pixels import Color, parse_color
from .data.roles import Fractions
from .registry import check_arguments
from .schema import NamedPart, Part, Section, apply_override, checked, read_yaml


class DataConfig(Section):
    """Reading and preparing images."""

    image_size: Literal["auto"] | Annotated[int, Field(ge=4, le=2048)] = "auto"
    """Side in pixels; auto = the images' own up to 64, else 224."""
    channels: Literal["auto", 1, 3] = "auto"
    background: str | list[int] = "white"
    """The ground that transparent images are composed on: a name, "#rrggbb" or [red, green, blue] in 0..255."""
    bit_depth: Literal["auto"] | Annotated[int, Field(ge=8, le=16)] = "auto"
    """Bits that the values of 16-bit files fill, such as 12; auto = those that the known images fill."""
    augment: Literal["auto", "none"] | list[dict[str, Any]] = "auto"
    """auto, none, or a list of torchvision transforms by name: `[{name: RandomRotation, degrees: 10}]`."""
    fractions: Fractions = Fractions()
    """How each known class is cut into data roles where the data do not say."""
    near_copies: bool = True
    """Keep near-copies in one role and count them once: one picture saved twice, frames of a clip, a burst."""
    workers: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"

    @field_validator("background")
    @classmethod
    def _is_a_color(cls, color: str | list[int]) -> str | list[int]:
        parse_color(color)
        return color

    @property
    def ground(self) -> Color:
        """RGB of the background, in 0..255."""
        return parse_color(self.background)


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
    rotation: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Weight of a second task that teaches the trunk: by which quarter turn was an image turned? 0 = off."""
    checkpoints: Annotated[int, Field(ge=1)] | None = None
    """Keep the network after every so many epochs, in the folder BUNDLE.checkpoints, for `osml jacobian`."""


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
            from . import pml  # its imports take as long as torch's, and only a training needs them

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


def load_config(file: str | Path | None = None, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file and of `section.key=value` overrides, both optional."""
    values = read_yaml(file) if file is not None else {}
    for override in overrides:
        apply_override(values, override, Config)
    return make_config(values)


def make_config(values: Mapping[str, Any]) -> Config:
    """The configuration of plain values; the first thing that is wrong with them is one line of OsmlError."""
    return checked(values, Config)
