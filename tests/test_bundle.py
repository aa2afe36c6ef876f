"""A bundle comes back as it was, and is never found half-written or changed."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import sphere_classes

from osml_plugin import OpenSetRecognizer, OsmlError, bundle, detectors, enroll
from osml_plugin.data import write_embeddings


@pytest.fixture
def recognizer():
    embeddings, labels, directions = sphere_classes(n_classes=4, per_class=60)
    return OpenSetRecognizer("max_logit").fit(embeddings, labels, class_weights=16 * directions)


@pytest.fixture
def queries():
    return sphere_classes(n_classes=7, per_class=10, seed=3)[0]


def same(a, b, queries):
    mine, theirs = a.predict(queries), b.predict(queries)
    assert mine.names == theirs.names and mine.threshold == theirs.threshold
    for field in ("labels", "scores", "p_values"):
        assert np.array_equal(getattr(mine, field), getattr(theirs, field))


@pytest.mark.parametrize("detector", detectors.names())
def test_it_comes_back_as_it_was(detector, queries, tmp_path):
    embeddings, labels, directions = sphere_classes(n_classes=4, per_class=60)
    recognizer = OpenSetRecognizer(detector, alpha=0.1).fit(embeddings, labels, class_weights=16 * directions)
    recognizer.enroll("new", queries[:7])
    recognizer.save(tmp_path / "bundle")
    loaded = OpenSetRecognizer.load(tmp_path / "bundle")
    same(recognizer, loaded, queries)
    assert loaded.class_names == recognizer.class_names and loaded.gallery.version == 1 and loaded.alpha == 0.1
    same(recognizer.enroll("more", queries[7:20]), loaded.enroll("more", queries[7:20]), queries)
    same(recognizer.forget("new"), loaded.forget("new"), queries)


def test_it_holds_json_and_safetensors_only(recognizer, tmp_path):
    recognizer.save(tmp_path / "bundle")
    recognizer.enroll("new", recognizer.gallery.embeddings[:3]).save(tmp_path / "bundle")
    files = sorted(os.listdir(tmp_path / "bundle"))
    assert files[0] == "bundle.json" and len(files) == 2 and files[1].endswith(".safetensors")
    assert os.listdir(tmp_path) == ["bundle"]


def test_a_flipped_byte_anywhere_is_noticed(recognizer, tmp_path):
    recognizer.save(tmp_path / "bundle")
    draw = np.random.default_rng(0)
    for file in (tmp_path / "bundle").iterdir():
        content = file.read_bytes()
        for at in draw.integers(0, len(content), 40):
            file.write_bytes(content[:at] + bytes([content[at] ^ (1 << draw.integers(8))]) + content[at + 1 :])
            with pytest.raises(OsmlError) as error:
                OpenSetRecognizer.load(tmp_path / "bundle")
            assert "\n" not in str(error.value)
        file.write_bytes(content)
    OpenSetRecognizer.load(tmp_path / "bundle")


def test_another_version_says_so(recognizer, tmp_path):
    recognizer.save(tmp_path / "bundle")
    file = tmp_path / "bundle" / "bundle.json"
    manifest = json.loads(file.read_text()) | {"version": 2}
    manifest["sha256"] = bundle._manifest_sha256(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(OsmlError, match="has version 2, and this osml-plugin reads version 1"):
        OpenSetRecognizer.load(tmp_path / "bundle")


def test_a_file_outside_of_it_is_not_read(recognizer, tmp_path):
    recognizer.save(tmp_path / "bundle")
    file = tmp_path / "bundle" / "bundle.json"
    manifest = json.loads(file.read_text())
    manifest["files"]["gallery"]["name"] = "../elsewhere.safetensors"
    manifest["sha256"] = bundle._manifest_sha256(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(OsmlError, match="lies outside"):
        OpenSetRecognizer.load(tmp_path / "bundle")


def test_no_bundle_says_what_was_expected(tmp_path):
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(OsmlError, match="no bundle at .*: expected a folder"):
            OpenSetRecognizer.load(place)


def test_what_is_no_bundle_is_not_overwritten(recognizer, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(OsmlError, match="exists and is no bundle"):
        recognizer.save(tmp_path / "precious")
    assert os.listdir(tmp_path / "precious") == ["thesis.txt"]


@pytest.mark.parametrize("step", range(4))
def test_an_interrupted_save_leaves_the_old_bundle_or_the_new(recognizer, queries, tmp_path, monkeypatch, step):
    """Whichever write fails, what is on the disk afterwards loads and is one of the two."""
    recognizer.save(tmp_path / "bundle")
    before = OpenSetRecognizer.load(tmp_path / "bundle")
    calls = iter(range(100))
    real = os.replace

    def replace(source, target):
        if next(calls) == step // 2:
            if step % 2:
                real(source, target)
            raise OSError("the disk is full")
        real(source, target)

    monkeypatch.setattr(bundle.os, "replace", replace)
    changed = OpenSetRecognizer.load(tmp_path / "bundle").enroll("new", queries[:5])
    with pytest.raises(OSError, match="disk is full"):
        changed.save(tmp_path / "bundle")
    monkeypatch.undo()
    found = OpenSetRecognizer.load(tmp_path / "bundle")
    same(found, changed if "new" in found.class_names else before, queries)


def test_an_interrupted_first_save_leaves_nothing(recognizer, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(bundle.os, "rename", fail)
    with pytest.raises(OSError, match="disk is full"):
        recognizer.save(tmp_path / "bundle")
    assert os.listdir(tmp_path) == []


def test_changes_at_the_same_time_are_all_kept(recognizer, queries, tmp_path):
    recognizer.save(tmp_path / "bundle")
    for i in range(8):
        write_embeddings(tmp_path / f"{i}.npz", queries[8 * i : 8 * i + 8].numpy(), None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: enroll(tmp_path / "bundle", f"new {i}", [tmp_path / f"{i}.npz"]), range(8)))
    names = OpenSetRecognizer.load(tmp_path / "bundle").class_names
    assert sorted(names) == ["0", "1", "2", "3", *(f"new {i}" for i in range(8))]


def test_a_model_of_ones_own_is_refused_with_the_way_out(recognizer, tmp_path):
    import torch

    recognizer.model = torch.nn.Linear(3, 16)
    with pytest.raises(OsmlError, match="package.module:factory"):
        recognizer.save(tmp_path / "bundle")
    assert os.listdir(tmp_path) == []
