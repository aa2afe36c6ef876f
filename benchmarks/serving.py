"""The endpoint against `mlflow models serve` of the same registered model, and a bare FastAPI handler without batching.

Same model, same images (32 x 32), one after another on this machine, the clients on the same cores: requests a second,
p50, p99 and memory at 1, 8 and 32 clients; then what the model's share costs against a raw batched forward pass.

    python benchmarks/serving.py [--seconds 5] [--rounds 3]
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import chdir, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import aiohttp
import mlflow
import numpy as np
import psutil
import torch
from PIL import Image
from sklearn.datasets import load_digits

from osml_plugin import train
from osml_plugin.bundle import load_bundle
from osml_plugin.data import Split, read_image
from osml_plugin.serve.embedder import Embedder
from osml_plugin.tracking import log_bundle

CLIENTS = (1, 8, 32)
SPLIT = Split(("0", "1", "2", "3", "4"), ("5", "6"), ("7", "8", "9"))
AIMS = "at 32 clients: 5 x mlflow models serve, ahead of the bare handler; model's share within 1.5 x of the raw pass"

BARE = """
import io, sys, torch
from fastapi import FastAPI, UploadFile
from osml_plugin.bundle import load_bundle
from osml_plugin.data import read_image

recognizer = load_bundle(sys.argv[1])
form = recognizer.preprocessing
app = FastAPI()

@app.post("/predict")
async def predict(files: UploadFile):
    image = read_image(io.BytesIO(await files.read()), form.channels, form.size)
    with torch.inference_mode():
        embedding = recognizer.model(form.from_tensor(image[None]))
    found = recognizer.recognize(embedding, neighbours=3)
    return {"label": found.names[0], "score": float(found.scores[0]), "p_value": float(found.p_values[0]),
            "neighbours": [n._asdict() for n in found.neighbours[0]]}

if __name__ == "__main__":
    import uvicorn
    uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error")
"""


@dataclass(frozen=True)
class Request:
    url: str
    bodies: list[bytes]
    content_type: str


@dataclass(frozen=True)
class Load:
    """What one load gave: requests a second, milliseconds, failures."""

    rate: float
    p50: float
    p99: float
    failed: int


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--seconds", type=float, default=5)
    arguments.add_argument("--rounds", type=int, default=3)
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory(prefix="osml-bench") as folder:
        room = Path(folder)
        images = make_images(room / "data")
        train(room / "data", room / "bundle", split=SPLIT, progress=False, overrides=["training.epochs=5"])
        with chdir(room):  # where MLflow makes a folder for the experiment that it always has
            address = register(room)
        files = [file.read_bytes() for file in images[:200]]
        servers = {
            "osml serve": osml_serve(room, address, files),
            "bare FastAPI + torch": bare(room, files),
            "mlflow models serve": mlflow_serve(room, address, files),
        }
        rates = {}
        print(f"{'':22} clients  requests/s     p50 ms    p99 ms   failed   memory MB   ready s")
        for name, server in servers.items():
            began = time.monotonic()
            with server as (request, process):
                ready = time.monotonic() - began
                measure(request, 8, 2)  # warm
                for clients in CLIENTS:
                    loads = [measure(request, clients, options.seconds) for _ in range(options.rounds)]
                    rate, p50, p99 = (
                        statistics.median(getattr(load, what) for load in loads) for what in ("rate", "p50", "p99")
                    )
                    rates[name, clients] = rate
                    failed = sum(load.failed for load in loads)
                    print(
                        f"{name:22} {clients:7} {rate:11.0f} {p50:10.1f} {p99:9.1f} {failed:8} "
                        f"{memory(process):11.0f} {ready:9.1f}",
                        flush=True,
                    )
        print(f"\naims: {AIMS}")
        for clients in CLIENTS:
            ours = rates["osml serve", clients]
            others = [f"{ours / rates[n, clients]:.2f} x {n}" for n in servers if n != "osml serve"]
            print(f"{clients:3} clients: osml serve is {', '.join(others)}")
        print_share(room / "bundle", images)


def make_images(folder: Path) -> list[Path]:
    """The digits as PNG files of 32 x 32."""
    digits, files = load_digits(), []
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        file = folder / str(label) / f"{i:04d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((pixels * 255 / 16).astype(np.uint8))
        image.resize((32, 32), Image.Resampling.BICUBIC).save(file)
        if str(label) in SPLIT.known:  # known ones: remembering the unknown is work that the others do not do
            files.append(file)
    return files


def register(room: Path) -> str:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{room}/mlflow.db"
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    experiment = mlflow.create_experiment("bench", artifact_location=(room / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment) as run:
        pass
    _, version = log_bundle(room / "bundle", run_id=run.info.run_id, register="digits")
    return f"models:/digits/{version}"


# --- servers ---------------------------------------------------------------------------------------------


@contextmanager
def started(command: list, port: int, path: str, log: Path) -> Iterator[psutil.Process]:
    path_of_this = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # MLflow calls uvicorn
    with open(log, "w") as output:
        server = subprocess.Popen(
            [*map(str, command)],
            stdout=output,
            stderr=output,
            start_new_session=True,
            env=os.environ | {"PATH": path_of_this},
        )
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2).read()
                break
            except (urllib.error.URLError, OSError):
                if server.poll() is not None:
                    raise SystemExit(log.read_text()) from None
                time.sleep(0.2)
        yield psutil.Process(server.pid)
    finally:
        if server.poll() is None:
            os.killpg(server.pid, signal.SIGINT)
        try:
            server.wait(timeout=40)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def multipart(content: bytes) -> tuple[bytes, str]:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return head + content + b"\r\n--b--\r\n", "multipart/form-data; boundary=b"


@contextmanager
def osml_serve(room: Path, address: str, files: list[bytes]) -> Iterator[tuple[Request, psutil.Process]]:
    port = free_port()
    command = [sys.executable, "-m", "osml_plugin", "serve", address, "--home", room / "home", "--port", port]
    bodies, kind = [multipart(f)[0] for f in files], multipart(b"")[1]
    with started(command, port, "/readyz", room / "osml.log") as process:
        yield Request(f"http://127.0.0.1:{port}/v1/recognize", bodies, kind), process


@contextmanager
def bare(room: Path, files: list[bytes]) -> Iterator[tuple[Request, psutil.Process]]:
    port = free_port()
    (room / "bare.py").write_text(BARE)
    bodies, kind = [multipart(f)[0] for f in files], multipart(b"")[1]
    command = [sys.executable, room / "bare.py", room / "bundle", port]
    with started(command, port, "/openapi.json", room / "bare.log") as process:
        yield Request(f"http://127.0.0.1:{port}/predict", bodies, kind), process


@contextmanager
def mlflow_serve(room: Path, address: str, files: list[bytes]) -> Iterator[tuple[Request, psutil.Process]]:
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", address, "--env-manager", "local", "-p", port]
    rows = [{"columns": ["image"], "data": [[base64.b64encode(f).decode()]]} for f in files]
    bodies = [json.dumps({"dataframe_split": row}).encode() for row in rows]
    with started(command, port, "/ping", room / "mlflow.log") as process:
        yield Request(f"http://127.0.0.1:{port}/invocations", bodies, "application/json"), process


# --- load ------------------------------------------------------------------------------------------------


def measure(request: Request, clients: int, seconds: float) -> Load:
    """From a process of its own, as the clients would be."""
    with get_context("spawn").Pool(1) as pool:
        return pool.apply(_load, (request, clients, seconds))


def _load(request: Request, clients: int, seconds: float) -> Load:
    return asyncio.run(_loaded(request, clients, seconds))


async def _loaded(request: Request, clients: int, seconds: float) -> Load:
    took, failed = [], 0
    headers = {"Content-Type": request.content_type}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=clients)) as session:
        began = time.perf_counter()

        async def client(first: int) -> None:
            nonlocal failed
            i = first
            while time.perf_counter() - began < seconds:
                start = time.perf_counter()
                body = request.bodies[i % len(request.bodies)]
                async with session.post(request.url, data=body, headers=headers) as response:
                    await response.read()
                    failed += response.status != 200
                took.append(time.perf_counter() - start)
                i += 1

        await asyncio.gather(*(client(7 * c) for c in range(clients)))
        wall = time.perf_counter() - began
    p50, p99 = np.percentile(took, [50, 99]) * 1000
    return Load(len(took) / wall, float(p50), float(p99), failed)


def memory(process: psutil.Process) -> float:
    """Of the server and all that it started, shared pages counted once, in MB."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        with suppress(psutil.Error):
            total += one.memory_full_info().pss
    return total / 2**20


def print_share(bundle: Path, images: list[Path], size: int = 32) -> None:
    """The forward pass as the endpoint does it, against the network alone on the same batch."""
    recognizer = load_bundle(bundle)
    form = recognizer.preprocessing
    pixels = torch.stack([read_image(file, form.channels, form.size) for file in images[:size]])
    embed, inputs = Embedder(recognizer), form.from_tensor(pixels)

    def raw() -> None:
        with torch.inference_mode():
            recognizer.model(inputs)

    ratio = best(lambda: embed(pixels)) / best(raw)
    print(f"model's share: a batch of {size} takes {ratio:.2f} x the raw forward pass")


def best(call, repeats: int = 30) -> float:
    took = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return statistics.median(took)


if __name__ == "__main__":
    main()
