"""The command line, from an image folder to a recognizer that rejects, groups and learns; and what it says to bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from osml_plugin import OpenSetRecognizer, OsmlError, cli
from osml_plugin.data import open_items, write_embeddings

SPLIT = {"known": ["0", "1", "2", "3", "4"], "pseudo_unknown": ["5", "6"], "unknown": ["7", "8", "9"]}
QUICK = ["--set", "training.epochs=8", "--set", "model.trunk.name=small_cnn", "--set", "training.batch_size=32"]
COMMANDS = ["train", "evaluate", "predict", "embed", "recognize", "discover", "enroll", "forget", "detectors", "losses"]
FIGURES = [
    "closed_set_accuracy",
    "auroc",
    "aupr_unknown",
    "aupr_known",
    "fpr95",
    "oscr",
    "macro_f1",
    "known_rejected",
    "unknown_rejected",
    "detector",
    "threshold",
    "n_known_items",
    "n_unknown_items",
    "discovery",
]


@pytest.fixture(scope="module")
def workplace(digits_folder, tmp_path_factory) -> Path:
    """A folder with `split.json` and a trained `bundle`."""
    root = tmp_path_factory.mktemp("work")
    (root / "split.json").write_text(json.dumps(SPLIT))
    command = ["train", "--data", digits_folder, "--split", root / "split.json", "--out", root / "bundle", *QUICK]
    # A process of its own, as a user runs it.
    subprocess.run([sys.executable, "-m", "osml_plugin.cli", *map(str, command)], check=True, capture_output=True)
    return root


@pytest.fixture
def bundle(workplace, tmp_path) -> Path:
    return Path(shutil.copytree(workplace / "bundle", tmp_path / "bundle"))


def width(bundle: Path) -> int:
    return OpenSetRecognizer.load(bundle).gallery.embeddings.shape[1]


def fails(result, *words) -> None:
    """Exit status 2, nothing on standard output, one line on standard error that holds the words."""
    status, out, err = result
    assert status == 2 and out == "" and "Traceback" not in err
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("osml: error: ")]
    assert len(lines) == 1, err
    for word in words:
        assert word in lines[0], lines[0]


# The line ---------------------------------------------------------------------------------------------------


def test_evaluate_prints_one_object(osml, workplace, digits_folder):
    status, out, _ = osml("evaluate", workplace / "bundle", "--data", digits_folder, "--json")
    figures = json.loads(out)
    assert status == 0 and out.count("\n") == 1 and set(FIGURES) <= set(figures)
    assert set(figures["discovery"]) >= {"accuracy", "nmi", "ari", "bcubed_f1", "n_classes_true", "n_classes_found"}
    assert figures["n_unknown_items"] == 120 and figures["discovery"]["n_classes_true"] == 3
    assert 0 < figures["n_known_items"] <= 50  # of five classes of 40, a fifth
    assert figures["closed_set_accuracy"] > 0.8 and figures["auroc"] > 0.7 and figures["alpha"] == 0.05
    again = osml("evaluate", workplace / "bundle", "--data", digits_folder, "--json")[1]
    assert again == out  # repeatable
    named = osml(
        "evaluate", workplace / "bundle", "--data", digits_folder, "--split", workplace / "split.json", "--json"
    )
    assert named[1] == out


def test_alpha_is_the_rate_to_keep(osml, workplace, digits_folder):
    def rejected(alpha):
        arguments = ("evaluate", workplace / "bundle", "--data", digits_folder, "--json", "--alpha", alpha)
        return json.loads(osml(*arguments)[1])["known_rejected"]

    assert rejected(0.05) <= rejected(0.3) and rejected(0.3) > 0.1
    refused = osml("evaluate", workplace / "bundle", "--data", digits_folder, "--alpha", 0.02)
    assert refused[0] == 2 and "calibration items" in refused[2]  # too few to promise that


def test_evaluate_for_people(osml, workplace, digits_folder, tmp_path):
    page = tmp_path / "page.html"
    status, out, _ = osml("evaluate", workplace / "bundle", "--data", digits_folder, "--report", page)
    assert status == 0 and "closed_set_accuracy" in out and "discovery.n_classes_found" in out
    assert page.read_text().count("<img") > 10


def test_training_twice_with_a_seed_gives_the_same_bundle(osml, digits_folder, tmp_path):
    quick = ["--set", "training.epochs=1", "--n-known", 4, "--seed", 3]
    for name in ("a", "b"):
        assert osml("train", "--data", digits_folder, "--out", tmp_path / name, *quick)[0] == 0
    a, b = (sorted((p.name, p.read_bytes()) for p in (tmp_path / n).iterdir()) for n in ("a", "b"))
    assert a == b
    stored = json.loads((tmp_path / "a" / "bundle.json").read_text())["details"]["split"]
    assert len(stored["known"]) == 4 and sum(map(len, stored.values())) == 10


def test_train_says_what_it_drew(osml, digits_folder, tmp_path):
    quick = ["--set", "training.epochs=1", "--n-known", 4]
    status, out, _ = osml("train", "--data", digits_folder, "--out", tmp_path / "b", *quick, "--json")
    summary = json.loads(out)
    assert status == 0 and out.count("\n") == 1 and len(summary["split"]["known"]) == 4
    assert summary["n_items"]["train"] == 88 and summary["threshold"]["name"] == "conformal"


def test_few_images_are_cut_so_that_the_rate_can_be_promised(osml, digits_folder, tmp_path):
    for label in range(4):
        place = tmp_path / "data" / str(label)
        place.mkdir(parents=True)
        for path in sorted((digits_folder / str(label)).iterdir())[:30]:
            shutil.copy(path, place)
    quick = ["--set", "training.epochs=1", "--n-known", 3, "--json"]
    status, out, err = osml("train", "--data", tmp_path / "data", "--out", tmp_path / "b", *quick)
    summary = json.loads(out)
    assert status == 0 and summary["n_items"]["calibration"] >= 19 and summary["threshold"]["tau"] is not None
    assert "warning" not in err
    # With less than that, it says that nothing is rejected.
    status, out, err = osml("train", "--data", tmp_path / "data", "--out", tmp_path / "c", *quick, "--alpha", 0.01)
    assert status == 0 and "osml: warning: nothing is rejected: at 1.0% at least 99" in err
    assert json.loads(out)["n_items"]["calibration"] < 19 and json.loads(out)["threshold"]["tau"] is None


def test_predict(osml, workplace, digits_folder):
    paths = sorted((digits_folder / "1").iterdir())[:3] + sorted((digits_folder / "8").iterdir())[:3]
    status, out, _ = osml("predict", workplace / "bundle", *paths, "--json")
    results = json.loads(out)["results"]
    assert status == 0 and [r["path"] for r in results] == [str(p) for p in paths]
    assert sum(r["label"] == "1" for r in results[:3]) >= 2
    for r in results:
        assert r["known"] == (r["label"] is not None) == (r["score"] <= r["threshold"])
        assert 0 < r["p_value"] <= 1 and len(r["neighbours"]) == 3 and r["nearest"] in SPLIT["known"]
    status, out, _ = osml("predict", workplace / "bundle", digits_folder / "8")
    assert status == 0 and len(out.splitlines()) == 40 and "unknown (nearest:" in out


def test_images_in_memory_are_recognised_as_their_files_are(workplace, digits_folder):
    recognizer = OpenSetRecognizer.load(workplace / "bundle")
    paths = sorted((digits_folder / "1").iterdir())[:4]
    expected = recognizer.predict(paths).scores
    pixels = [np.asarray(Image.open(path)) for path in paths]
    with open(paths[0], "rb") as file:
        np.testing.assert_allclose(recognizer.predict([file]).scores, expected[:1], rtol=1e-4)
    tensor = torch.from_numpy(np.stack(pixels))[:, None]
    forms = [[str(p) for p in paths], [Image.open(p) for p in paths], pixels, np.stack(pixels), tensor]
    forms += [[np.stack([p] * 3, axis=2) for p in pixels], [p[:, :, None] for p in pixels]]
    for images in forms:
        np.testing.assert_allclose(recognizer.predict(images).scores, expected, rtol=1e-4)
    with pytest.raises(OsmlError, match="its pixels are float64; expected uint8"):
        recognizer.predict([pixels[0] / 255])


def test_a_discovery_goes_on_from_whatever_folder_it_is_started(osml, bundle, digits_folder, tmp_path, monkeypatch):
    run = ["--all", "--n-classes", 2]
    assert osml("discover", bundle, digits_folder / "7", *run, "--out", tmp_path / "found")[0] == 0
    monkeypatch.chdir(digits_folder)
    after = osml("discover", bundle, "7", *run, "--previous", tmp_path / "found", "--json")
    assert after[0] == 0 and json.loads(after[1])["changes"] == []  # the same files under shorter names


def test_discover_enroll_evaluate_forget(osml, bundle, digits_folder):
    status, out, _ = osml("discover", bundle, digits_folder / "7", "--all", "--json")
    found = json.loads(out)
    assert status == 0 and sum(g["size"] for g in found["groups"]) + len(found["left_out"]) == 40
    assert all(g["size"] == len(g["members"]) for g in found["groups"])
    rejected = json.loads(osml("discover", bundle, digits_folder, "--json")[1])
    assert rejected["n_items"] + rejected["n_recognised"] == 400 and rejected["metrics"]["n_classes_true"] > 3

    examples = sorted((digits_folder / "7").iterdir())
    status, out, _ = osml("enroll", bundle, "--name", "7", *examples[:20], "--json")
    assert status == 0 and json.loads(out)["classes"] == ["0", "1", "2", "3", "4", "7"]
    results = json.loads(osml("predict", bundle, *examples[20:], "--json")[1])["results"]
    assert sum(r["label"] == "7" for r in results) >= 12
    after = json.loads(osml("evaluate", bundle, "--data", digits_folder, "--json")[1])
    assert after["n_unknown_items"] == 80  # 7 is known now, and what it was enrolled from is not tested
    assert after["discovery"]["n_classes_true"] == 2

    assert osml("forget", bundle, "--name", "7")[0] == 0
    assert json.loads(osml("evaluate", bundle, "--data", digits_folder, "--json")[1])["n_unknown_items"] == 100
    fails(osml("forget", bundle, "--name", "7"), "unknown class '7'")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_embeddings_serve_wherever_no_image_is_needed(osml, workplace, bundle, digits_folder, tmp_path, suffix):
    file = tmp_path / f"digits{suffix}"
    status, out, _ = osml("embed", workplace / "bundle", digits_folder, "--out", file)
    assert status == 0 and out.startswith("400 embeddings")
    items = open_items(file)
    assert items.embeddings.shape == (400, width(bundle)) and items.labels == open_items(digits_folder).labels
    # The bundle's own embeddings in place of the images.
    from_images = json.loads(osml("predict", workplace / "bundle", digits_folder / "3", "--json")[1])["results"]
    from_file = json.loads(osml("predict", workplace / "bundle", file, "--json")[1])["results"]
    threes = [r for r, label in zip(from_file, items.labels, strict=True) if label == "3"]
    assert [r["label"] for r in threes] == [r["label"] for r in from_images]
    write_embeddings(tmp_path / f"seven{suffix}", items.embeddings[280:300], None)
    assert osml("enroll", bundle, "--name", "7", tmp_path / f"seven{suffix}")[0] == 0
    assert osml("discover", bundle, file, "--json")[0] == 0
    # A recognizer of embeddings alone, with no network.
    out_of = tmp_path / "plain"
    assert osml("train", "--data", file, "--split", workplace / "split.json", "--out", out_of)[0] == 0
    figures = json.loads(osml("evaluate", out_of, "--data", file, "--json")[1])
    assert figures["auroc"] > 0.7 and figures["n_unknown_items"] == 120
    assert osml("predict", out_of, file, "--json")[0] == 0
    # And one whose embedder is trained on them.
    head = ["--set", "training.epochs=2", "--set", "model.embedder=mlp"]
    assert osml("train", "--data", file, "--split", workplace / "split.json", "--out", tmp_path / "head", *head)[0] == 0
    assert osml("evaluate", tmp_path / "head", "--data", file)[0] == 0


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_manifest_serves_too(osml, workplace, digits_folder, tmp_path, suffix):
    items = open_items(digits_folder)
    table = pd.DataFrame({"path": [str(p) for p in items.paths], "label": items.labels})
    table["role"] = np.where(np.arange(400) % 4 == 0, "test", "train")
    file = tmp_path / f"manifest{suffix}"
    table.to_csv(file, index=False) if suffix == ".csv" else table.to_parquet(file)
    split = ["--split", workplace / "split.json", "--set", "training.epochs=1"]
    assert osml("train", "--data", file, *split, "--out", tmp_path / "b")[0] == 0
    figures = json.loads(osml("evaluate", tmp_path / "b", "--data", file, "--json")[1])
    assert (figures["n_known_items"], figures["n_unknown_items"]) == (50, 30)


def test_train_and_test_folders(osml, workplace, digits_folder, tmp_path):
    for i, (path, label) in enumerate(
        zip(open_items(digits_folder).paths, open_items(digits_folder).labels, strict=True)
    ):
        place = tmp_path / "data" / ("test" if i % 4 == 0 else "train") / label
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    split = ["--split", workplace / "split.json", "--set", "training.epochs=1"]
    status, out, _ = osml("train", "--data", tmp_path / "data", *split, "--out", tmp_path / "b", "--json")
    assert status == 0 and sum(json.loads(out)["n_items"].values()) == 7 * 30  # no test image, no unknown class
    figures = json.loads(osml("evaluate", tmp_path / "b", "--data", tmp_path / "data", "--json")[1])
    assert (figures["n_known_items"], figures["n_unknown_items"]) == (50, 30)


def test_a_frozen_trunk_and_a_config_file(osml, workplace, digits_folder, tmp_path):
    (tmp_path / "c.yaml").write_text(
        "model: {frozen: true, embedding_size: 24}\nloss: SupConLoss\nminer: MultiSimilarityMiner\n"
        "sampler: {name: MPerClassSampler, m: 4}\ntraining: {epochs: 2}\nthreshold: max_f1\ndetector: knn\n"
        "data: {augment: [{name: RandomRotation, degrees: 5}], workers: 2}\n"
    )
    data = ["--data", digits_folder, "--split", workplace / "split.json"]
    for extra in ([], ["--set", "data.augment=auto"]):
        out = tmp_path / f"b{len(extra)}"
        assert osml("train", *data, "-c", tmp_path / "c.yaml", *extra, "--out", out)[0] == 0
        figures = json.loads(osml("evaluate", out, "--data", digits_folder, "--json")[1])
        assert figures["detector"] == "knn"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(osml, command):
    status, out, _ = osml(command, "--help")
    assert status == 0 and f"Example: osml {command}" in " ".join(out.split())


def test_lists(osml):
    for command, word in (("detectors", "relative_mahalanobis"), ("losses", "ArcFaceLoss")):
        status, out, _ = osml(command)
        assert status == 0 and word in out
        assert json.loads(osml(command, "--json")[1])[command]


# Bad input --------------------------------------------------------------------------------------------------


@pytest.fixture
def train(osml, tmp_path):
    """`train(data, *arguments)`; afterwards nothing may have been left behind."""

    def run(data, *arguments):
        before = set(os.listdir(tmp_path))
        result = osml("train", "--data", data, "--out", tmp_path / "made", *QUICK, *arguments)
        assert set(os.listdir(tmp_path)) == before, "a bundle, or a part of one, was left behind"
        return result

    return run


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_no_data(train, tmp_path):
    fails(train(tmp_path / "absent"), "absent", "expected")
    (tmp_path / "empty").mkdir()
    fails(train(tmp_path / "empty"), "empty", "expected")


def test_an_empty_class_folder(train, digits_folder, tmp_path):
    data = copy(digits_folder, tmp_path / "data")
    (data / "nothing").mkdir()
    fails(train(data), "nothing", "no images")


def test_a_class_with_one_image(train, digits_folder, workplace, tmp_path):
    data = copy(digits_folder, tmp_path / "data")
    for path in sorted((data / "3").iterdir())[1:]:
        path.unlink()
    fails(train(data, "--split", workplace / "split.json"), "class '3' has 1 image", "at least 2")
    fails(train(data, "--n-known", 10), "class '3' has 1 image")


def test_unreadable_images(osml, train, digits_folder, workplace, tmp_path, caplog):
    data = copy(digits_folder, tmp_path / "data")
    whole = sorted((data / "0").iterdir())[0].read_bytes()
    (data / "0" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (data / "9" / "text.jpg").write_text("no image")
    fails(train(data, "--split", workplace / "split.json"), "2 of 402 images cannot be read", "cut.png", "--skip-bad")
    for command in ("predict", "discover"):
        fails(osml(command, workplace / "bundle", data), "2 of 402 images cannot be read")
    fails(osml("evaluate", workplace / "bundle", "--data", data), "cannot be read")
    fails(osml("embed", workplace / "bundle", data, "--out", tmp_path / "e.npz"), "cannot be read")
    assert not (tmp_path / "e.npz").exists()
    quick = [*QUICK, "--set", "training.epochs=1", "--split", workplace / "split.json", "--skip-bad"]
    caplog.clear()
    status, out, _ = osml("train", "--data", data, "--out", tmp_path / "b", *quick, "--json")
    assert status == 0 and sorted(json.loads(out)["skipped"]) == [
        str(data / "0" / "cut.png"),
        str(data / "9" / "text.jpg"),
    ]
    assert len(caplog.messages) == 2 and "cut.png" in caplog.messages[0]  # each is named, with the reason
    status, out, _ = osml("predict", workplace / "bundle", data, "--skip-bad", "--json")
    assert status == 0 and len(json.loads(out)["results"]) == 400


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ({"known": ["0", "1"], "unknown": ["1"]}, ["'1'", "'known'", "'unknown'"]),
        ({"known": ["0", "11"]}, ["'11'", "not in the data"]),
        ({"known": ["0"]}, ["at least 2 known classes"]),
        ({"knwon": ["0", "1"]}, ["did you mean 'known'"]),
        ({"known": "01"}, ["list"]),
        ([], ["object"]),
    ],
)
def test_bad_splits(train, digits_folder, tmp_path, split, words):
    (tmp_path / "split.json").write_text(json.dumps(split))
    fails(train(digits_folder, "--split", tmp_path / "split.json"), *words)


def test_draws_that_cannot_be(train, digits_folder, workplace):
    fails(train(digits_folder, "--n-known", 1), "1", "known")
    fails(train(digits_folder, "--n-known", 11), "11", "10 classes")
    fails(train(digits_folder, "--n-known", 5, "--split", workplace / "split.json"), "either --split")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("los.margin=20", ["did you mean 'loss'"]),
        ("loss.margn=20", ["did you mean 'margin'"]),
        ("loss=Arcface", ["did you mean 'ArcFaceLoss'"]),
        ("detector=mahalanobi", ["did you mean 'mahalanobis'"]),
        ("data.augment=[{name: RandomRotatio}]", ["did you mean 'RandomRotation'"]),
        ("model.trunk=vgg11", ["trunk cannot take a batch"]),
    ],
)
def test_bad_settings(train, digits_folder, setting, words):
    fails(train(digits_folder, "--set", "model.trunk=small_cnn", "--set", setting), *words)


def test_a_place_that_is_taken(osml, digits_folder, workplace, tmp_path):
    (tmp_path / "made").mkdir()
    fails(osml("train", "--data", digits_folder, "--out", tmp_path / "made", *QUICK), "exists", "another --out")
    fails(osml("train", "--data", digits_folder, "--out", workplace / "bundle", *QUICK), "exists", "--overwrite")


def test_bad_embeddings(osml, train, workplace, bundle, tmp_path):
    draw = np.random.default_rng(0)
    good = draw.normal(size=(40, width(bundle))).astype(np.float32)
    labels = np.repeat(["a", "b"], 20)

    def file(embeddings, **arrays):
        np.savez(tmp_path / "e.npz", embeddings=embeddings, **arrays)
        return tmp_path / "e.npz"

    spoiled = good.copy()
    spoiled[3, 5] = np.nan
    fails(train(file(spoiled, labels=labels)), "NaN")
    fails(osml("predict", bundle, file(spoiled)), "NaN")
    fails(osml("predict", bundle, file(good[:, :9])), "9 wide", str(width(bundle)))
    fails(osml("enroll", bundle, "--name", "x", file(good[:, :9])), "9 wide", str(width(bundle)))
    fails(train(file(good, labels=labels[:-1])), "labels")
    fails(train(file(good)), "labels")
    fails(train(file(good[0], labels=labels)), "shape")


def test_damaged_bundles(osml, bundle, digits_folder):
    untouched = {p.name: p.read_bytes() for p in bundle.iterdir()}
    for name, content in untouched.items():
        middle = len(content) // 2
        (bundle / name).write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        for arguments in (
            ("predict", bundle, digits_folder / "1"),
            ("evaluate", bundle, "--data", digits_folder, "--json"),
            ("enroll", bundle, "--name", "x", digits_folder / "7"),
        ):
            fails(osml(*arguments), "damaged")
        (bundle / name).write_bytes(content)
    assert osml("predict", bundle, digits_folder / "1")[0] == 0
    fails(osml("predict", bundle / "absent", digits_folder / "1"), "no bundle")


def test_classes_that_the_bundle_does_not_know(osml, workplace, digits_folder, tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"known": ["0", "7"], "unknown": ["8"]}))
    result = osml("evaluate", workplace / "bundle", "--data", digits_folder, "--split", tmp_path / "split.json")
    fails(result, "unknown class '7'")


def test_wrong_usage_exits_with_2(osml):
    for arguments in (("trian",), ("train",), ("train", "--data"), ("predict", "bundle"), ("evaluate", "--nonsense")):
        status, _, err = osml(*arguments)
        assert status == 2 and "Traceback" not in err


def test_a_users_mistake_is_all_that_is_caught():
    def bug():
        raise KeyError("a bug keeps its traceback")

    with pytest.raises(KeyError):
        cli.run(bug)
