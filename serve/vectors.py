"""Items that came as vectors are kept as bytes, beside those that came as images."""

from __future__ import annotations

import numpy as np

VECTOR = "application/vnd.osml.vector"
"""Their media type: float32, little endian."""


def packed(vector: np.ndarray) -> bytes:
    return vector.astype("<f4").tobytes()


def unpacked(content: bytes) -> np.ndarray:
    """`(D,)` float32."""
    return np.frombuffer(content, "<f4").astype(np.float32)
