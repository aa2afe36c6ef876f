"""What a command imports: little before it knows that there is work to do, and no more than the work needs."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from osml_plugin import OpenSetRecognizer, train

# Each takes tenths of a second or more to import.
HEAVY = {"torch", "torchvision", "numpy", "scipy", "sklearn", "sknetwork", "faiss", "pandas", "pyarrow", "matplotlib"}
HEAVY |= {"pytorch_metric_learning", "safetensors", "pydantic", "yaml", "PIL", "ray", "mlflow", "fastapi", "sqlalchemy"}
RUN = """
import json, sys
from osml_plugin.cli import main
status = 0
try:
    main()
except SystemExit as end:
    status = end.code or 0
sys.stdout.flush()
print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)
"""


def imported(*command: object, cwd: Path | None = None) -> tuple[int, set[str]]:
    """Exit status of `osml`, and the modules that it imported, in a process of its own."""
    done = subprocess.run([sys.executable, "-c", RUN, *map(str, command)], capture_output=True, text=True, cwd=cwd)
    status, modules = json.loads(done.stderr.splitlines()[-1])
    return status, set(modules)


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("--help", 0),
        ("--version", 0),
        ("train --help", 0),
        ("discover --help", 0),
        ("jacobian --help", 0),
        ("tune --help", 0),
        ("serve --help", 0),
        ("keys add --help", 0),
        ("no-such-command", 2),
        ("predict --no-such-flag bundle", 2),
        ("tune --trials many --out sweep", 2),
        ("train --data absent --out made", 2),
        ("train --data . --out made -c absent.yaml", 2),
        ("train --data . --out made --split absent.json", 2),
        ("predict absent a.png", 2),
        ("predict bundle here.png absent.png", 2),
        ("evaluate bundle --data absent", 2),
        ("recognize bundle absent --out a.csv", 2),
        ("embed bundle absent --out a.npz", 2),
        ("enroll bundle --name a absent", 2),
        ("forget absent --name a", 2),
        ("discover bundle absent", 2),
        ("discover bundle . --must-link absent.csv", 2),
        ("discover bundle . --previous absent", 2),
        ("jacobian bundle --data absent", 2),
        ("tune --data absent --out sweep", 2),
        ("tune --out sweep -c absent.yaml", 2),
        ("promote birds --data absent", 2),
        ("serve absent", 2),
        ("serve -c absent.yaml", 2),
    ],
)
def test_nothing_heavy_is_imported_before_there_is_work(command, status, tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "bundle.json").write_text("{}")
    (tmp_path / "here.png").write_bytes(b"")
    found, modules = imported(*command.split(), cwd=tmp_path)
    assert found == status
    assert not {m.partition(".")[0] for m in modules} & (HEAVY - {"pydantic"})  # Typer's own errors import pydantic
    assert len(modules) < 400
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "here.png"]


def test_recognizing_an_image_imports_torch_and_little_else(tmp_path):
    draw = np.random.default_rng(0)
    for name, brightness in (("dark", 60), ("light", 190)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(20):
            pixels = draw.normal(brightness, 10, (8, 8)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    train(tmp_path / "data", tmp_path / "bundle", n_known=2, overrides=["training.epochs=1"])
    status, modules = imported("predict", tmp_path / "bundle", tmp_path / "data" / "dark" / "0.png")
    assert status == 0
    spared = HEAVY - {"torch", "numpy", "faiss", "safetensors", "pydantic", "yaml", "PIL"}
    assert not {m.partition(".")[0] for m in modules} & spared
    assert len(modules) < 1800  # torch alone is some 1150


def test_recognizing_embeddings_imports_no_more(tmp_path):
    draw = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    embeddings = draw.normal(size=(60, 4)) + 9 * labels[:, None]
    OpenSetRecognizer("knn").fit(embeddings, labels).save(tmp_path / "bundle")
    np.savez(tmp_path / "new.npz", embeddings=embeddings[:3])
    status, modules = imported("predict", tmp_path / "bundle", tmp_path / "new.npz")
    assert status == 0
    spared = HEAVY - {"torch", "numpy", "faiss", "safetensors", "pydantic", "yaml", "PIL"}
    assert not {m.partition(".")[0] for m in modules} & spared


@pytest.mark.parametrize("package", ["osml_plugin", "osml_plugin.tune", "osml_plugin.serve"])
def test_lazy_names_are_there_for_type_checkers_and_at_run_time(package):
    module = importlib.import_module(package)
    table = getattr(module, "_HOME", None) or {name: f".{home}" for name, home in module._WHERE.items()}
    (block,) = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    static = {alias.name: f".{node.module}" for node in block.body for alias in node.names}
    assert static == table
    assert set(table) <= set(module.__all__) and dir(module) == sorted(module.__all__)
    for name in module.__all__:
        assert getattr(module, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing
