"""Any part of pytorch-metric-learning by name, with its own keyword arguments, and the losses that it lacks."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from pytorch_metric_learning import distances, losses, miners, reducers, regularizers, samplers
from torch import Tensor, nn
from torch.nn.functional import normalize

from . import losses as own_losses
from .errors import OsmlError, unknown_name
from .registry import check_arguments, refusing

_CLASSES = {
    kind: {name: cls for module in modules for name, cls in vars(module).items() if inspect.isclass(cls)}
    for kind, modules in {
        "loss": (losses, own_losses),
        "miner": (miners,),
        "sampler": (samplers,),
        "distance": (distances,),
        "reducer": (reducers,),
        "regularizer": (regularizers,),
    }.items()
}
# An argument that is itself a part, and of which kind.
_NESTED = {
    "loss": "loss",
    "losses": "loss",
    "miner": "miner",
    "miners": "miner",
    "distance": "distance",
    "reducer": "reducer",
    "embedding_regularizer": "regularizer",
    "weight_regularizer": "regularizer",
}
# What the trainer knows, and under which names the parts ask for it.
_SUPPLIED = {"num_classes", "embedding_size", "labels", "batch_size", "epoch_length"}
_SUPPLIED_AS = {"descriptors_dim": "embedding_size", "l": "embedding_size", "length_before_new_iter": "epoch_length"}
# Set by a part's own base class, not by its user.
_INTERNAL = {"mat_based_loss", "collect_stats", "weight_init_func"}
# They have numbers for each class, and no logits that are linear in the embedding.
_WITHOUT_PROXIES = {"MarginLoss", "ReciprocalPointLoss", "ARPLLoss"}
_NOT_FOR_LABELS = {
    "BaseLossWrapper": "it is a base class",
    "ClassificationLoss": "it is a base class",
    "BaseMetricLossFunction": "it is a base class",
    "EmbeddingRegularizerMixin": "it is a mixin",
    "WeightRegularizerMixin": "it is a mixin",
    "GenericPairLoss": "it takes a function, not keywords",
    "SelfSupervisedLoss": "it needs two views of each item, not labels",
    "VICRegLoss": "it needs two views of each item, not labels",
    "ManifoldLoss": "it takes no labels",
    "BaseMiner": "it is a base class",
    "BaseDistance": "it is a base class",
    "BaseReducer": "it is a base class",
    "BaseRegularizer": "it is a base class",
    "BatchedDistance": "it wraps a distance for inference",
    "FixedSetOfTriplets": "it needs a list of triplets, not labels",
    "HierarchicalSampler": "it needs a hierarchy of labels",
    "TuplesToWeightsSampler": "it needs the model",
    "MultipleReducers": "it takes reducers by sub-loss",
    "EmbeddingsAlreadyPackagedAsTriplets": "it needs batches of triplets",
}


def names(kind: str) -> list[str]:
    """The parts of a kind ('loss', 'miner', 'sampler', 'distance', 'reducer', 'regularizer') that can be named."""
    return sorted(_CLASSES[kind].keys() - _NOT_FOR_LABELS.keys())


def arguments(kind: str, name: str) -> dict[str, inspect.Parameter]:
    """The keyword arguments that a part takes, those of its base classes included."""
    found: dict[str, inspect.Parameter] = {}
    for cls in _part_class(kind, name).__mro__:
        init = vars(cls).get("__init__")
        if init is None or cls is nn.Module:
            continue
        parameters = list(inspect.signature(init).parameters.values())[1:]
        for p in parameters:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name not in _INTERNAL:
                found.setdefault(p.name, p)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def settable(kind: str, name: str) -> dict[str, inspect.Parameter]:
    """The arguments of a part that are its user's to set: all but what the trainer fills in."""
    return {k: p for k, p in arguments(kind, name).items() if _SUPPLIED_AS.get(k, k) not in _SUPPLIED}


def check(kind: str, name: str, args: Mapping[str, Any]) -> None:
    """OsmlError for a part or an argument that does not exist, naming the nearest that does, and for an argument that
    the trainer fills in; nested parts too."""
    allowed = settable(kind, name)
    for key in args:
        if key in arguments(kind, name) and key not in allowed:
            raise OsmlError(f"argument '{key}' of {kind} '{name}' is filled in by the trainer: leave it out")
    check_arguments(kind, name, args, allowed)
    for key, value in args.items():
        if key in _NESTED:
            for part in value if isinstance(value, list) else [value]:
                check(_NESTED[key], *_split(_NESTED[key], part))


def build(kind: str, name: str, args: Mapping[str, Any], **supplied: Any) -> Any:
    """Make a part; `supplied` (num_classes, embedding_size, labels, …) fills in what it asks for beyond `args`."""
    check(kind, name, args)
    wanted = arguments(kind, name)
    given = {}
    for key in wanted:
        source = _SUPPLIED_AS.get(key, key)
        if key in args:
            given[key] = _build_nested(key, args[key], supplied) if key in _NESTED else args[key]
        elif source in supplied:
            given[key] = supplied[source]
        elif wanted[key].default is inspect.Parameter.empty:
            raise OsmlError(f"{kind} '{name}' needs the argument '{key}': set {kind}.{key}")
    with refusing(f"{kind} '{name}' refuses its arguments", f"change '{kind}' in the config"):
        return _part_class(kind, name)(**given)


def has_class_weights(name: str, args: Mapping[str, Any]) -> bool:
    """Whether `class_weights` finds proxies in the loss of this name and these arguments."""
    if name == "PseudoUnknowns":
        return has_class_weights(*_split("loss", args["loss"]))
    return "num_classes" in arguments("loss", name) and name not in _WITHOUT_PROXIES


def compares_items(loss: nn.Module) -> bool:
    """Whether all that a loss learns from is the comparison of items of one batch: no part of it has weights for each
    class, or remembers earlier batches."""
    parts = {type(part).__name__ for part in loss.modules()} & _CLASSES["loss"].keys()
    alone = {"CrossBatchMemory", *(n for n in names("loss") if "num_classes" in arguments("loss", n))}
    return not parts & (alone - {"MarginLoss"})  # whose weights are margins between items


def class_weights(loss: nn.Module) -> Tensor | None:
    """The proxies of a classification loss as `(C, P, D)`: `max_p embedding · weight` is a unit embedding's logit.

    None for losses without proxies, and for reciprocal points, whose logits are not linear in the embedding.
    """
    if isinstance(loss, own_losses.PseudoUnknowns):
        return class_weights(loss.loss)
    if type(loss).__name__ in _WITHOUT_PROXIES:
        return None
    with torch.no_grad():
        if isinstance(loss, losses.SubCenterArcFaceLoss):
            return loss.scale * normalize(loss.W.T).view(loss.num_classes, loss.sub_centers, -1)
        if isinstance(loss, losses.SoftTripleLoss):
            return loss.la * normalize(loss.fc.T).view(loss.num_classes, loss.centers_per_class, -1)
        if isinstance(loss, losses.ProxyAnchorLoss):
            return loss.alpha * normalize(loss.proxies)[:, None]
        if isinstance(loss, losses.ProxyNCALoss):
            # −s‖x − p‖² = 2s x·p − 2s on the unit sphere; a constant in every logit changes no softmax.
            return 2 * loss.softmax_scale * normalize(loss.proxies)[:, None]
        if isinstance(loss, losses.P2SGradLoss):
            return normalize(loss.weight.T)[:, None]
        if hasattr(loss, "W"):
            # The logits are linear in a unit embedding: those of the unit vectors are the weights.
            identity = torch.eye(len(loss.W), device=loss.W.device, dtype=loss.W.dtype)
            return loss.get_logits(identity).T[:, None]
    return None


def _part_class(kind: str, name: str) -> type:
    if name in _NOT_FOR_LABELS:
        choices = ", ".join(names(kind))
        raise OsmlError(f"{kind} '{name}' cannot be used here: {_NOT_FOR_LABELS[name]}; choices: {choices}")
    if name not in names(kind):
        raise unknown_name(kind, name, names(kind))
    return _CLASSES[kind][name]


def _split(kind: str, part: Any) -> tuple[str, dict[str, Any]]:
    if isinstance(part, str):
        return part, {}
    if not isinstance(part, Mapping) or not isinstance(part.get("name"), str):
        raise OsmlError(f"a {kind} is written as its name or as {{name: …, argument: value}}; got {part!r}")
    return part["name"], {k: v for k, v in part.items() if k != "name"}


def _build_nested(key: str, value: Any, supplied: Mapping[str, Any]) -> Any:
    kind = _NESTED[key]
    if isinstance(value, list):
        return [_build_nested(key, v, supplied) for v in value]
    return build(kind, *_split(kind, value), **supplied)
