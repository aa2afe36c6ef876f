"""What goes over HTTP: requests and answers, typed, with examples. The OpenAPI page is made of these."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from osml_plugin.names import LONGEST, canonical, class_name

# As much of the rule as a JSON schema can say; two characters of a decomposed name may be one of its composed form.
_SCHEMA = {
    "pattern": r"^[^\x00-\x20\x7f-\xa0]([^\x00-\x1f\x7f-\x9f]*[^\x00-\x20\x7f-\xa0])?$",
    "maxLength": LONGEST,
}
ClassName = Annotated[
    str, Field(min_length=1, examples=["otter"], json_schema_extra=_SCHEMA), AfterValidator(class_name)
]
CurrentName = Annotated[
    str, Field(min_length=1, examples=["otter"], description="A class that is there."), AfterValidator(canonical)
]
"""Of a class that is there already: a model of an older release may have one that is 'unknown'."""
ItemId = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$", examples=["0192f0c1a5b37c8e9d0f1a2b3c4d5e6f"])]
JobId = ItemId
_BASE64 = (
    "The bytes of a JPEG, PNG or WEBP file in base64; URL-safe letters, line breaks and a data: URL are taken, too."
)
Base64 = Annotated[str, Field(max_length=64 * 2**20, description=_BASE64)]
# One wrong item is enough: a body of a quarter of a million nulls would be as many errors.
Images = Annotated[list[Base64], Field(fail_fast=True)]
Vector = Annotated[list[float], Field(min_length=1, max_length=65536, fail_fast=True)]


class _Strict(BaseModel):
    """What is asked: true is no number, and 1 is no truth."""

    model_config = ConfigDict(extra="forbid", strict=True)


class _Answer(BaseModel):
    """Every answer names what gave it."""

    model_config = ConfigDict(protected_namespaces=())

    model_version: str = Field(examples=["birds/7"])
    gallery_version: int = Field(ge=0, examples=[3], description="0 is the gallery of the bundle; each change adds 1.")


# --- recognition -----------------------------------------------------------------------------------------


class Inputs(_Strict):
    """Images or embeddings, one or more; the same can be sent as multipart/form-data with the field `files`."""

    images: Images | None = None
    embeddings: list[Vector] | None = None


class NeighborOut(BaseModel):
    name: str
    distance: float


class Result(BaseModel):
    """What one item is."""

    label: str | None = Field(description="The class; null where the item is unknown.", examples=["cat"])
    known: bool
    nearest: str = Field(description="The nearest known class, of unknown items too.")
    score: float = Field(description="Unknown score: higher = more unknown.")
    threshold: float | None = Field(description="Unknown iff score > threshold; null where nothing is ever rejected.")
    p_value: float | None = Field(description="How usual such a score is for a known item.")
    neighbours: list[NeighborOut]
    observation_id: str | None = Field(
        description="Under which an unknown item is remembered; null for known ones, and where it is not remembered."
    )


class Recognized(_Answer):
    results: list[Result]


class Embedded(_Answer):
    embeddings: list[list[float]]


# --- classes ---------------------------------------------------------------------------------------------


class ClassOut(BaseModel):
    name: str
    trained: int = Field(description="References from the training.")
    enrolled: int = Field(description="References enrolled since.")


class Classes(_Answer):
    classes: list[ClassOut]


class Examples(_Strict):
    """Examples of a class: images, embeddings, or unknown items by their observation ids."""

    images: Images | None = None
    embeddings: list[Vector] | None = None
    observation_ids: list[ItemId] | None = None


class ExampleOut(BaseModel):
    id: str
    has_image: bool
    created_at: datetime


class ExamplesOf(_Answer):
    name: str
    examples: list[ExampleOut]
    next: str | None = Field(description="Pass as `after` for the next page; null on the last.")


class NewName(_Strict):
    name: ClassName


class Into(_Strict):
    into: CurrentName


class Changed(_Answer):
    """What a write did. It is committed, and visible on every replica within a second."""

    name: str | None = Field(default=None, description="The class that was changed.")
    n_examples: int | None = Field(default=None, description="How many items this write concerned.")
    example_ids: list[str] | None = None
    warnings: list[str] = Field(
        default=[], description="What is to be known of the threshold now, as in the model's; most often nothing."
    )


# --- the unknown -----------------------------------------------------------------------------------------


class UnknownOut(BaseModel):
    id: str
    created_at: datetime
    score: float
    nearest: str
    p_value: float | None
    has_image: bool


class UnknownList(_Answer):
    total: int
    unknowns: list[UnknownOut]
    next: str | None = Field(description="Pass as `after` for the next page; null on the last.")


class DiscoveryIn(_Strict):
    n_classes: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="How many new classes there are, where it is known: exactly so many. The discovery fails where the "
        "groups that were merged before leave fewer.",
    )
    seed: int = Field(default=0, ge=0, le=2**31)


class GroupOut(BaseModel):
    group: int = Field(description="Its number in this discovery, by which it is accepted, merged or rejected.")
    id: int = Field(
        ge=0,
        description="The same in each discovery in which more than half of its items are together again and no other "
        "group brings more; never given to another group.",
    )
    size: int
    confidence: float = Field(ge=0, le=1)
    exemplars: list[str] = Field(description="Observation ids, the most typical first.")
    state: Literal["proposed", "accepted", "rejected", "merged"] = Field(
        description="Rejected from the start where most of its items were rejected in the discovery before."
    )
    name: str | None = Field(description="The class that it was accepted as.")


class DiscoveryOut(_Answer):
    id: str
    state: Literal["queued", "running", "done", "failed"]
    progress: float = Field(ge=0, le=1)
    error: str | None
    created_at: datetime
    n_items: int | None
    n_classes: int | None
    n_classes_interval: tuple[int, int] | None
    left_out: int | None
    too_few: int | None = Field(
        default=None, description="Items left out though they lie apart from known classes, since there are too few."
    )
    note: str = Field(default="", description="Why nothing is proposed, or empty.")
    changes: list[str] = Field(
        description="What became of the groups of the discovery before, by their ids.",
        examples=[["3 was split into 3 and 17", "5 was merged into 2", "18 is new"]],
    )
    groups: list[GroupOut]


class DiscoveryList(_Answer):
    discoveries: list[DiscoveryOut]


class MembersOf(_Answer):
    group: int
    members: list[str] = Field(description="Observation ids, the most typical first.")


class GroupInto(_Strict):
    into: int = Field(ge=0, le=2**31 - 1)


# --- the model -------------------------------------------------------------------------------------------


class ModelOut(_Answer):
    source: str = Field(description="Where it came from.", examples=["models:/birds/7"])
    pending: str | None = Field(description="A version that is being prepared.")
    pending_progress: float | None
    alpha: float | None = Field(description="The share of known items that may be rejected.")
    threshold: float | None = Field(description="τ of classes that have none of their own; null where it is infinite.")
    thresholds: dict[str, float | None] = Field(
        default={}, description="τ of each class that has one of its own, by name; null where it is infinite."
    )
    detector: str
    guarantee: str | None
    rejection: Literal["on", "kept", "off"] = Field(
        default="on",
        description="kept: classes were forgotten until too few calibration items were left for the rate, and the last "
        "threshold that they could promise stays. off: too few from the start, nothing is rejected.",
    )
    warnings: list[str] = Field(default=[], description="A line for each thing that is to be known of the threshold.")
    input: Literal["images", "embeddings"]
    width: int = Field(description="Of the embeddings.")
    n_classes: int
    n_references: int


class ModelVersionOut(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_version: str
    source: str
    activated_at: datetime | None
    active: bool


class History(_Answer):
    models: list[ModelVersionOut]


class ReloadIn(_Strict):
    version: int | None = Field(
        default=None, ge=1, le=2**31 - 1, description="Of the registered model; null: the alias's."
    )


class AlphaIn(_Strict):
    # Below one in a million nobody has the calibration items, and far below it their number is no number.
    alpha: float = Field(ge=1e-6, lt=1, description="The share of known items that may be rejected.", examples=[0.05])


class ModelChange(_Answer):
    target: str = Field(description="The version that is, or will be, active.")
    state: Literal["active", "preparing"]


class Problem(BaseModel):
    """What was wrong, what was expected, what to do."""

    detail: str


Json = dict[str, Any]
