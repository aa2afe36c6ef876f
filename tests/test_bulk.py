"""Millions of items offline: what is written is what `predict` says, here and on a real Ray; nothing is lost or half-written."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from io import BytesIO
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sweeps import ray_here

import osml_plugin
from osml_plugin import OpenSetRecognizer, OsmlError
from osml_plugin.bulk import RECOGNIZE, Work, embed_to_parquet, recognize_dataset
from osml_plugin.bulk_tables import CHUNK, INPUT, open_source
from osml_plugin.data import write_embeddings
from osml_plugin.tracking import log_bundle, tracking_uri

ANSWERS = ["label", "known", "nearest", "score", "threshold", "p_value"]


@pytest.fixture(scope="module")
def bundle(digits_folder, tmp_path_factory) -> Path:
    """Of images."""
    out = tmp_path_factory.mktemp("images") / "bundle"
    quick = ["training.epochs=2", "model.trunk.name=small_cnn"]
    osml_plugin.train(digits_folder, out, n_known=5, seed=0, overrides=quick, progress=False)
    return out


@pytest.fixture(scope="module")
def vectors(digit_vectors) -> OpenSetRecognizer:
    """Of embeddings."""
    embeddings, labels = digit_vectors
    few = np.flatnonzero(labels < 5)[:500]
    return OpenSetRecognizer("knn").fit(embeddings[few], labels[few])


@pytest.fixture(scope="module")
def images(digits_folder) -> list[Path]:
    return sorted(digits_folder.rglob("*.png"))


@pytest.fixture
def with_bad(digits_folder, tmp_path) -> Path:
    """A folder of images of which two cannot be read."""
    folder = tmp_path / "photos"
    for digit in ("1", "8"):
        shutil.copytree(digits_folder / digit, folder / digit)
    (folder / "1" / "text.png").write_text("no image")
    whole = next((folder / "8").iterdir()).read_bytes()
    (folder / "8" / "half.png").write_bytes(whole[: len(whole) // 2])
    (folder / ".hidden.png").write_text("not looked at")
    return folder


def written(out: Path) -> pd.DataFrame:
    """By path, or item."""
    rows = pd.read_csv(out, dtype={"label": str, "nearest": str}) if out.suffix == ".csv" else pd.read_parquet(out)
    return rows.sort_values("path" if "path" in rows else "item", ignore_index=True)


def check(rows: pd.DataFrame, recognizer: OpenSetRecognizer, items) -> None:
    """The rows are, in order, what the recognizer predicts of the items."""
    found = recognizer.predict(items, neighbours=0)
    assert len(rows) == len(found) and rows["error"].isna().all()
    assert [None if pd.isna(name) else name for name in rows["label"]] == list(found.names)
    assert rows["known"].tolist() == [name is not None for name in found.names]
    assert rows["nearest"].tolist() == list(found.nearest)
    np.testing.assert_allclose(rows["score"], found.scores, rtol=1e-4)
    np.testing.assert_allclose(rows["p_value"], found.p_values)
    assert rows["threshold"].unique() == [found.threshold]


# Here ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["answers.parquet", "answers.csv"])
def test_a_folder_is_recognised_as_predict_does(bundle, digits_folder, images, tmp_path, name):
    result = recognize_dataset(bundle, digits_folder, tmp_path / name, progress=False)
    rows = written(tmp_path / name)
    assert list(rows) == ["path", *ANSWERS, "error"] and rows["path"].tolist() == [str(path) for path in images]
    check(rows, OpenSetRecognizer.load(bundle), images)
    assert (result.n, result.n_unknown, result.n_bad) == (400, (~rows["known"]).sum(), 0)
    assert 0 < result.n_unknown < 400 and os.listdir(tmp_path) == [name]


def parquet_of(kind: str, images: list[Path], embeddings: np.ndarray, folder: Path) -> None:
    """Two files in uneven row groups, with an id and a label of the data's own."""
    content = [path.read_bytes() for path in images]
    columns = {
        "image": ("image", pa.array(content)),
        "as Hugging Face": (
            "image",
            pa.array([{"bytes": c, "path": p.name} for c, p in zip(content, images, strict=True)]),
        ),
        "path": ("path", pa.array([os.path.relpath(path, folder) for path in images])),
        "embedding": ("embedding", pa.array(list(embeddings))),
        "fixed width": ("embedding", pa.FixedSizeListArray.from_arrays(embeddings.ravel(), embeddings.shape[1])),
    }
    name, values = columns[kind]
    n = len(images)
    table = pa.table({"id": [f"id-{i}" for i in range(n)], "label": ["mine"] * n, name: values})
    folder.mkdir()
    pq.write_table(table.slice(0, 150), folder / "a.parquet", row_group_size=70)
    pq.write_table(table.slice(150), folder / "b.parquet")


@pytest.mark.parametrize("kind", ["image", "as Hugging Face", "path", "embedding", "fixed width"])
def test_parquet(bundle, images, tmp_path, kind):
    recognizer = OpenSetRecognizer.load(bundle)
    parquet_of(kind, images, recognizer.embed(images).numpy(), tmp_path / "data")
    recognize_dataset(recognizer, tmp_path / "data", tmp_path / "answers.parquet", progress=False)
    rows = pd.read_parquet(tmp_path / "answers.parquet")  # in the order of the data
    named = "path" if kind == "path" else "item"
    assert set(rows) == {named, "id", "given_label", *ANSWERS, "error"} and next(iter(rows)) == named
    assert rows["id"].tolist() == [f"id-{i}" for i in range(400)] and set(rows["given_label"]) == {"mine"}
    if named == "item":
        assert rows["item"].tolist() == list(range(400))
    check(rows, recognizer, images)


def test_embeddings_in_more_than_one_chunk(vectors, digit_vectors, tmp_path):
    write_embeddings(tmp_path / "digits.npz", digit_vectors[0], None)
    recognize_dataset(vectors, tmp_path / "digits.npz", tmp_path / "answers.parquet", progress=False)
    rows = pd.read_parquet(tmp_path / "answers.parquet")
    assert len(rows) > CHUNK and rows["item"].tolist() == list(range(1797))
    check(rows, vectors, digit_vectors[0])


def test_what_cannot_be_read_has_a_row(bundle, with_bad, tmp_path):
    out = tmp_path / "answers.csv"
    with pytest.raises(
        OsmlError, match=r"cannot read '.*text\.png': no JPEG, .* or AVIF image; remove it or pass --skip"
    ):
        recognize_dataset(bundle, with_bad, out, progress=False)
    assert os.listdir(tmp_path) == ["photos"]
    result = recognize_dataset(bundle, with_bad, out, skip_bad=True, progress=False)
    rows = written(out)
    bad = rows["error"].notna()
    assert (result.n, result.n_bad) == (82, 2) == (len(rows), bad.sum())
    assert [Path(p).name for p in rows["path"][bad]] == ["text.png", "half.png"] and rows[bad][ANSWERS].isna().all(
        axis=None
    )
    assert result.n_unknown == (rows["known"] == "False").sum() + (rows["known"] == False).sum()  # noqa: E712
    good = rows[~bad].astype({"known": bool})
    check(good, OpenSetRecognizer.load(bundle), [Path(path) for path in good["path"]])


def test_embeddings_that_are_none(vectors, digit_vectors, tmp_path):
    rows = [digit_vectors[0][0], None, np.ones(3, np.float32), np.full(64, np.nan, np.float32), digit_vectors[0][9]]
    rows.append(np.full(64, 1e18, np.float32))
    pq.write_table(pa.table({"embedding": rows}), tmp_path / "data.parquet")
    result = recognize_dataset(
        vectors, tmp_path / "data.parquet", tmp_path / "answers.parquet", skip_bad=True, progress=False
    )
    found = pd.read_parquet(tmp_path / "answers.parquet")
    reasons = ["the cell is empty", "the embedding is 3 wide; expected 64", "the embedding holds NaN or infinity"]
    assert found["error"][1:4].tolist() == reasons and result.n_bad == 4
    assert found["error"][5] == "the embedding holds a number beyond 1e+15"
    check(found.iloc[[0, 4]], vectors, digit_vectors[0][[0, 9]])


@settings(deadline=None, max_examples=25)
@given(chosen=st.lists(st.one_of(st.none(), st.just(b"no image"), st.integers(0, 30)), min_size=1, max_size=12))
def test_good_and_bad_in_any_order(bundle, images, chosen):
    recognizer = OpenSetRecognizer.load(bundle)
    inputs = [images[c].read_bytes() if isinstance(c, int) else c for c in chosen]
    table = pa.table({INPUT: pa.array(inputs, pa.binary()), "item": range(len(chosen))})
    form = recognizer.preprocessing
    work = Work(RECOGNIZE, (form.channels, form.size, form.size), skip_bad=True, rendering=form.rendering)
    rows = work.answer(recognizer, work.decode(table)).to_pandas()
    good = [isinstance(c, int) for c in chosen]
    assert rows["item"].tolist() == list(range(len(chosen)))
    assert rows["error"].isna().tolist() == rows["nearest"].notna().tolist() == good
    if any(good):
        check(rows[good].astype({"known": bool}), recognizer, [images[c] for c in chosen if isinstance(c, int)])


def test_a_threshold_that_rejects_nothing(digit_vectors, tmp_path):
    embeddings, labels = digit_vectors
    recognizer = OpenSetRecognizer("knn", alpha=0.001).fit(embeddings[:300], labels[:300])
    assert math.isinf(recognizer.threshold.tau)
    write_embeddings(tmp_path / "data.npz", embeddings[300:400], labels[300:400])
    recognize_dataset(recognizer, tmp_path / "data.npz", tmp_path / "answers.parquet", progress=False)
    rows = pd.read_parquet(tmp_path / "answers.parquet")
    assert rows["threshold"].isna().all() and rows["known"].all()
    assert rows["given_label"].tolist() == [str(label) for label in labels[300:400]]


def test_what_is_there_stays_until_the_new_is_whole(bundle, with_bad, digits_folder, tmp_path):
    out = tmp_path / "answers.parquet"
    recognize_dataset(bundle, digits_folder / "3", out, progress=False)
    before = out.read_bytes()
    with pytest.raises(OsmlError, match="is there already: choose another place, or pass --overwrite"):
        recognize_dataset(bundle, digits_folder / "4", out, progress=False)
    with pytest.raises(OsmlError, match="cannot read"):
        recognize_dataset(bundle, with_bad, out, overwrite=True, progress=False)
    assert out.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["answers.parquet", "photos"]
    recognize_dataset(bundle, digits_folder / "4", out, overwrite=True, progress=False)
    assert len(written(out)) == 40 and out.read_bytes() != before


def png(pixels: np.ndarray) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"photo": [b"x"]}, "has no column 'embedding', 'image' or 'path'; it has photo"),
        ({"image": ["text"]}, "column 'image' of .* holds string; expected the bytes of image files"),
        ({"embedding": [[1, 2]]}, "holds list<.*int64>; expected lists of floats"),
        ({"path": pa.array([], pa.string())}, "has no rows; expected one an item"),
        ({"path": ["a"], "label": ["b"], "given_label": ["c"]}, "the data have two columns for 'given_label'"),
        ({"path": ["gone.png"]}, r"cannot read 'gone\.png': No such file or directory; remove it or pass --skip-bad"),
    ],
)
def test_parquet_that_does_not_fit(bundle, tmp_path, columns, says):
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    with pytest.raises(OsmlError, match=says):
        recognize_dataset(bundle, tmp_path / "data.parquet", tmp_path / "answers.parquet", progress=False)
    assert os.listdir(tmp_path) == ["data.parquet"]


def test_what_is_refused(bundle, vectors, digits_folder, tmp_path):
    def refused(model, data, out, says, **more):
        with pytest.raises(OsmlError, match=says) as error:
            recognize_dataset(model, data, out, progress=False, **more)
        assert "\n" not in str(error.value)

    refused(vectors, digits_folder, tmp_path / "a.csv", "takes embeddings, not images")
    refused(bundle, digits_folder, tmp_path / "a.json", "expected a name ending in .parquet or .csv")
    refused(bundle, digits_folder, tmp_path / "a.csv", "becomes a folder of Parquet files", ray=True)
    refused(bundle, digits_folder, tmp_path / "a.csv", "run without Ray: add --ray", address="auto")
    refused(bundle, digits_folder, tmp_path / "none" / "a.csv", "no folder '.*none'; make it first")
    refused(bundle, tmp_path, tmp_path / "a.csv", "holds neither images nor Parquet files")
    refused(bundle, tmp_path / "none", tmp_path / "a.csv", "no file or folder")
    refused(bundle, digits_folder, digits_folder, "is the data: choose another place", ray=True)
    refused(bundle, digits_folder, tmp_path, "is the data|already", ray=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    refused(bundle, digits_folder, tmp_path / "notes", "is not what this command writes", ray=True, overwrite=True)
    refused(bundle, digits_folder, tmp_path / "a", r"'127.0.0.1:9' does not answer", ray=True, address="127.0.0.1:9")
    (tmp_path / "x.parquet").write_bytes(b"no Parquet")
    refused(bundle, tmp_path / "x.parquet", tmp_path / "a.csv", "cannot read .*x.parquet")
    (tmp_path / "x.png").write_bytes(png(np.zeros((8, 8), np.uint8)))
    refused(bundle, tmp_path, tmp_path / "a.csv", "holds images and Parquet files")
    assert sorted(os.listdir(tmp_path)) == ["notes", "x.parquet", "x.png"]


def test_without_ray(bundle, digits_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OsmlError, match=r"needs Ray, which is not installed: pip install 'osml-plugin\[serve\]'"):
        recognize_dataset(bundle, digits_folder, tmp_path / "answers", ray=True, progress=False)
    assert not os.listdir(tmp_path)


def test_a_row_group_is_read_bit_by_bit(tmp_path):
    """One of 200 MB; what is held of it at a time are few tables of some tens."""
    noise = np.random.default_rng(0).bytes(50_000)
    table = pa.table({"image": [noise[i:] + noise[:i] for i in range(4000)]})
    pq.write_table(table, tmp_path / "data.parquet", compression=None, use_dictionary=False)
    del table
    (part,) = open_source(tmp_path / "data.parquet", []).parts
    assert part.n == 4000
    before, most, first = pa.total_allocated_bytes(), 0, 0
    for table in part.tables():
        most = max(most, pa.total_allocated_bytes() - before)
        assert table["item"].to_pylist() == list(range(first, first + len(table)))
        first += len(table)
    assert first == 4000 and most < 130e6


def test_files_that_differ_in_columns(vectors, digit_vectors, tmp_path):
    embeddings = list(digit_vectors[0][:6])
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"embedding": embeddings[:2], "id": [None, None]}), tmp_path / "data" / "a.parquet")
    pq.write_table(pa.table({"id": [7, 8], "embedding": embeddings[2:4]}), tmp_path / "data" / "b.parquet")
    pq.write_table(pa.table({"embedding": embeddings[4:]}), tmp_path / "data" / "c.parquet")
    recognize_dataset(vectors, tmp_path / "data", tmp_path / "answers.parquet", progress=False)
    rows = pq.read_table(tmp_path / "answers.parquet")
    assert rows["id"].to_pylist() == [None, None, 7, 8, None, None] and rows["item"].to_pylist() == list(range(6))
    check(rows.to_pandas(), vectors, np.stack(embeddings))
    pq.write_table(pa.table({"embedding": embeddings[4:], "id": ["x", "y"]}), tmp_path / "data" / "c.parquet")
    with pytest.raises(OsmlError, match="cannot read .* and 2 more .*: expected Parquet files with the same columns"):
        recognize_dataset(vectors, tmp_path / "data", tmp_path / "b.parquet", progress=False)
    broken = bytearray((tmp_path / "data" / "a.parquet").read_bytes())
    broken[4:104] = bytes(100)  # its end, which says what it holds, is whole
    (tmp_path / "broken.parquet").write_bytes(broken)
    with pytest.raises(OsmlError, match=r"row group 0 of '.*broken\.parquet' cannot be read"):
        recognize_dataset(vectors, tmp_path / "broken.parquet", tmp_path / "b.parquet", skip_bad=True, progress=False)
    assert not (tmp_path / "b.parquet").exists()


# On Ray -------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_command_has_a_ray_of_its_own_and_says_nothing_else(vectors, digit_vectors, tmp_path):
    """Embeddings alone, by two workers."""
    vectors.save(tmp_path / "bundle")
    write_embeddings(tmp_path / "digits.npz", digit_vectors[0], None)
    command = [sys.executable, "-m", "osml_plugin.cli", "recognize", "bundle", "digits.npz", "--ray", "--out", "out"]
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = written(tmp_path / "out")
    assert rows["item"].tolist() == list(range(1797))
    check(rows, vectors, digit_vectors[0])
    told = {"n_items": 1797, "n_unknown": int((~rows["known"]).sum()), "n_bad": 0, "out": "out"}
    assert json.loads(done.stdout) == told and done.stdout.count("\n") == 1
    lines = done.stderr.replace("\r", "\n").splitlines()
    assert all(line.startswith("recognising") for line in lines if line.strip()), done.stderr


@pytest.fixture(scope="module")
def ray_session():
    with ray_here():
        yield


@pytest.fixture
def on_ray(ray_session, tmp_path):
    """`on_ray(model, data)` gives the result and the rows."""

    def run(model, data, **more):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            result = recognize_dataset(model, data, tmp_path / "answers", ray=True, progress=False, **more)
        assert {f.suffix for f in result.out.iterdir()} == {".parquet"}
        assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
        return result, written(result.out)

    return run


def test_on_ray_a_folder(on_ray, bundle, with_bad, tmp_path):
    result, rows = on_ray(bundle, with_bad, skip_bad=True)
    here = recognize_dataset(bundle, with_bad, tmp_path / "here.parquet", skip_bad=True, progress=False)
    assert (result.n, result.n_unknown, result.n_bad) == (here.n, here.n_unknown, here.n_bad) == (82, here.n_unknown, 2)
    pd.testing.assert_frame_equal(rows, written(here.out), rtol=1e-4)
    # Without leave to skip it fails, and what was there stays.
    before = sorted(file.name for file in result.out.iterdir())
    with pytest.raises(OsmlError, match=r"^cannot read '[^']*(text|half)\.png': [^\n]*; remove it or pass --skip-bad$"):
        on_ray(bundle, with_bad, overwrite=True)
    assert sorted(file.name for file in result.out.iterdir()) == before and len(written(result.out)) == 82
    assert sorted(os.listdir(tmp_path)) == ["answers", "here.parquet", "photos"]


def test_on_ray_parquet_and_a_registered_model(on_ray, bundle, images, tmp_path, store, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the store's artifacts
    tracking_uri()
    with mlflow.start_run() as run:
        log_bundle(bundle, run_id=run.info.run_id, register="digits")
    table = pa.table({"id": range(400, 800), "image": [path.read_bytes() for path in images]})
    pq.write_table(table, tmp_path / "data.parquet")
    result, rows = on_ray("models:/digits@challenger", tmp_path / "data.parquet")
    assert rows["id"].tolist() == list(range(400, 800)) and rows["item"].tolist() == list(range(400))
    assert result.n == 400
    check(rows, OpenSetRecognizer.load(bundle), images)


def test_on_ray_embed_and_what_it_writes_is_recognised(ray_session, bundle, images, tmp_path):
    parquet_of("image", images, np.zeros((400, 1), np.float32), tmp_path / "data")
    result = embed_to_parquet(bundle, tmp_path / "data", tmp_path / "embedded", progress=False)
    recognizer, rows = OpenSetRecognizer.load(bundle), written(result.out)
    assert set(rows) == {"item", "id", "label", "embedding", "error"} and (result.n, result.n_bad) == (400, 0)
    assert rows["id"].tolist() == [f"id-{i}" for i in range(400)]
    np.testing.assert_allclose(np.stack(rows["embedding"]), recognizer.embed(images), rtol=1e-4, atol=1e-6)
    recognize_dataset(bundle, result.out, tmp_path / "answers.parquet", progress=False)
    answers = pd.read_parquet(tmp_path / "answers.parquet").sort_values("given_item", ignore_index=True)
    check(answers, recognizer, images)
