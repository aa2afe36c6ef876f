"""Labels keep their ids, or are refused in one line."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osml_plugin import OpenSetRecognizer
from osml_plugin.errors import OsmlError
from osml_plugin.labels import class_ids, read_labels

WHOLE = [3, 10, 0, 3]


@pytest.mark.parametrize(
    "labels",
    [
        WHOLE,
        tuple(WHOLE),
        iter(WHOLE),
        [np.int8(v) for v in WHOLE],
        [torch.tensor(v) for v in WHOLE],
        *(np.array(WHOLE, dtype) for dtype in ("u1", "i2", ">i4", "<i8", "u8", "O")),
        np.repeat(WHOLE, 2)[::2],
        np.array(WHOLE[::-1])[::-1],
        *(torch.tensor(WHOLE, dtype=dtype) for dtype in (torch.uint8, torch.int32, torch.int64)),
        pd.Series(WHOLE, index=[7, 7, 1, 2]),
        pd.Series(WHOLE, dtype="Int64"),
        pd.Series(WHOLE, dtype="category"),
        pd.Categorical(WHOLE),
        pd.Index(WHOLE),
        pd.array(WHOLE, dtype="UInt8"),
    ],
    ids=lambda labels: f"{type(labels).__name__}-{getattr(labels, 'dtype', '')}",
)
def test_integers_of_any_type_keep_their_ids(labels):
    read = read_labels(labels, 4)
    assert read == WHOLE and all(type(label) is int for label in read)
    assert class_ids(read) == {"0": 0, "3": 3, "10": 10}


@pytest.mark.parametrize("of", [list, np.array, pd.Series, pd.Categorical, lambda v: pd.Series(v, dtype="string")])
def test_names_are_numbered_in_their_order(of):
    read = read_labels(of(["owl", "ant", "owl"]), 3)
    assert read == ["owl", "ant", "owl"] and class_ids(read) == {"ant": 0, "owl": 1}


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.array([0.0, 1.0]), r"hold 0.0 in row 0; expected integers or names, whole numbers .*astype\(int\)"),
        (torch.tensor([0.0, 1.0]), "hold 0.0 in row 0"),
        (np.array([0.5, 1.0]), "hold 0.5 in row 0; .*one kind"),
        ([0, 1.0], "hold 1.0 in row 1"),
        ([True, False], "hold True in row 0"),
        (np.array([[0], [1]]), r"shape \(2, 1\); expected \(2,\), .*ravel"),
        (np.eye(2), r"shape \(2, 2\); expected \(2,\), .*argmax"),
        (torch.eye(2).long(), r"shape \(2, 2\)"),
        ([[0], [1]], r"shape \(2, 1\)"),
        (pd.DataFrame({"y": [0, 1]}), r"shape \(2, 1\); .*one column of them"),
        (np.array(3), r"shape \(\)"),
        (3, "are 3; expected a list"),
        ("ab", "of type str"),
        ({0, 1}, "of type set"),
        ({"a": 0}, "of type dict"),
        ([0, None], "hold None in row 1; .*none missing"),
        ([0, float("nan")], "hold nan in row 1; .*none missing"),
        (pd.Series([0, None], dtype="Int64"), "hold <NA> in row 1; .*none missing"),
        (["a", None], "hold None in row 1; .*none missing"),
        (pd.Series(["a", None]), "none missing"),
        ([0, "a"], "integers and names"),
        ([b"a", b"b"], "hold b'a' in row 0"),
        ([0, -1], "hold -1: classes are numbered"),
        ([0, 2**63], "hold 9223372036854775808"),
        (["a", "-1"], "cannot be named '-1'"),
        (["a", ""], "expected some text"),
        (["a", " k"], "blanks"),
        (["a", "\ud800"], "UTF-8"),
        (["a", "b\x07"], "control"),
        ([0], "1 labels for 2 embeddings"),
        ([0, 1, 2], "3 labels for 2 embeddings"),
    ],
    ids=repr,
)
def test_what_could_be_read_in_two_ways_is_refused_in_one_line(labels, said):
    with pytest.raises(OsmlError, match=said) as refused:
        read_labels(labels, 2)
    assert "\n" not in str(refused.value)


class WithShape(list):
    """A column as some libraries of data frames have it: with a shape, and no `tolist`."""

    shape = (4,)


def test_a_column_without_tolist_is_read():
    assert read_labels(WithShape(WHOLE), 4) == WHOLE


def test_labels_that_can_be_read_once_are_read_once():
    items = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    recognizer = OpenSetRecognizer().fit(items, (i % 3 + 4 for i in range(60)))
    assert recognizer.class_names == ["4", "5", "6"]


def test_after_the_last_number_no_class_can_be_enrolled():
    items = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    recognizer = OpenSetRecognizer().fit(items, np.arange(60) % 2 * (2**63 - 1))
    with pytest.raises(OsmlError, match="gets no number: one class has the last"):
        recognizer.enroll("new", items[:1] + 9)
    assert recognizer.class_names == ["0", str(2**63 - 1)]


def test_a_name_in_two_unicode_forms_is_one_class():
    assert set(read_labels(["K\u00e4fer", "Ka\u0308fer", "Fuchs"], 3)) == {"K\u00e4fer", "Fuchs"}


@given(st.lists(st.one_of(st.integers(), st.floats(), st.text(), st.none(), st.booleans(), st.binary()), max_size=5))
def test_anything_else_is_an_osml_error_or_read_whole(labels):
    try:
        read = read_labels(labels, len(labels))
    except OsmlError as error:
        assert "\n" not in str(error)
    else:
        assert len(read) == len(labels) and len({type(v) for v in read}) <= 1
