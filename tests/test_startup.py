"""What a command imports: little before it knows that there is work to do, and no more than the work needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

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
