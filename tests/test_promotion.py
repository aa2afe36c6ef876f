"""A champion falls only to what beats it on the same validation data, and can be taken back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from sklearn.metrics import roc_auc_score

import osml_plugin
from osml_plugin import OsmlError, tracking
from osml_plugin.data import Fractions, Split, open_items, training_roles, write_embeddings
from osml_plugin.tracking import log_bundle
from osml_plugin.tune.promotion import promote, rollback
from osml_plugin.tune.runs import SweepRuns

SPLIT = Split(known=("0", "1", "2", "3", "4"), pseudo_unknown=("5", "6"), unknown=("7", "8", "9"))


@dataclass
class Shop:
    """A registry and the data that all bundles here are made from."""

    folder: Path
    data: Path
    run_id: str

    def register(self, name="digits", *, noise=0.0, seed=0, split=SPLIT, change=None, tags=None):
        """A version whose gallery is blurred by `noise`: the more, the worse it recognises."""
        number = len(list(self.folder.glob("bundle-*")))
        out = self.folder / f"bundle-{number}"
        overrides = ["detector.name=knn", "data.fractions={train: 0.5, calibration: 0.2, validation: 0.1, test: 0.2}"]
        result = osml_plugin.train(self.data, out, split=split, seed=seed, overrides=overrides, progress=False)
        recognizer, items = result.recognizer, open_items(self.data)
        assert recognizer.details["validation_items"]
        draw = np.random.default_rng(0)
        embeddings = recognizer.gallery.embeddings
        blurred = embeddings + noise * torch.from_numpy(draw.standard_normal(embeddings.shape, dtype=np.float32))
        recognizer.gallery = replace(recognizer.gallery, embeddings=blurred)
        if change is not None:
            change(recognizer, items)
        recognizer.refit()
        recognizer.save(out)
        tags = {"data_path": str(self.data)} if tags is None else tags
        return log_bundle(out, run_id=self.run_id, register=name, tags=tags)[1]

    def champion(self, name="digits"):
        return int(MlflowClient().get_model_version_by_alias(name, "champion").version)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory):
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    tracking.check_tracking(f"sqlite:///{file}")
    return file.read_bytes()


@pytest.fixture
def shop(empty_store, digit_vectors, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "to be forgotten")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    Path("mlflow.db").write_bytes(empty_store)
    vectors, labels = digit_vectors
    write_embeddings(tmp_path / "digits.npz", vectors[:500], labels[:500])
    run_id = SweepRuns(tracking.tracking_uri(), "digits", "s").start("sweep", {}, {})
    return Shop(tmp_path, tmp_path / "digits.npz", run_id)


def test_only_what_beats_the_champion_replaces_it(shop):
    worst, worse, best = shop.register(noise=0.3), shop.register(noise=0.1), shop.register()
    first = promote("digits", version=worse, progress=False)
    assert first.promoted and first.champion is None and first.scores == {} and shop.champion() == worse

    refused = promote("digits", version=worst, progress=False)
    assert not refused.promoted and refused.champion == worse and shop.champion() == worse
    assert refused.scores["challenger"] < refused.scores["champion"] and "does not beat" in refused.reason

    won = promote("digits", progress=False)  # the challenger is the latest
    assert won.promoted and won.version == best and shop.champion() == best
    assert won.scores["challenger"] > won.scores["champion"] == refused.scores["champion"]
    assert won.reason.count("\n") == 0 and f"version {best} beats version {worse}" in won.reason

    again = promote("digits", progress=False)
    assert not again.promoted and "already" in again.reason
    assert rollback("digits") == worse == shop.champion()
    with pytest.raises(OsmlError, match="none before it"):
        rollback("digits")


def test_a_tie_does_not_win(shop):
    shop.register()
    promote("digits", progress=False)
    shop.register()
    tied = promote("digits", progress=False)
    assert not tied.promoted and tied.scores["challenger"] == tied.scores["champion"] and shop.champion() == 1
    assert promote("digits", force=True).promoted and shop.champion() == 2


def test_both_are_judged_on_what_neither_learned_from_and_no_test_item(shop):
    judged = []
    shop.register(noise=0.2, seed=1)  # other roles: some of its training items validate the next
    promote("digits", progress=False)
    shop.register()
    items = open_items(shop.data)
    fingerprints = items.fingerprints()
    details = [osml_plugin.OpenSetRecognizer.load(shop.folder / f"bundle-{n}").details for n in (0, 1)]
    learned = set(details[0]["seen"]) - set(details[0]["validation_items"])
    expected = sorted(set(details[1]["validation_items"]) - learned)
    assert len(expected) < len(details[1]["validation_items"])
    test = set(fingerprints.tolist()) - set(details[1]["seen"])
    original = osml_plugin.OpenSetRecognizer.predict

    def predict(self, embeddings, **options):
        judged.append(embeddings)
        return original(self, embeddings, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(osml_plugin.OpenSetRecognizer, "predict", predict)
        made = promote("digits", progress=False)
    assert len(judged) == 2 and np.array_equal(*judged) and made.n_items == len(expected) == len(judged[0])
    rows = {row.tobytes(): int(f) for row, f in zip(items.embeddings, fingerprints, strict=True)}
    assert sorted(rows[row.tobytes()] for row in judged[0]) == expected
    assert not test & {rows[row.tobytes()] for row in judged[0]}


def test_the_score_is_the_oscr_of_the_naive_twin(shop):
    shop.register(noise=0.3)
    promote("digits", progress=False)
    shop.register()
    made = promote("digits", progress=False)
    items = open_items(shop.data)
    roles = training_roles(items, SPLIT, fractions=Fractions(0.5, 0.2, 0.1, 0.2), seed=0)
    chosen = items.select(roles.validation)
    for role, number in (("champion", 0), ("challenger", 1)):
        found = osml_plugin.OpenSetRecognizer.load(shop.folder / f"bundle-{number}").predict(chosen.embeddings)
        known = np.isin(chosen.labels, SPLIT.known)
        right = np.array(found.nearest) == np.array(chosen.labels)
        # Over pairs of a known and an unknown item: the known one right and less unknown; ties count half.
        pairs = found.scores[known][:, None], found.scores[~known][None]
        wins = (pairs[0] < pairs[1]) + 0.5 * (pairs[0] == pairs[1])
        assert made.scores[role] == pytest.approx((wins * right[known][:, None]).mean())
        assert made.scores[role] <= roc_auc_score(~known, found.scores) + 1e-9
    assert made.n_items == len(chosen)


def test_what_cannot_be_compared(shop):
    shop.register()
    promote("digits", progress=False)
    other = Split(known=("0", "1", "2", "3", "7"), pseudo_unknown=("5", "6"))
    shop.register(split=other)
    for reason, change in [
        ("only one of them knows '4', '7'", {}),
        ("no items", {"change": lambda r, items: r.details.update(validation_items=[])}),
        ("only known items", {"change": _without("5", "6")}),
        ("only unknown items", {"change": _without(*SPLIT.known)}),
        ("does not name its validation items", {"change": lambda r, items: r.details.pop("validation_items")}),
    ]:
        if change:
            shop.register(**change)
        with pytest.raises(OsmlError, match=reason) as caught:
            promote("digits", progress=False)
        assert "--force" in str(caught.value) and "\n" not in str(caught.value)
    shop.register(tags={})
    with pytest.raises(OsmlError, match="--data"):
        promote("digits", progress=False)
    assert not promote("digits", data=shop.data, progress=False).promoted
    narrow = shop.folder / "narrow.npz"
    items = open_items(shop.data)
    write_embeddings(narrow, items.embeddings[:, :10], items.labels)
    with pytest.raises(OsmlError, match="no items"):  # other vectors are other items
        promote("digits", data=narrow, progress=False)
    with pytest.raises(OsmlError, match="no file or folder"):
        promote("digits", data=shop.folder / "nowhere", progress=False)
    assert shop.champion() == 1
    assert promote("digits", force=True).promoted


def _without(*names):
    """Drop the items of these classes from a recognizer's validation items."""

    def change(recognizer, items):
        drop = set(items.fingerprints()[np.isin(items.labels, names)].tolist())
        left = [f for f in recognizer.details["validation_items"] if f not in drop]
        recognizer.details = recognizer.details | {"validation_items": left}

    return change


def test_a_whole_history(shop):
    with pytest.raises(OsmlError, match="no model is registered"):
        promote("digits")
    with pytest.raises(OsmlError, match="no model is registered"):
        rollback("digits")
    shop.register()
    with pytest.raises(OsmlError, match="no champion and none before it"):
        rollback("digits")
    with pytest.raises(OsmlError, match="did you mean 'digits'"):
        rollback("digit")
    with pytest.raises(OsmlError, match="no version 9; it has 1"):
        promote("digits", version=9)
    for _ in range(3):
        shop.register()
    for version in (1, 2, 3, 4):
        assert promote("digits", version=version, force=True).promoted
    client = MlflowClient()
    assert client.get_registered_model("digits").tags["osml.champions"] == "[1, 2, 3]"
    client.delete_model_version("digits", "3")
    assert rollback("digits") == 2 == shop.champion()
    # A promotion that stopped half-way: the list is longer, the alias is not yet moved.
    client.set_registered_model_tag("digits", "osml.champions", "[1, 2]")
    assert rollback("digits") == 1 == shop.champion()
    client.delete_registered_model_alias("digits", "challenger")
    with pytest.raises(OsmlError, match="no alias 'challenger'; it has champion"):
        promote("digits")
