"""Thresholds by name: `create("conformal", alpha=0.05).fit(scores).decide(scores)`."""

from __future__ import annotations

from .base import Threshold, registry
from .class_conformal import ClassConformal
from .conformal import Conformal, Guarantee, guarantee, p_values
from .drift import Drift, DriftWatch, drift
from .eer import EER
from .fdr import select_unknown
from .fixed import Fixed
from .max_f1 import MaxF1
from .quantile import Quantile
from .target_rate import TargetRate
from .youden import Youden

create = registry.create
names = registry.names

__all__ = [
    "EER",
    "ClassConformal",
    "Conformal",
    "Drift",
    "DriftWatch",
    "Fixed",
    "Guarantee",
    "MaxF1",
    "Quantile",
    "TargetRate",
    "Threshold",
    "Youden",
    "create",
    "drift",
    "guarantee",
    "names",
    "p_values",
    "select_unknown",
]
