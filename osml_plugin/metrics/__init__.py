"""Metrics of open-set recognition and of the discovery of new classes."""

from __future__ import annotations

from .discovery import DiscoveryMetrics, discovery_metrics
from .open_set import OpenSetMetrics, open_set_metrics
from .operating_points import OperatingPoints, operating_points

__all__ = [
    "DiscoveryMetrics",
    "OpenSetMetrics",
    "OperatingPoints",
    "discovery_metrics",
    "open_set_metrics",
    "operating_points",
]
