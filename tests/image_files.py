"""Image files that Pillow reads and cannot write: 16-bit PNG, TIFF and PPM of several channels."""

from __future__ import annotations

import struct
import zlib

import numpy as np

KINDS = {1: 0, 2: 4, 3: 2, 4: 6}
"""PNG's color type by the number of channels."""


def deep_png(samples: np.ndarray, transparent: tuple[int, ...] | None = None) -> bytes:
    """A 16-bit PNG of uint16 samples `(H, W, C)`; `transparent` is the color that is to be seen through."""
    height, width, n_channels = samples.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    content = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, KINDS[n_channels], 0, 0, 0))
    if transparent is not None:
        content += _chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    return b"\x89PNG\r\n\x1a\n" + content + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def deep_tiff(samples: np.ndarray, order: str, packed: bool) -> bytes:
    """A 16-bit TIFF of uint16 samples `(H, W, C)`, C in {3, 4}; order "<" or ">"; packed by zlib or not."""
    height, width, n_channels = samples.shape
    content = samples.astype(order + "u2").tobytes()
    content = zlib.compress(content) if packed else content
    tags = {256: width, 257: height, 259: 8 if packed else 1, 262: 2, 277: n_channels, 278: height, 338: 2}
    n_tags = len(tags) + 3 - (n_channels == 3)
    bits_at = 8 + 2 + 12 * n_tags + 4
    entries = {tag: struct.pack(order + "HHIHxx", tag, 3, 1, value) for tag, value in tags.items()}
    if n_channels == 3:
        del entries[338]  # what the fourth channel is
    entries[258] = struct.pack(order + "HHII", 258, 3, n_channels, bits_at)
    entries[273] = struct.pack(order + "HHII", 273, 4, 1, bits_at + 2 * n_channels)
    entries[279] = struct.pack(order + "HHII", 279, 4, 1, len(content))
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, n_tags)
    directory = b"".join(entries[tag] for tag in sorted(entries)) + struct.pack(order + "I", 0)
    return head + directory + struct.pack(f"{order}{n_channels}H", *[16] * n_channels) + content


def deep_ppm(samples: np.ndarray, highest: int = 0xFFFF) -> bytes:
    """A 16-bit PPM of uint16 samples `(H, W, 3)`."""
    return b"P6 %d %d %d\n" % (samples.shape[1], samples.shape[0], highest) + samples.astype(">u2").tobytes()
