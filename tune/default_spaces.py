"""What is searched where the user names no space: a few arguments of each loss, with ranges that embeddings of unit
norm call for, the learning rate, the embedding size, and a miner where one helps."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from osml_plugin import pml
from osml_plugin.config import Config, Part
from osml_plugin.registry import checked_number

Domain = dict[str, list]


def _uniform(low: float, high: float) -> Domain:
    return {"uniform": [low, high]}


def _log(low: float, high: float) -> Domain:
    return {"loguniform": [low, high]}


def _int(low: int, high: int) -> Domain:
    return {"int": [low, high]}


def _logint(low: int, high: int) -> Domain:
    return {"logint": [low, high]}


_SCALE = _log(4, 64)
# Margins of pairs are distances between unit vectors: 0 the same, 1.41 unrelated, 2 opposite.
_PAIR_MARGINS = {"pos_margin": _uniform(0, 0.4), "neg_margin": _uniform(0.4, 1.4)}
_LOSSES: dict[str, dict[str, Domain]] = {
    # Proxies. Angles are in degrees; a scale times a cosine is a logit.
    "ArcFaceLoss": {"margin": _uniform(5, 45), "scale": _SCALE},
    "SubCenterArcFaceLoss": {"margin": _uniform(5, 45), "scale": _SCALE, "sub_centers": _int(2, 4)},
    "CosFaceLoss": {"margin": _uniform(0.05, 0.5), "scale": _SCALE},
    # The angle is multiplied by a whole number; at scale 1 the logits of unit embeddings could not tell classes apart.
    "LargeMarginSoftmaxLoss": {"margin": _int(1, 4), "scale": _log(1, 64)},
    "SphereFaceLoss": {"margin": _int(1, 4), "scale": _log(1, 64)},
    "NormalizedSoftmaxLoss": {"temperature": _log(0.02, 0.3)},
    "ProxyAnchorLoss": {"margin": _uniform(0, 0.4), "alpha": _log(8, 64)},
    "ProxyNCALoss": {"softmax_scale": _log(1, 32)},
    "SoftTripleLoss": {"la": _log(5, 40), "gamma": _log(0.03, 0.3), "margin": _uniform(0, 0.3)},
    "P2SGradLoss": {},
    "L2SoftmaxLoss": {"scale": _SCALE},
    # The margin is in radians.
    "MarginOneVsRestLoss": {"margin": _uniform(0, 0.8), "scale": _log(8, 64)},
    "CACLoss": {"magnitude": _log(2, 20), "anchor_weight": _log(0.01, 1)},
    "ReciprocalPointLoss": {"temperature": _log(0.3, 3), "radius_weight": _log(0.01, 1)},
    "ARPLLoss": {"temperature": _log(0.3, 3), "radius_weight": _log(0.01, 1), "margin": _uniform(0, 2)},
    # Pairs and triplets.
    "AngularLoss": {"alpha": _uniform(30, 55)},
    "CircleLoss": {"m": _uniform(0.1, 0.5), "gamma": _log(16, 256)},
    "ContrastiveLoss": _PAIR_MARGINS,
    # Here the distance is a squared one, over the variance of the anchor.
    "SignalToNoiseRatioContrastiveLoss": {"pos_margin": _uniform(0, 0.4), "neg_margin": _uniform(0.4, 2)},
    "LiftedStructureLoss": _PAIR_MARGINS,
    "GeneralizedLiftedStructureLoss": _PAIR_MARGINS,
    "IntraPairVarianceLoss": {"pos_eps": _log(0.001, 0.2), "neg_eps": _log(0.001, 0.2)},
    "MarginLoss": {"margin": _uniform(0.05, 0.5), "beta": _uniform(0.6, 1.4)},
    "MultiSimilarityLoss": {"alpha": _log(1, 10), "beta": _log(10, 80), "base": _uniform(0.3, 1)},
    "NPairsLoss": {},
    "RankedListLoss": {"margin": _uniform(0.2, 0.8), "Tn": _uniform(0, 4)},
    "ThresholdConsistentMarginLoss": {"margin_plus": _uniform(0.7, 0.95), "margin_minus": _uniform(0.3, 0.6)},
    "TripletMarginLoss": {"margin": _log(0.02, 0.5)},
    "TupletMarginLoss": {"margin": _uniform(1, 15), "scale": _SCALE},
    # A softmax over the batch.
    "InstanceLoss": {"gamma": _log(8, 128)},
    "NCALoss": {"softmax_scale": _log(1, 32)},
    "PrototypicalLoss": {"softmax_scale": _log(1, 32)},
    "NTXentLoss": {"temperature": _log(0.03, 0.5)},
    "SupConLoss": {"temperature": _log(0.03, 0.5)},
    # Rankings and histograms.
    "DynamicSoftMarginLoss": {"num_bins": _logint(5, 20), "momentum": _log(0.003, 0.1)},
    "FastAPLoss": {"num_bins": _logint(5, 20)},
    "HistogramLoss": {"n_bins": _logint(25, 200)},
    "PNPLoss": {"variant": {"choice": ["O", "Ds", "Dq", "Iu", "Ib"]}, "anneal": _log(0.005, 0.1)},
    "SmoothAPLoss": {"temperature": _log(0.003, 0.1)},
    # Losses of losses. A memory may not be smaller than a batch.
    "CrossBatchMemory": {"memory_size": _logint(1024, 8192)},
    "MultipleLosses": {},
    "PseudoUnknowns": {"share": _uniform(0.1, 1), "alpha": _log(1, 8)},
}
# Losses that most pairs of a batch teach nothing, so that choosing the pairs matters; and the one that was published
# with this miner. A softmax or a ranking weighs the hard negatives by itself, and needs the easy ones beside them.
_MINED = {
    "ContrastiveLoss",
    "MarginLoss",
    "MultiSimilarityLoss",
    "SignalToNoiseRatioContrastiveLoss",
    "TripletMarginLoss",
}


def loss_space(name: str) -> dict[str, Domain]:
    """The arguments of a loss that are searched by default, and in which domains; {} where there are none.

    A loss without an entry here is searched around the numbers that its arguments default to: a whole number from half
    to twice, any other from a quarter to four times, and below 1 where it was, as it may be a share.

    Raises:
        OsmlError: for a loss that does not exist.
    """
    settable = pml.settable("loss", name)
    if name in _LOSSES:
        return dict(_LOSSES[name])
    return {k: domain for k, p in settable.items() if (domain := _around(p.default))}


def default_space(base: Config) -> dict[str, Any]:
    """The space of a sweep that is told none, for the loss of `base`; what is not searched stays as `base` has it."""
    # With another distance than the loss's own, nobody knows what its margins should be.
    space: dict[str, Any] = {} if "distance" in base.loss.args else {"loss": loss_space(base.loss.name)}
    lr = _learning_rate(base.optimizer)
    space["optimizer"] = {"lr": _log(0.15 * lr, 5 * lr)}
    if base.model.embedder != "identity":
        space["model"] = {"embedding_size": {"choice": [32, 64, 128]}}
    if base.loss.name in _MINED and base.miner is None:
        space["miner"] = {"choice": [None, {"name": "MultiSimilarityMiner", "epsilon": _uniform(0.05, 0.3)}]}
    return space


def _learning_rate(optimizer: Part) -> float:
    parameters = inspect.signature(getattr(torch.optim, optimizer.name)).parameters
    return checked_number("optimizer.lr", optimizer.args.get("lr", parameters["lr"].default))


def _around(default: Any) -> Domain | None:
    if type(default) is int and default >= 2:
        return _logint(default // 2, 2 * default)
    if type(default) is float and default > 0:
        return _log(default / 4, 4 * default if default >= 1 else min(4 * default, (1 + default) / 2))
    return None
