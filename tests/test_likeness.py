"""Likeness of items: a picture that was saved again is the same item, whatever its file says."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.fft import dctn

from osml_plugin import commands, train
from osml_plugin.data import Split, inspect_images, open_items, readable_items
from osml_plugin.data.likeness import SIDE, WIDTH, SeenItems, embedding_signatures, image_signature, near_copies
from osml_plugin.recognizer import OpenSetRecognizer


def picture(seed=0, size=(90, 60), mode="RGB"):
    """Smooth colored shapes, as photographs have them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def saved_again(image, kind):
    file = io.BytesIO()
    image.save(file, **kind)
    return Image.open(file).convert("RGB")


def test_a_signature_is_the_cosine_transform_of_averages():
    image = picture(size=(64, 64))
    averages = np.asarray(image, float).reshape(SIDE, 4, SIDE, 4, 3).mean(axis=(1, 3))
    ycc = np.stack([np.asarray(p, float) for p in Image.fromarray(np.uint8(averages.round())).convert("YCbCr").split()])
    ycc[1:] -= 128
    planes = [dctn(plane, norm="ortho") for plane in ycc]
    expected = np.concatenate([planes[0][:8, :8].ravel(), planes[1][:4, :4].ravel(), planes[2][:4, :4].ravel()])
    assert image_signature(image) == pytest.approx(expected, abs=16)  # pixels are rounded, twice
    assert image_signature(image).shape == (WIDTH,)


@pytest.mark.parametrize(
    "kind",
    [
        {"format": "PNG"},
        {"format": "BMP"},
        {"format": "JPEG", "quality": 60},
        {"format": "WEBP", "quality": 60},
        {"format": "TIFF"},
    ],
    ids=lambda kind: kind["format"],
)
def test_another_format_has_nearly_the_same_signature(kind):
    image = picture()
    between = np.linalg.norm(image_signature(image) - image_signature(picture(1)))
    assert np.linalg.norm(image_signature(image) - image_signature(saved_again(image, kind))) < between / 20


def test_grey_pictures_have_no_color_in_their_signature():
    grey = picture(mode="L")
    assert image_signature(grey)[64:].any() == np.False_
    assert image_signature(grey) == pytest.approx(image_signature(grey.convert("RGB")), abs=1e-2)


def test_wide_embeddings_are_projected_and_keep_their_distances():
    rows = np.random.default_rng(0).normal(size=(60, 1000)).astype(np.float32)
    found = embedding_signatures(rows)
    assert found.shape == (60, WIDTH) and (embedding_signatures(rows[:, :WIDTH]) == rows[:, :WIDTH]).all()
    before, after = (torch.pdist(torch.from_numpy(x)).numpy() for x in (rows, found))
    assert (np.abs(after / before - 1) < 0.35).all() and abs((after / before).mean() - 1) < 0.02


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four classes of 40 pictures; every third is there as PNG, BMP, JPEG and with other metadata."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for c in range(4):
        (root / f"class{c}").mkdir()
        ground = rng.integers(0, 255, (5, 5, 3))
        for i in range(40):
            pixels = np.clip(ground + rng.normal(size=(5, 5, 3)) * 60, 0, 255).astype(np.uint8)
            image = Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)
            image.save(root / f"class{c}" / f"{i:02d}.png")
            if i % 3 == 0:
                image.save(root / f"class{c}" / f"{i:02d}-again.bmp")
                image.save(root / f"class{c}" / f"{i:02d}-mail.jpg", quality=85)
                image.save(root / f"class{c}" / f"{i:02d}-dated.png", dpi=(72, 72), optimize=True)
    return root


def test_pictures_that_were_saved_again_are_one_set(folder):
    items, survey = readable_items(open_items(folder), False, False)
    sets = near_copies(items, survey.signatures)
    names = [(path.parent.name, path.name[:2]) for path in items.paths]
    order = list(dict.fromkeys(names))
    assert sets.tolist() == [order.index(name) for name in names]


QUICK = ["training.epochs=1", "loss.scale=8", "detector=centroid"]


def test_copies_share_a_role_and_are_never_tested(folder, tmp_path, caplog):
    split = Split(("class0", "class1", "class2"), (), ("class3",))
    with caplog.at_level(logging.WARNING):
        result = train(folder, tmp_path / "bundle", split=split, overrides=QUICK, progress=False)
    assert "near-identical sets: each set is kept in one role and counts once" in caplog.text
    recognizer = OpenSetRecognizer.load(tmp_path / "bundle")
    assert recognizer.guarantee.n == result.n_items["calibration"] == 24  # of 120 pictures, so that 5 % can be promised
    assert len(recognizer.gallery) == 60 < result.n_items["train"]

    # What nobody has seen is tested, and of what was seen no copy, whatever its file is called.
    caplog.clear()
    evaluation, tested = commands.evaluate(tmp_path / "bundle", folder, progress=False)
    seen = recognizer.seen.holds(inspect_images(tested.paths, progress=False).signatures)
    assert not seen.any() and (evaluation.labels >= 0).sum() == 24 + 3 * sum(
        "-again" in path.name and path.parent.name != "class3" for path in tested.paths
    )

    # The same folder as mail would bring it: nothing of the training is left in it.
    mail = tmp_path / "mail"
    for path in open_items(folder).paths:
        if "-" not in path.name:
            (mail / path.parent.name).mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                image.save(mail / path.parent.name / f"{path.stem}.jpg", quality=90)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        again, _ = commands.evaluate(tmp_path / "bundle", mail, progress=False)
    assert (again.labels >= 0).sum() == 24 and "near-copies of items that were used to train" in caplog.text


def test_different_items_where_the_user_says_so(folder, tmp_path):
    split = Split(("class0", "class1", "class2"), (), ("class3",))
    overrides = [*QUICK, "data.near_copies=false"]
    result = train(folder, tmp_path / "bundle", split=split, overrides=overrides, progress=False)
    n_files = sum(len(list((folder / name).iterdir())) for name in split.known)
    assert sum(result.n_items.values()) == round(0.8 * n_files)
    assert OpenSetRecognizer.load(tmp_path / "bundle").copy_radius == 0


def test_seen_items_hold_what_lies_within_their_radius():
    seen = SeenItems(np.float32([[0, 0], [10, 0]]), np.float32([1, 2]))
    assert seen.holds(np.float32([[0.9, 0], [1.1, 0], [8.1, 0], [7.9, 0]])).tolist() == [True, False, True, False]
    assert seen.holds(np.zeros((2, 3), np.float32)).tolist() == [False, False]
    assert seen.holds(np.zeros((0, 2), np.float32)).tolist() == []
    assert seen.joined(np.float32([[50, 0]])).holds(np.float32([[50.5, 0], [52, 0]])).tolist() == [True, False]
