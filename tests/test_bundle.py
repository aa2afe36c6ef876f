"""A bundle comes back as it was, and is never found half-written or changed."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import sphere_classes

from osml_plugin import OpenSetRecognizer, OsmlError, bundle, detectors, enroll
from osml_plugin.config import Config
from osml_plugin.data import write_embeddings
from osml_plugin.network import build_model


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
    for field in ("labels", "scores", "thresholds", "p_values"):
        assert np.array_equal(getattr(mine, field), getattr(theirs, field))


def test_a_bundle_without_thresholds_by_class_is_read(recognizer, queries, tmp_path):
    """As they were written before a class could have a τ of its own."""
    recognizer.save(tmp_path / "bundle")
    state = bundle.read_manifest(tmp_path / "bundle").threshold.model_dump(exclude_unset=True)
    assert state == {"name": "conformal", "params": {"alpha": 0.05}, "tau": recognizer.threshold.tau}
    same(recognizer, OpenSetRecognizer.load(tmp_path / "bundle"), queries)


@pytest.mark.parametrize("detector", detectors.names())
def test_it_comes_back_as_it_was(detector, queries, tmp_path):
    embeddings, labels, directions = sphere_classes(n_classes=4, per_class=60)
    recognizer = OpenSetRecognizer(detector, alpha=0.1).fit(embeddings, labels, class_weights=16 * directions)
    recognizer.enroll("new", queries[:7])
    recognizer.save(tmp_path / "bundle")
    loaded = OpenSetRecognizer.load(tmp_path / "bundle")
    same(recognizer, loaded, queries)
    assert loaded.gallery.next_id == recognizer.gallery.next_id
    assert loaded.class_names == recognizer.class_names and loaded.gallery.version == 1 and loaded.alpha == 0.1
    same(recognizer.enroll("more", queries[7:20]), loaded.enroll("more", queries[7:20]), queries)
    same(recognizer.forget("new"), loaded.forget("new"), queries)


def test_it_holds_json_and_safetensors_only(recognizer, tmp_path):
    recognizer.save(tmp_path / "bundle")
    recognizer.enroll("new", recognizer.gallery.embeddings[:3]).save(tmp_path / "bundle")
    files = sorted(os.listdir(tmp_path / "bundle"))
    assert files[0] == "bundle.json" and len(files) == 2 and files[1].endswith(".safetensors")
    assert os.listdir(tmp_path) == ["bundle"]


def test_files_of_others_in_it_stay(recognizer, tmp_path):
    recognizer.save(tmp_path / "bundle")
    (tmp_path / "bundle" / "mine.safetensors").write_text("x")
    (tmp_path / "bundle" / "notes.txt").write_text("x")
    recognizer.enroll("new", recognizer.gallery.embeddings[:3]).save(tmp_path / "bundle")
    files = sorted(os.listdir(tmp_path / "bundle"))
    assert len(files) == 4 and files[2:] == ["mine.safetensors", "notes.txt"]


def test_a_damaged_file_is_mended_by_saving_again(recognizer, queries, tmp_path):
    recognizer.save(tmp_path / "bundle")
    next((tmp_path / "bundle").glob("gallery-*")).write_bytes(b"")
    recognizer.save(tmp_path / "bundle")
    same(recognizer, OpenSetRecognizer.load(tmp_path / "bundle"), queries)


def test_a_bundle_that_is_exchanged_while_it_is_read(recognizer, queries, tmp_path, monkeypatch):
    recognizer.save(tmp_path / "bundle")
    real = bundle._load_tensors
    exchanges = iter(range(3))

    def load_tensors(path, file):
        if (i := next(exchanges, None)) is not None:
            recognizer.enroll("new", queries[:1] + i).save(path)
        return real(path, file)

    monkeypatch.setattr(bundle, "_load_tensors", load_tensors)
    same(OpenSetRecognizer.load(tmp_path / "bundle"), recognizer, queries)
    exchanges = iter(range(50, 150))
    with pytest.raises(OsmlError, match="is damaged: gallery-.* cannot be read"):
        OpenSetRecognizer.load(tmp_path / "bundle")
    assert next(exchanges) == 50 + bundle.READS


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
    manifest = json.loads(file.read_text()) | {"version": 2, "sha256": "made in another way"}
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
    with pytest.raises(OsmlError, match="is damaged: bundle.json is wrong at 'files.gallery.name'"):
        OpenSetRecognizer.load(tmp_path / "bundle")


DELETE = object()
OWN = ("format", "version", "sha256")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, DELETE) for key in bundle.Manifest.model_fields if key not in (*OWN, "copy_radius")),
        *((key, []) for key in bundle.Manifest.model_fields if key not in (*OWN, "proxy_ids")),
        ("copy_radius", -1),
        ("extra", 1),
        ("files.gallery", DELETE),
        ("files.gallery.name", 3),
        ("files.gallery.name", "notes.txt"),
        ("classes.x", "cat"),
        ("classes.0", DELETE),
        ("next_id", "x"),
        ("alpha", "x"),
        ("proxy_ids", [0]),
        ("held_out_names", {}),
        ("held_out_names.calibration", []),
        ("held_out_names.validation", ["a"]),
        ("detector.name", "x"),
        ("detector.params", {"x": 1}),
        ("threshold.tau", "x"),
        ("threshold.taus", {"0": "x"}),
        ("threshold.taus", {"x": 0.5}),
        ("threshold.pooled", ["x"]),
        ("threshold.params.alpha", -1),
        ("preprocessing", {"size": -1, "channels": 1, "mean": [0], "std": [1]}),
        ("preprocessing", {"size": 8, "channels": 3, "mean": [0], "std": [1]}),
        ("preprocessing", {"size": 8, "channels": 1, "mean": [0], "std": [1], "x": 1}),
        ("details.seen", [-1]),
        ("details.seen", "x"),
        ("details.split", []),
    ],
)
def test_a_manifest_that_is_wrong_but_fits_its_checksum(recognizer, tmp_path, key, value):
    recognizer.save(tmp_path / "bundle")
    change(tmp_path / "bundle", key, value)
    with pytest.raises(OsmlError) as error:
        OpenSetRecognizer.load(tmp_path / "bundle")
    assert "\n" not in str(error.value)


def change(path, key, value):
    file = path / "bundle.json"
    manifest = json.loads(file.read_text())
    *steps, last = key.split(".")
    inner = manifest
    for step in steps:
        inner = inner[step]
    inner[last] = value
    if value is DELETE:
        del inner[last]
    manifest["sha256"] = bundle._manifest_sha256(manifest)
    file.write_text(json.dumps(manifest))


@pytest.fixture
def with_model():
    """As `train` makes it from an embeddings file."""
    embeddings, labels, _ = sphere_classes(n_classes=4, per_class=60)
    config = Config(model={"embedder": "linear", "embedding_size": 8})
    recognizer = OpenSetRecognizer("knn", model=build_model(config, channels=0, size=embeddings.shape[1]))
    recognizer.details = {
        "config": config.model_dump(mode="json"),
        "input": {"channels": 0, "size": embeddings.shape[1]},
        "output": "embedder",
        "more": {"is": "kept"},
    }
    return recognizer.fit(recognizer.embed(embeddings), labels)


def test_a_model_comes_back(with_model, queries, tmp_path):
    with_model.save(tmp_path / "bundle")
    loaded = OpenSetRecognizer.load(tmp_path / "bundle")
    same(with_model, loaded, queries)
    assert loaded.details == with_model.details


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("details", {}),
        ("details.config", DELETE),
        ("details.config.model", 3),
        ("details.config.model.embedding_size", 9),
        ("details.input.size", -3),
        ("details.input.size", 3),
        ("details.input.channels", -1),
        ("details.input.channels", 1),
        ("details.input.x", 1),
        ("details.output", "x"),
        ("details.config.model.trunk", {"name": "os:getcwd"}),
    ],
)
def test_model_details_that_are_wrong(with_model, tmp_path, key, value):
    with_model.save(tmp_path / "bundle")
    change(tmp_path / "bundle", key, value)
    with pytest.raises(OsmlError) as error:
        OpenSetRecognizer.load(tmp_path / "bundle")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "deep", ["[" * 100_000, '{"format": "osml-bundle", "version": 1, "details": ' + '{"a":' * 100_000]
)
def test_deep_json(recognizer, tmp_path, deep):
    recognizer.save(tmp_path / "bundle")
    (tmp_path / "bundle" / "bundle.json").write_text(deep + "1" + deep.count('a"') * "}" + "}")
    with pytest.raises(OsmlError, match="is damaged: bundle.json cannot be read"):
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
    with pytest.raises(OsmlError, match="cannot write the bundle .*disk is full; choose another place"):
        changed.save(tmp_path / "bundle")
    monkeypatch.undo()
    found = OpenSetRecognizer.load(tmp_path / "bundle")
    same(found, changed if "new" in found.class_names else before, queries)
    assert len(os.listdir(tmp_path / "bundle")) == 2


def test_an_interrupted_first_save_leaves_nothing(recognizer, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("the disk is full")

    monkeypatch.setattr(bundle.os, "rename", fail)
    for place in ("bundle", "a/b/bundle"):
        with pytest.raises(OsmlError, match="cannot write the bundle .*disk is full; choose another place"):
            recognizer.save(tmp_path / place)
        assert os.listdir(tmp_path) == []


def test_places_that_cannot_be_written(recognizer, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    for write in (recognizer.save, bundle.check_writable):
        for place, reason in (
            ("file/bundle", "cannot write the bundle .*: Not a directory; choose another place"),
            ("a/" + 300 * "x", "cannot write the bundle .*: File name too long; choose another place"),
            ("folder", "exists and is no bundle"),
        ):
            with pytest.raises(OsmlError, match=reason) as error:
                write(tmp_path / place)
            assert "\n" not in str(error.value) and sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_place_that_can_be_written_is_left_as_it_was(recognizer, tmp_path):
    bundle.check_writable(tmp_path / "a" / "b" / "bundle")
    assert os.listdir(tmp_path) == []
    recognizer.save(tmp_path / "a" / "b" / "bundle")
    before = sorted(tmp_path.rglob("*"))
    bundle.check_writable(tmp_path / "a" / "b" / "bundle")
    assert sorted(tmp_path.rglob("*")) == before


def test_the_lock_leaves_nothing_beside_the_bundle(recognizer, tmp_path, monkeypatch):
    with pytest.raises(OsmlError, match="no bundle at"), bundle.bundle_lock(tmp_path / "absent" / "bundle"):
        pass
    recognizer.save(tmp_path / "bundle")
    with bundle.bundle_lock(tmp_path / "bundle"):
        assert os.listdir(tmp_path) == ["bundle"]
    monkeypatch.setattr(bundle.tempfile, "gettempdir", lambda: str(tmp_path / "bundle" / "bundle.json"))
    with pytest.raises(OsmlError, match="cannot lock the bundle .*: "), bundle.bundle_lock(tmp_path / "bundle"):
        pass


def test_changes_at_the_same_time_are_all_kept(recognizer, queries, tmp_path):
    recognizer.save(tmp_path / "bundle")
    for i in range(8):
        write_embeddings(tmp_path / f"{i}.npz", queries[8 * i : 8 * i + 8].numpy(), None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: enroll(tmp_path / "bundle", f"new {i}", [tmp_path / f"{i}.npz"]), range(8)))
    names = OpenSetRecognizer.load(tmp_path / "bundle").class_names
    assert sorted(names) == ["0", "1", "2", "3", *(f"new {i}" for i in range(8))]
    assert sorted(os.listdir(tmp_path)) == [*(f"{i}.npz" for i in range(8)), "bundle"]


def test_a_model_of_ones_own_is_refused_with_the_way_out(recognizer, tmp_path):
    import torch

    recognizer.model = torch.nn.Linear(3, 16)
    with pytest.raises(OsmlError, match="package.module:factory"):
        recognizer.save(tmp_path / "bundle")
    assert os.listdir(tmp_path) == []
