"""Open-set metric learning on top of pytorch-metric-learning."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers; at run time `_HOME` is read
    from .commands import discover, embed, enroll, evaluate, forget, predict
    from .errors import OsmlError
    from .hooks import OpenSetHook
    from .inference import OpenSetInferenceModel
    from .metrics.accuracy_calculator import OpenSetAccuracyCalculator
    from .pipeline import train
    from .recognizer import OpenSetRecognizer, Recognition

__version__ = "0.1.0"

UNKNOWN = -1
"""The label of everything that is not a known class, everywhere in this package."""

# Resolved on first use, so that `import osml_plugin` and `osml --help` do not wait for torch.
_HOME = {
    "OpenSetAccuracyCalculator": ".metrics.accuracy_calculator",
    "OpenSetHook": ".hooks",
    "OpenSetInferenceModel": ".inference",
    "OpenSetRecognizer": ".recognizer",
    "OsmlError": ".errors",
    "Recognition": ".recognizer",
    "discover": ".commands",
    "embed": ".commands",
    "enroll": ".commands",
    "evaluate": ".commands",
    "forget": ".commands",
    "predict": ".commands",
    "train": ".pipeline",
}
__all__ = [
    "UNKNOWN",
    "OpenSetAccuracyCalculator",
    "OpenSetHook",
    "OpenSetInferenceModel",
    "OpenSetRecognizer",
    "OsmlError",
    "Recognition",
    "__version__",
    "discover",
    "embed",
    "enroll",
    "evaluate",
    "forget",
    "predict",
    "train",
]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
