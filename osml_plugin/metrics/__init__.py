"""Metrics of open-set recognition and of the discovery of new classes."""

from __future__ import annotations

from .discovery import DiscoveryMetrics, discovery_metrics
from .meter import OpenSetMeter
from .open_set import OpenSetMetrics, open_set_metrics
from .operating_points import OperatingPoints, operating_points
from .uncertainty import Comparison, Interval, bootstrap_intervals, bootstrap_test, delong_interval, delong_test

__all__ = [
    "Comparison",
    "DiscoveryMetrics",
    "Interval",
    "OpenSetMeter",
    "OpenSetMetrics",
    "OperatingPoints",
    "bootstrap_intervals",
    "bootstrap_test",
    "delong_interval",
    "delong_test",
    "discovery_metrics",
    "open_set_metrics",
    "operating_points",
]
