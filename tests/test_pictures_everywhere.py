"""One picture is the same to a network wherever it comes in: in training, from files, over HTTP, in bulk, in MLflow."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.csv
import pytest
import torch
from image_files import deep_png
from PIL import Image
from sklearn.datasets import load_digits

from osml_plugin import OpenSetRecognizer, OsmlError, train
from osml_plugin.bulk import recognize_dataset
from osml_plugin.bundle import _manifest_sha256, load_bundle, save_bundle
from osml_plugin.commands import discover, enroll, predict
from osml_plugin.data import Rendering, open_items, read_image
from osml_plugin.report import Page
from osml_plugin.serve.images import decode
from osml_plugin.serve.settings import Limits

DIGITS = load_digits()
DRAW = np.random.default_rng(2)
QUICK = ["training.epochs=1", "training.batch_size=32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Black digits on nothing, as gray with alpha whose 12-bit values stand in 16 bits."""
    root = tmp_path_factory.mktemp("ink")
    for label in range(5):
        (root / f"digit{label}").mkdir()
        for i in np.flatnonzero(DIGITS.target == label)[:30]:
            samples = np.zeros((8, 8, 2), np.uint16)
            samples[:, :, 0] = DRAW.integers(0, 4096, (8, 8)) * (DIGITS.images[i] == 0)  # unseen, but for a few pixels
            samples[:, :, 1] = DIGITS.images[i] * 4095 / 16
            samples[0, 0] = 4095, 4095
            (root / f"digit{label}" / f"{i:04}.png").write_bytes(deep_png(samples))
    return root


@pytest.fixture(scope="module")
def bundle(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("made") / "bundle"
    train(folder, out, n_known=3, seed=1, overrides=[*QUICK, "data.background='#0000ff'"], progress=False)
    return out


def test_the_bundle_remembers_ground_and_depth(bundle):
    kept = json.loads((bundle / "bundle.json").read_text())["preprocessing"]
    assert (kept["background"], kept["bit_depth"], kept["channels"]) == ([0, 0, 255], 12, 3)
    assert load_bundle(bundle).preprocessing.rendering == Rendering((0, 0, 255), 12)


def test_every_door_shows_the_same_picture(bundle, folder, tmp_path):
    recognizer = load_bundle(bundle)
    form = recognizer.preprocessing
    paths = list(open_items(folder).paths)[::20]
    pixels = torch.stack([read_image(path, 3, 8, Rendering((0, 0, 255), 12)) for path in paths])
    assert (pixels[:, 2] >= pixels[:, 0]).all() and (pixels[:, 2] > pixels[:, 0]).any()
    expected = recognizer.predict(pixels).scores
    contents = [path.read_bytes() for path in paths]

    served = torch.stack([decode(content, form, Limits())[0] for content in contents])
    assert torch.equal(served, pixels)
    from osml_plugin.mlflow_model import _decoded

    assert torch.equal(torch.stack([_decoded(0, content, form.form) for content in contents]), pixels)
    opened = [Image.open(path) for path in paths]
    for given in (paths, [io.BytesIO(content) for content in contents], opened):
        np.testing.assert_allclose(recognizer.predict(given).scores, expected, rtol=1e-5)
    np.testing.assert_allclose(predict(bundle, paths, progress=False)[0].scores, expected, rtol=1e-5)
    recognize_dataset(bundle, folder, tmp_path / "answers.csv", progress=False)
    answers = pyarrow.csv.read_csv(tmp_path / "answers.csv").to_pydict()
    of_path = dict(zip(answers["path"], answers["score"], strict=True))
    np.testing.assert_allclose([of_path[str(path)] for path in paths], expected, rtol=1e-5)

    page = Page("t", "l", form.rendering)
    page.add_images("h", [("", [(paths[0], "")])])
    page.write(tmp_path / "page.html")
    shown = (tmp_path / "page.html").read_text().partition("data:image/png;base64,")[2].partition('"')[0]
    with Image.open(io.BytesIO(base64.b64decode(shown))) as image:
        np.testing.assert_array_equal(np.asarray(image), pixels[0].permute(1, 2, 0))


def test_a_bundle_without_a_ground_sees_as_it_was_trained(bundle, folder, tmp_path):
    """Bundles of 0.1.0 have neither key: transparency is dropped, and the upper 8 of 16 bits are kept."""
    recognizer = load_bundle(bundle)
    save_bundle(recognizer, tmp_path / "old")
    manifest = json.loads((tmp_path / "old" / "bundle.json").read_text())
    del manifest["preprocessing"]["background"], manifest["preprocessing"]["bit_depth"], manifest["sha256"]
    manifest["sha256"] = _manifest_sha256(manifest)
    (tmp_path / "old" / "bundle.json").write_text(json.dumps(manifest))
    old = load_bundle(tmp_path / "old")
    assert old.preprocessing.rendering == Rendering(None, 16)
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (200, 100, 50, 0)).save(file, "PNG")
    assert decode(file.getvalue(), old.preprocessing, Limits())[0].flatten(1).T.unique(dim=0).tolist() == [
        [200, 100, 50]
    ]
    save_bundle(old, tmp_path / "again")  # and stays so
    assert load_bundle(tmp_path / "again").preprocessing.rendering == Rendering(None, 16)


@pytest.mark.parametrize("broken", [{"bit_depth": 7}, {"bit_depth": 17}, {"background": [1, 2, 256]}])
def test_a_bundle_with_a_wrong_ground_or_depth_is_refused(bundle, tmp_path, broken):
    save_bundle(load_bundle(bundle), tmp_path / "b")
    manifest = json.loads((tmp_path / "b" / "bundle.json").read_text())
    manifest["preprocessing"] |= broken
    manifest["sha256"] = _manifest_sha256({k: v for k, v in manifest.items() if k != "sha256"})
    (tmp_path / "b" / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(OsmlError, match="is damaged"):
        load_bundle(tmp_path / "b")


def test_training_on_pictures_of_nothing_is_refused(tmp_path, osml):
    """As 8-bit values in 16-bit files were: exit 0, and a promise."""
    blank = tmp_path / "blank"
    for label in range(4):
        (blank / str(label)).mkdir(parents=True)
        for i in range(8):
            values = DRAW.integers(0, 256, (8, 8, 1)).astype(np.uint16)
            (blank / str(label) / f"{i}.png").write_bytes(deep_png(values))
    arguments = ("train", "--data", blank, "--n-known", 3, "--out", tmp_path / "c")
    status, out, err = osml(*arguments, "--set", "data.bit_depth=16")
    assert (status, out) == (2, "") and "32 of 32 images are nothing but the color rgb(0, 0, 0)" in err
    assert err.count("\n") == 1 and not (tmp_path / "c").exists()


def test_an_inbox_goes_through_every_command(bundle, folder, tmp_path):
    inbox = tmp_path / "inbox"
    (inbox / "later").mkdir(parents=True)
    for i, path in enumerate(open_items(folder).paths[::10]):
        (inbox / ("later" if i % 2 else ".") / f"{i}.png").write_bytes(path.read_bytes())
    (inbox / "a.HEIC").write_bytes(b"")
    n = len(open_items(inbox, labelled=False))
    assert n == 15 and len(predict(bundle, [inbox], progress=False)[1]) == n
    assert len(discover(bundle, inbox, everything=True, progress=False).items) == n
    assert recognize_dataset(bundle, inbox, tmp_path / "a.csv", progress=False).n == n
    save_bundle(load_bundle(bundle), tmp_path / "b")
    taught = enroll(tmp_path / "b", "new", [inbox], progress=False)
    assert isinstance(taught, OpenSetRecognizer) and (taught.gallery.labels == taught.gallery.id_of("new")).sum() == n


def test_enrolling_pictures_of_nothing_is_refused(bundle, tmp_path):
    save_bundle(load_bundle(bundle), tmp_path / "b")
    before = (tmp_path / "b" / "bundle.json").read_bytes()
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(OsmlError, match="1 of 1 images are nothing but the color"):
        enroll(tmp_path / "b", "new", [tmp_path / "black.png"], progress=False)
    assert (tmp_path / "b" / "bundle.json").read_bytes() == before
