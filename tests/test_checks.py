"""Embeddings in every form that people hold them: taken alike, or refused in one line, at every door."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osml_plugin import OpenSetRecognizer, OsmlError, detectors, train
from osml_plugin.checks import LARGEST, SMALLEST, check_embeddings, check_references
from osml_plugin.data import open_items, write_embeddings
from osml_plugin.discovery import discover
from osml_plugin.jacobian import jacobian_norm

DRAW = np.random.default_rng(0)
LABELS = np.repeat([0, 1, 2], 40)
# Quarters, which half precision holds as well.
ROWS = np.round(4 * (DRAW.normal(size=(120, 4)) + 6 * np.eye(3, 4)[LABELS])) / 4
FORMS = {
    "float64": ROWS,
    "float32": ROWS.astype("f4"),
    "float16": ROWS.astype("f2"),
    "long double": ROWS.astype(np.longdouble),
    "big endian": ROWS.astype(">f8"),
    "big endian half": ROWS.astype(">f2"),
    "Fortran order": np.asfortranarray(ROWS),
    "negative strides": np.ascontiguousarray(ROWS[::-1, ::-1])[::-1, ::-1],
    "every other": np.repeat(ROWS, 2, axis=1)[:, ::2],
    "masked nowhere": np.ma.masked_array(ROWS),
    "objects": ROWS.astype(object),
    "lists": ROWS.tolist(),
    "tuples": tuple(map(tuple, ROWS.tolist())),
    "list of arrays": list(ROWS),
    "list of tensors": list(torch.from_numpy(ROWS)),
    "array of arrays": pd.Series(list(ROWS)).to_numpy(),
    "DataFrame": pd.DataFrame(ROWS, index=np.arange(120)[::-1]),
    "DataFrame of mixed precision": pd.DataFrame(ROWS).astype({0: "float32"}),
    "nullable DataFrame": pd.DataFrame(ROWS).astype("Float64"),
    "Series of arrays": pd.Series(list(ROWS), index=np.arange(120)[::-1]),
    "tensor": torch.from_numpy(ROWS),
    "bfloat16": torch.from_numpy(np.round(ROWS)).bfloat16(),
    "transposed tensor": torch.from_numpy(np.ascontiguousarray(ROWS.T)).T,
    "with gradient": torch.from_numpy(ROWS).requires_grad_(),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_taken_alike_in_fit_and_predict(form):
    given = FORMS[form]
    rows = np.round(ROWS) if form == "bfloat16" else ROWS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked = check_embeddings(given)
        found = OpenSetRecognizer("knn").fit(given, LABELS).predict(given)
    assert checked.dtype == torch.float32
    np.testing.assert_array_equal(checked.numpy(), rows.astype("f4"))
    expected = OpenSetRecognizer("knn").fit(rows, LABELS).predict(rows)
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.scores, expected.scores)


def test_a_read_only_array_is_taken_and_left_as_it_is():
    rows = ROWS.astype("f4")
    rows.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked = check_embeddings(rows)
    checked += 1
    np.testing.assert_array_equal(rows, ROWS.astype("f4"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (ROWS.astype(int), "must be floating point; got torch.int64: convert"),
        (ROWS > 0, "must be floating point; got torch.bool"),
        (ROWS + 1j, "must be floating point; got torch.complex128"),
        (ROWS.astype(str), "must be numbers .*; got <U"),
        (np.where(ROWS > 6, "x", ROWS.astype(object)), r"must be floating point; got str \(x\) in row"),
        (np.where(ROWS > 6, None, ROWS.astype(object)), "got NoneType"),
        (np.where(ROWS > 6, True, ROWS.astype(object)), r"got bool \(True\) in row"),
        (pd.DataFrame(ROWS).astype("Float64").mask(ROWS > 6), "in row|hold NaN"),
        (np.ma.masked_greater(ROWS, 6), "masked values"),
        (scipy.sparse.csr_matrix(ROWS), r"sparse: pass toarray\(\)"),
        (torch.from_numpy(ROWS).to_sparse(), r"sparse: pass to_dense\(\)"),
        ([[1.0, 2.0], [3.0]], r"must be numbers of shape \(items, width\)"),
        ([torch.zeros(2), torch.zeros(3)], r"must be numbers of shape \(items, width\)"),
        (pd.Series([np.zeros(2), np.zeros(3)]), r"must be numbers of shape \(items, width\)"),
        (ROWS[0], r"must be of shape \(items, width\); got \(4,\)"),
        (ROWS[None], r"got \(1, 120, 4\)"),
        ([], r"got \(0,\)"),
        (np.zeros((3, 0)), r"got \(3, 0\)"),
        (np.where(ROWS > 6, np.nan, ROWS), "of 120 embeddings hold NaN or infinity, the first in row"),
        (np.where(ROWS > 6, -np.inf, ROWS), "of 120 embeddings hold NaN or infinity, the first in row"),
        (ROWS * 1e300, "120 of 120 embeddings hold numbers beyond 1e.15, the first in row 0"),
        (np.where(np.arange(120)[:, None] == 7, -2 * LARGEST, ROWS), "1 of 120 .* beyond 1e.15, the first in row 7"),
    ],
)
def test_everything_else_is_refused_in_one_line(values, message):
    fitted = OpenSetRecognizer("knn").fit(ROWS, LABELS)
    for take in (check_embeddings, lambda v: OpenSetRecognizer("knn").fit(v, LABELS), fitted.detector.score):
        with pytest.raises(OsmlError, match=message) as error:
            take(values)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", detectors.names())
@pytest.mark.parametrize("scale", [LARGEST / 16, 1e-11])
def test_detectors_give_numbers_at_both_ends_of_the_range(name, scale):
    detector = detectors.create(name)
    weights = torch.eye(3, 4) if detector.needs_class_weights else None
    classes, scores = detector.fit(ROWS * scale, LABELS, weights).predict(ROWS * scale)
    assert torch.isfinite(scores).all()
    if weights is None and name != "norm":  # the class by logits or by length alone is another one
        assert (classes.numpy() == LABELS).mean() > 0.9


@given(st.floats(-10, 13))
@settings(max_examples=20, deadline=None)
def test_distances_and_decisions_do_not_depend_on_the_unit(exponent):
    unit = 10.0**exponent
    plain, scaled = OpenSetRecognizer("knn").fit(ROWS, LABELS), OpenSetRecognizer("knn").fit(ROWS * unit, LABELS)
    far = np.concatenate([ROWS, ROWS + 30])
    expected, found = plain.predict(far), scaled.predict(far * unit)
    np.testing.assert_allclose(found.scores / unit, expected.scores, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("unit", [1e17, 1e18, 1e19, 1e30, 1e38, 1e200])
def test_what_float32_cannot_square_is_refused_at_every_door(unit, tmp_path):
    huge, fitted = ROWS * unit, OpenSetRecognizer("knn").fit(ROWS, LABELS)
    classifier = detectors.create("knn").fit(ROWS, LABELS)
    np.savez(tmp_path / "e.npz", embeddings=huge, labels=LABELS)
    doors = {
        "fit": lambda: OpenSetRecognizer("knn").fit(huge, LABELS),
        "calibration": lambda: OpenSetRecognizer("knn").fit(ROWS, LABELS, calibration=(huge, LABELS)),
        "validation": lambda: OpenSetRecognizer("knn").fit(ROWS, LABELS, validation=(huge, LABELS)),
        "predict": lambda: fitted.predict(huge),
        "enroll": lambda: fitted.enroll("new", huge[:3]),
        "discover": lambda: fitted.discover(huge),
        "detector, fit": lambda: detectors.create("knn").fit(huge, LABELS),
        "detector, score": lambda: classifier.score(huge),
        "detector, partial_fit": lambda: detectors.create("centroid").fit(ROWS, LABELS).partial_fit(huge, LABELS),
        "class weights": lambda: detectors.create("msp").fit(ROWS, LABELS, torch.full((3, 4), float(np.float32(1e17)))),
        "discovery": lambda: discover(huge),
        "discovery, known": lambda: discover(ROWS, known_embeddings=huge, known_labels=LABELS),
        "read": lambda: open_items(tmp_path / "e.npz"),
        "write": lambda: write_embeddings(tmp_path / "new.npz", huge, LABELS),
        "jacobian": lambda: jacobian_norm(torch.nn.Linear(4, 2).double(), torch.from_numpy(huge)),
    }
    for door, enter in doors.items():
        with pytest.raises(OsmlError, match=r"beyond 1e\+15") as error:
            enter()
        assert "\n" not in str(error.value), door
    assert fitted.class_names == ["0", "1", "2"] and not (tmp_path / "new.npz").exists()


@pytest.mark.parametrize("unit", [1e-14, 1e-30, 1e-45, 1e-60, 1e-300])
def test_references_that_vanish_when_squared_are_refused(unit):
    for fit in (OpenSetRecognizer("knn").fit, detectors.create("knn").fit, lambda e, _: check_references(e)):
        with pytest.raises(OsmlError, match="float32 cannot square them; multiply all by one number"):
            fit(ROWS * unit, LABELS)
    # Items are measured by references that do not vanish: they are near zero, which is an answer.
    fitted = OpenSetRecognizer("centroid").fit(ROWS, LABELS)
    assert np.isfinite(fitted.predict(ROWS * unit).scores).all()


def test_training_refuses_them_before_unit_norm_hides_them(tmp_path):
    labels = np.repeat(["a", "b"], 20)
    rows = np.random.default_rng(0).normal(size=(40, 4)) + 9 * (labels == "a")[:, None]
    write_embeddings(tmp_path / "e.npz", 1e-20 * rows, labels)
    with pytest.raises(OsmlError, match="float32 cannot square them"):
        train(tmp_path / "e.npz", tmp_path / "bundle", n_known=2, progress=False)
    assert not (tmp_path / "bundle").exists()


def test_zeros_are_references_like_others():
    rows = np.concatenate([np.zeros((1, 4)), np.full((1, 4), SMALLEST)])
    assert check_references(rows).shape == (2, 4) and check_references(np.zeros((2, 4))).shape == (2, 4)
    assert check_embeddings(np.zeros((0, 4))).shape == (0, 4)
