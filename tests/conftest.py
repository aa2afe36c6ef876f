"""Real data that ship with a dependency, and embeddings with known geometry."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from sklearn.datasets import load_digits
from torch.nn.functional import normalize

from osml_plugin.cli import main
from osml_plugin.data import write_embeddings

# How long an example takes says how busy the machine is, and nothing of the code.
settings.register_profile("osml", deadline=None)
settings.load_profile("osml")


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory) -> Path:
    """scikit-learn's digits as `DIR/<class>/*.png`, 40 images a class."""
    root = tmp_path_factory.mktemp("digits")
    digits = load_digits()
    for label in range(10):
        (root / str(label)).mkdir()
        for i in np.flatnonzero(digits.target == label)[:40]:
            pixels = (digits.images[i] * 255 / 16).astype(np.uint8)
            Image.fromarray(pixels).save(root / str(label) / f"{i:04d}.png")
    return root


@pytest.fixture(scope="session")
def digit_vectors() -> tuple[np.ndarray, np.ndarray]:
    """The digits as unit-norm vectors `(1797, 64)` and their labels: embeddings that need no network."""
    digits = load_digits()
    vectors = digits.data.astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True), digits.target


def sphere_classes(n_classes: int, per_class: int, width: int = 16, spread: float = 0.15, seed: int = 0):
    """Unit-norm embeddings around random class directions: `(embeddings, labels, directions)`."""
    draw = torch.Generator().manual_seed(seed)
    directions = normalize(torch.randn(n_classes, width, generator=draw))
    labels = torch.arange(n_classes).repeat_interleave(per_class)
    noise = spread * torch.randn(len(labels), width, generator=draw)
    return normalize(directions[labels] + noise), labels, directions


@pytest.fixture(scope="session")
def digit_embeddings(tmp_path_factory, digit_vectors) -> Path:
    """A thousand of them as an embeddings file."""
    vectors, labels = digit_vectors
    file = tmp_path_factory.mktemp("data") / "digits.npz"
    write_embeddings(file, vectors[:1000], [str(c) for c in labels[:1000]])
    return file


@pytest.fixture(autouse=True, scope="session")
def cache_of_the_tests(tmp_path_factory) -> None:
    os.environ["OSML_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def store(tmp_path, monkeypatch) -> str:
    """An MLflow store of the test's own."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture
def osml(monkeypatch, capsys):
    """`osml(*arguments)` gives exit status, standard output and standard error."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["osml", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            status = 0
        except SystemExit as exit:
            status = exit.code or 0
        return status, *capsys.readouterr()

    return run
