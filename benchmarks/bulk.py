"""Images a second offline: `osml recognize --ray` against the same in this process, on the same images in one run.

python benchmarks/bulk.py [--data DIR] [--items 6000] [--size 64] [--known 6]

Without --data it is Fashion-MNIST from Debian's package `dataset-fashion-mnist`, or else the digits of scikit-learn
over and over, as PNG files and as one Parquet file of the same. A resnet18 of random weights embeds them at --size
pixels: only that both answer the same matters here. Two ratios for each source, above 1 where Ray is ahead:

whole   seconds here over seconds on Ray, with the start of Ray and of its workers in it.
rate    images a second on Ray over here, where a job of a few images was taken off as the cost of starting.
"""

from __future__ import annotations

import argparse
import gzip
import logging
import os
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits

import osml_plugin
from osml_plugin import OpenSetRecognizer
from osml_plugin.bulk import recognize_dataset

FASHION = Path("/usr/share/datasets/fashion-mnist")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path)
    parser.add_argument("--items", type=int, default=6000)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--known", type=int, default=6)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as room:
        room = Path(room)
        folder = options.data or write_images(room / "images", options.items)
        few = few_of(folder, room / "few")
        overrides = ["training.epochs=0", "model.trunk.name=resnet18", f"data.image_size={options.size}"]
        osml_plugin.train(few, room / "bundle", n_known=options.known, seed=0, overrides=overrides, progress=False)
        recognizer = OpenSetRecognizer.load(room / "bundle")
        sources = {
            "folder": (few, folder),
            "Parquet": (write_parquet(few, room / "few.parquet"), write_parquet(folder, room / "all.parquet")),
        }
        print(f"resnet18 at {options.size} pixels, {os.cpu_count()} processors")
        for name, (start, whole) in sources.items():
            compare(name, recognizer, start, whole, room)


def compare(name: str, recognizer: OpenSetRecognizer, few: Path, data: Path, room: Path) -> None:
    seconds, rates, answers = [], [], []
    for out, on_ray in ((room / "here.parquet", False), (room / "there", True)):
        start, n_few = timed(recognizer, few, out, on_ray)
        whole, n = timed(recognizer, data, out, on_ray)
        seconds.append(whole)
        rates.append((n - n_few) / (whole - start))
        where = "on Ray" if on_ray else "here"
        print(f"{name:8} {where:6} {n} images {whole:6.1f} s; {n_few} images {start:5.1f} s; {rates[-1]:5.0f} images/s")
        rows = pq.read_table(out).to_pandas()
        answers.append(rows.sort_values("path" if "path" in rows else "item", ignore_index=True))
    a, b = answers
    same = a["label"].equals(b["label"]) and np.allclose(a["score"], b["score"], rtol=1e-4)
    print(
        f"{name:8} whole {seconds[0] / seconds[1]:.2f}, rate {rates[1] / rates[0]:.2f}; "
        f"answers {'equal' if same else 'DIFFER'}"
    )


def timed(recognizer: OpenSetRecognizer, data: Path, out: Path, on_ray: bool) -> tuple[float, int]:
    began = perf_counter()
    result = recognize_dataset(recognizer, data, out, ray=on_ray, overwrite=True, progress=False)
    return perf_counter() - began, result.n


def write_images(folder: Path, n: int) -> Path:
    if (FASHION / "train-images-idx3-ubyte.gz").is_file():
        pixels = read_idx(FASHION / "train-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read_idx(FASHION / "train-labels-idx1-ubyte.gz", 8)
    else:
        digits = load_digits()
        pixels, labels = (digits.images * 255 / 16).astype(np.uint8), digits.target
    for i in range(n):
        place = folder / str(labels[i % len(labels)]) / f"{i:06}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels[i % len(pixels)]).save(place)
    return folder


def read_idx(file: Path, header: int) -> np.ndarray:
    with gzip.open(file) as stream:
        return np.frombuffer(stream.read(), np.uint8, offset=header)


def few_of(folder: Path, out: Path) -> Path:
    """60 images of each class, to make a recognizer of."""
    for of_class in sorted(folder.iterdir()):
        (out / of_class.name).mkdir(parents=True)
        for image in sorted(of_class.iterdir())[:60]:
            (out / of_class.name / image.name).symlink_to(image)
    return out


def write_parquet(folder: Path, file: Path) -> Path:
    images = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    pq.write_table(pa.table({"image": images}), file, row_group_size=1000)
    return file


if __name__ == "__main__":
    main()
