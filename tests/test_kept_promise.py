"""Forgetting, and other rates, never turn rejection off: the last threshold that could be promised stays, and is told."""

from __future__ import annotations

import math

import numpy as np
import pytest
from conftest import sphere_classes
from serving import served

from osml_plugin import UNKNOWN, OpenSetRecognizer, OsmlError
from osml_plugin.serve.live import learned
from osml_plugin.serve.service import Service
from osml_plugin.serve.settings import ServeConfig

EMBEDDINGS, LABELS, _ = sphere_classes(n_classes=8, per_class=40, spread=0.12)
NAMES = np.array([f"c{i}" for i in range(8)])[LABELS.numpy()]
KNOWN = LABELS.numpy() < 6
NEVER_MET = EMBEDDINGS[LABELS >= 6]


def fitted(**how) -> OpenSetRecognizer:
    """Six classes, each of eight calibration items: at 5 %, 19 are needed, which three classes have."""
    held = np.arange(len(NAMES)) % 5 == 0
    calibration = EMBEDDINGS[KNOWN & held], NAMES[KNOWN & held]
    return OpenSetRecognizer(**how).fit(EMBEDDINGS[KNOWN & ~held], NAMES[KNOWN & ~held], calibration=calibration)


def rejects(recognizer: OpenSetRecognizer) -> bool:
    return (recognizer.predict(NEVER_MET).labels == UNKNOWN).mean() > 0.8


@pytest.mark.parametrize("how", [{}, {"detector": "mahalanobis"}, {"threshold": "class_conformal"}])
def test_the_last_threshold_that_could_be_promised_stays(how, tmp_path):
    recognizer = fitted(**how)
    for name in ("c0", "c1", "c2"):
        recognizer.forget(name)
    assert recognizer.n_left is None and len(recognizer.calibration_scores) == 24
    tau = recognizer.threshold.tau
    recognizer.forget("c3")
    assert recognizer.n_left == 16 and recognizer.threshold.tau == tau and rejects(recognizer)
    text = str(recognizer.guarantee)
    assert "at most 5.0%" in text and "16 of these items are left, and 19 are needed" in text

    # What is enrolled beside it gets a τ of its own, never below the one that stays; p-values agree with τ.
    recognizer.enroll("new", NEVER_MET[:30])
    answer = recognizer.predict(EMBEDDINGS)
    assert recognizer.threshold.tau == tau <= min(recognizer.threshold.taus.values())
    assert np.isfinite(answer.thresholds).all()
    assert np.array_equal(answer.labels == UNKNOWN, answer.p_values <= 0.05)

    recognizer.save(tmp_path / "bundle")
    loaded = OpenSetRecognizer.load(tmp_path / "bundle")
    assert loaded.threshold.state() == recognizer.threshold.state() and loaded.n_left == 16
    assert str(loaded.guarantee) == str(recognizer.guarantee)
    assert np.array_equal(loaded.predict(EMBEDDINGS).p_values, answer.p_values)

    # A rate that those which are left can promise is one of today again.
    assert recognizer.keep_rate(0.1).n_left is None and rejects(recognizer.forget("new"))
    with pytest.raises(OsmlError, match="at 1.0% at least 99 calibration items are needed, and there are 16"):
        recognizer.keep_rate(0.01)
    assert recognizer.alpha == recognizer.kept_rate == 0.1 and rejects(recognizer)


def test_few_enrolled_examples_are_not_all_that_a_threshold_is_made_of():
    recognizer = fitted()
    sixes, sevens = EMBEDDINGS[LABELS == 6], EMBEDDINGS[LABELS == 7]
    recognizer.enroll("c6", sixes[:5]).enroll("c7", sevens[:5])
    tau = recognizer.threshold.tau
    for c in range(6):
        recognizer.forget(f"c{c}")
    assert recognizer.n_left == 0 and math.isfinite(tau) and math.isfinite(recognizer.threshold.tau)
    known = recognizer.predict(EMBEDDINGS[KNOWN])
    assert (known.labels == UNKNOWN).mean() > 0.8
    # Enough of them take over.
    recognizer.enroll("c6", sixes[5:]).enroll("c7", sevens[5:])
    assert recognizer.n_left is None and recognizer.guarantee is None and math.isfinite(recognizer.threshold.tau)


def test_fitted_again_it_keeps_nothing_from_before():
    few = EMBEDDINGS[KNOWN][:30]
    recognizer = fitted().fit(few, [f"d{i % 2}" for i in range(30)])
    assert math.isinf(recognizer.threshold.tau) and not recognizer.guarantee.possible
    assert math.isinf(recognizer.enroll("d2", few[:3]).forget("d2").threshold.tau)  # it was off before, and told


def test_the_command_says_what_stays(osml, tmp_path):
    recognizer = fitted()
    recognizer.save(tmp_path / "bundle")
    for name in ("c0", "c1", "c2"):
        assert "are left" not in osml("forget", tmp_path / "bundle", "--name", name)[1]
    status, out, _ = osml("forget", tmp_path / "bundle", "--name", "c3")
    assert status == 0 and "16 of these items are left, and 19 are needed" in out
    assert rejects(OpenSetRecognizer.load(tmp_path / "bundle"))


def test_the_endpoint_says_what_stays(tmp_path):
    fitted().save(tmp_path / "bundle")
    config = ServeConfig(model=str(tmp_path / "bundle"), home=tmp_path / "home", host="127.0.0.1")
    with served(config) as (_, client):
        http = client._http
        tau = client.model().threshold
        for name in ("c0", "c1", "c2"):
            assert client.forget(name).warnings == []
        assert http.get("/readyz").json()["rejection"] == client.model().rejection == "on"
        assert "16 of these items are left" in client.forget("c3").warnings[0]
        ready, model = http.get("/readyz").json(), client.model()
        assert ready["rejection"] == model.rejection == "kept" and ready["warnings"] == model.warnings
        assert "16 of these items are left" in model.guarantee
        # That of the bundle: whichever replica asks, and in whatever order classes went.
        assert model.threshold == tau == Service(config).live.snapshot.recognizer.threshold.tau
        found = client.recognize(embeddings=NEVER_MET[::2].numpy(), remember=False).results
        assert sum(result.known for result in found) <= 8
        client.set_alpha(0.1)
        assert http.get("/readyz").json()["rejection"] == "on"
    recognizer = learned(config.home)
    assert rejects(recognizer)
    recognizer.save(tmp_path / "learned")
    assert rejects(OpenSetRecognizer.load(tmp_path / "learned"))

    # A configuration that asks for what nothing can promise is told so, and rejects as before.
    with served(config.model_copy(update={"alpha": 0.001})) as (_, client):
        ready = client._http.get("/readyz").json()
        assert ready["rejection"] in ("on", "kept") and "0.001 was asked for" in " ".join(ready["warnings"])
        assert client.model().alpha == 0.05 and math.isfinite(client.model().threshold)


def test_an_endpoint_that_never_could_reject_says_so(tmp_path):
    fitted(alpha=0.01).save(tmp_path / "bundle")
    with served(ServeConfig(model=str(tmp_path / "bundle"), home=tmp_path / "home")) as (_, client):
        ready = client._http.get("/readyz").json()
    assert ready["rejection"] == "off" and "at least 99 calibration items are needed" in ready["warnings"][0]
