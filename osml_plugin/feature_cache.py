"""The features of frozen trunks on disk: the same images and weights give the same, in this run and the next."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import astuple
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
import torchvision
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.numpy import load_file, save
from torch import nn

from .embedding import autocast, default_device
from .preprocessing import Preprocessing


def cache_folder() -> Path:
    """OSML_CACHE, or the user's cache folder; it may be emptied at any time."""
    return Path(os.environ.get("OSML_CACHE") or Path.home() / ".cache" / "osml") / "features"


def features_key(trunk: nn.Module, preprocessing: Preprocessing, fingerprints: np.ndarray) -> str:
    """What the features of images `(N,)`, by the fingerprints of their contents, depend on, and nothing else."""
    total = blake2b(digest_size=16)
    device = default_device()
    made_by = (torch.__version__, torchvision.__version__, device.type, autocast(device).fast_dtype)
    total.update(f"{trunk}{astuple(preprocessing)}{made_by}".encode())
    for name, value in trunk.state_dict().items():
        total.update(name.encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    total.update(np.ascontiguousarray(fingerprints).tobytes())
    return total.hexdigest()


def cached_features(key: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
    """The features `(N, F)` under `key`, computed where there are none; others who want the same meanwhile wait."""
    folder = cache_folder()
    file = folder / f"{key}.safetensors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{key}.lock"):
            try:
                return load_file(file)["features"]
            except (OSError, SafetensorError, KeyError):  # not there, or cut off
                features = compute()
                aside = file.with_suffix(".part")
                aside.write_bytes(save({"features": np.ascontiguousarray(features)}))
                os.replace(aside, file)
                return features
    except OSError:  # a disk that is full or closed is no reason not to go on
        return compute()
