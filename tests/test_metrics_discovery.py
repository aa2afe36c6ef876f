from __future__ import annotations

import doctest
import json
from collections import Counter
from itertools import permutations
from math import log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import pair_confusion_matrix

from osml_plugin.errors import OsmlError
from osml_plugin.metrics import discovery, discovery_metrics

FEW = settings(deadline=None, max_examples=100)
NAMES = ["ant", "bee", "cat", "dog"]
GROUPS = [0, 1, 5, 2**62]


def groupings(left_out=True):
    found = st.sampled_from([-1, *GROUPS] if left_out else GROUPS)
    pairs = st.lists(st.tuples(st.sampled_from(NAMES), found), min_size=1, max_size=25)
    return pairs.map(lambda rows: tuple(map(list, zip(*rows, strict=True))))


# The slow twins: every pairing of classes, every pair of items.


def naive_accuracy(true, found):
    classes, groups = sorted(set(true)), sorted(set(found) - {-1})
    groups += [None] * len(classes)  # a class may stay without a group
    best = max(
        sum(t == c and f == g for t, f in zip(true, found, strict=True) for c, g in zip(classes, chosen, strict=True))
        for chosen in set(permutations(groups, len(classes)))
    )
    return best / len(true)


def alone(found):
    """Each left-out item as a group of its own."""
    return [("left out", i) if f == -1 else ("found", f) for i, f in enumerate(found)]


def naive_bcubed(true, found):
    groups, n = alone(found), len(true)
    precision = recall = 0.0
    for i in range(n):
        group = [j for j in range(n) if groups[j] == groups[i]]
        same_class = [j for j in range(n) if true[j] == true[i]]
        both = len(set(group) & set(same_class))
        precision += both / len(group) / n
        recall += both / len(same_class) / n
    return precision, recall


def naive_nmi(true, found):
    groups, n = alone(found), len(true)

    def entropy(values):
        return -sum(count / n * log(count / n) for count in Counter(values).values())

    h_true, h_found, h_both = entropy(true), entropy(groups), entropy(list(zip(true, groups, strict=True)))
    return 1.0 if h_true == h_found == 0 else (h_true + h_found - h_both) / ((h_true + h_found) / 2)


def naive_ari(true, found):
    groups, n = alone(found), len(true)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    in_class, in_group = ({p for p in pairs if v[p[0]] == v[p[1]]} for v in (true, groups))
    expected = len(in_class) * len(in_group) / len(pairs) if pairs else 0
    highest = (len(in_class) + len(in_group)) / 2
    return 1.0 if highest == expected else (len(in_class & in_group) - expected) / (highest - expected)


def naive_pairs(true, found):
    groups, n = alone(found), len(true)
    pairs = [(i, j) for i in range(n) for j in range(i)]
    in_class, in_group = ({p for p in pairs if v[p[0]] == v[p[1]]} for v in (true, groups))
    both, all_ = len(in_class & in_group), len(in_class) + len(in_group)
    return (
        both / len(in_group) if in_group else 1,
        both / len(in_class) if in_class else 1,
        2 * both / all_ if all_ else 1,
    )


@FEW
@given(groupings())
def test_the_pair_measures_are_their_slow_twins(grouping):
    metrics = discovery_metrics(*grouping)
    assert (metrics.pair_precision, metrics.pair_recall, metrics.pair_f1) == naive_pairs(*grouping)
    n_true, n_found = len(set(grouping[0])), len(set(grouping[1]) - {-1})
    assert metrics.n_classes_error == abs(n_true - n_found) / n_true


@FEW
@given(groupings(left_out=False))
def test_the_pair_measures_are_those_of_scikit_learns_pair_counts(grouping):
    (_, wrong), (torn, right) = pair_confusion_matrix(*grouping)
    metrics = discovery_metrics(*grouping)
    if right + wrong:
        assert metrics.pair_precision == pytest.approx(right / (right + wrong))
    if right + torn:
        assert metrics.pair_recall == pytest.approx(right / (right + torn))


@FEW
@given(groupings(), st.sets(st.sampled_from(NAMES)))
def test_old_and_new_accuracy_are_parts_of_the_one_accuracy(grouping, old_names):
    true, found = grouping
    is_old = np.array([name in old_names for name in true])
    metrics = discovery_metrics(true, found, is_old)
    parts = [
        (metrics.accuracy_old or 0.0) * is_old.sum(),
        (metrics.accuracy_new or 0.0) * (~is_old).sum(),
    ]
    assert sum(parts) == pytest.approx(metrics.accuracy * len(true))
    assert (metrics.accuracy_old is None) == (not is_old.any())
    assert (metrics.accuracy_new is None) == is_old.all()
    # The pairing of v1, each part by itself, is never worse: that is why its figures flatter.
    for part, figure in ((is_old, metrics.accuracy_old), (~is_old, metrics.accuracy_new)):
        if part.any():
            chosen = np.flatnonzero(part)
            by_itself = naive_accuracy([true[i] for i in chosen], [found[i] for i in chosen])
            assert figure <= by_itself + 1e-12


def test_one_pairing_for_old_and_new_where_pairing_each_by_itself_would_flatter():
    true, found = ["old"] * 3 + ["new"] * 2, [0] * 5
    metrics = discovery_metrics(true, found, [True] * 3 + [False] * 2)
    assert (metrics.accuracy, metrics.accuracy_old, metrics.accuracy_new) == (0.6, 1.0, 0.0)


@FEW
@given(groupings())
def test_every_metric_is_its_slow_twin(grouping):
    true, found = grouping
    metrics = discovery_metrics(true, found)
    assert metrics.accuracy == naive_accuracy(true, found)
    precision, recall = naive_bcubed(true, found)
    assert metrics.bcubed_precision == pytest.approx(precision)
    assert metrics.bcubed_recall == pytest.approx(recall)
    assert metrics.bcubed_f1 == pytest.approx(2 / (1 / precision + 1 / recall))
    assert metrics.nmi == pytest.approx(naive_nmi(true, found), abs=1e-9)
    assert metrics.ari == pytest.approx(naive_ari(true, found), abs=1e-12)
    assert metrics.n_classes_true == len(set(true))
    assert metrics.n_classes_found == len(set(found) - {-1})


@FEW
@given(groupings(left_out=False))
def test_as_scikit_learn_where_nothing_is_left_out(grouping):
    metrics = discovery_metrics(*grouping)
    assert metrics.nmi == pytest.approx(normalized_mutual_info_score(*grouping), abs=1e-12)
    assert metrics.ari == pytest.approx(adjusted_rand_score(*grouping), abs=1e-12)


@FEW
@given(groupings(), st.permutations(NAMES), st.permutations(GROUPS), st.randoms(use_true_random=False))
def test_names_and_order_change_nothing(grouping, names, groups, random):
    true, found = grouping
    rename = dict(zip(NAMES, names, strict=True))
    regroup = dict(zip(GROUPS, groups, strict=True)) | {-1: -1}
    order = random.sample(range(len(true)), len(true))
    changed = discovery_metrics([rename[true[i]] for i in order], [regroup[found[i]] for i in order])
    assert changed.to_dict() == pytest.approx(discovery_metrics(true, found).to_dict(), abs=1e-9)


@FEW
@given(groupings(left_out=False))
def test_every_item_twice_changes_neither_accuracy_nor_bcubed_nor_nmi(grouping):
    true, found = grouping
    once, twice = discovery_metrics(true, found).to_dict(), discovery_metrics(true * 2, found * 2).to_dict()
    for name in ("ari", "pair_precision", "pair_recall", "pair_f1"):
        del once[name], twice[name]  # these count pairs, and so depend on the number of items
    assert twice == pytest.approx(once, abs=1e-9)


@FEW
@given(groupings())
def test_leaving_an_item_out_never_raises_accuracy_and_never_raises_bcubed_recall(grouping):
    true, found = grouping
    full, less = discovery_metrics(true, found), discovery_metrics(true, [-1, *found[1:]])
    assert less.accuracy <= full.accuracy
    assert less.bcubed_recall <= full.bcubed_recall + 1e-12


@FEW
@given(groupings())
def test_the_dictionary_is_plain_json(grouping):
    metrics = discovery_metrics(*grouping).to_dict()
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_the_true_grouping_is_perfect_under_any_names():
    metrics = discovery_metrics(["a", "b", "b", "c"], [9, 4, 4, 0])
    assert metrics.n_classes_error == 0
    assert set(metrics.to_dict().values()) == {1.0, 3, 0.0}
    assert "accuracy_old" not in metrics.to_dict()  # no one said which classes are old


def test_more_groups_than_classes_can_match_one_each_only():
    # Fragments of one class: the largest counts, as in GCD's accuracy "v2".
    assert discovery_metrics([0] * 6, [0, 0, 0, 1, 1, 2]).accuracy == 0.5


def test_everything_left_out():
    metrics = discovery_metrics([0, 0, 1], [-1, -1, -1])
    assert (metrics.accuracy, metrics.n_classes_found, metrics.bcubed_precision) == (0, 0, 1)
    assert metrics.bcubed_recall == pytest.approx(2 / 3)


def test_strings_integers_tensors_and_object_arrays_are_the_same():
    numbers, found = [3, 3, 0, 8, 0], [1, 1, 2, -1, 1]
    expected = discovery_metrics(numbers, found)
    names = [f"class {number}" for number in numbers]
    for true in (names, np.array(names), np.array(names, dtype=object), np.array(numbers, np.uint8)):
        assert discovery_metrics(true, found) == expected
    assert discovery_metrics(torch.tensor(numbers), torch.tensor(found, dtype=torch.int32)) == expected


def test_many_items():
    rng = np.random.default_rng(0)
    true = rng.integers(0, 40, 50_000)
    found = np.where(rng.random(50_000) < 0.9, (true + 7) % 40, -1)
    metrics = discovery_metrics(true, found)
    assert metrics.accuracy == np.mean(found >= 0)
    assert metrics.bcubed_precision == pytest.approx(1)


@pytest.mark.parametrize(
    ("true", "found", "message"),
    [
        ([0, 1], [0], "lengths differ: labels_true 2, labels_found 1"),
        ([], [], "labels_true is empty"),
        ([0, 1], [], "labels_found is empty"),
        ([[0], [1]], [0, 1], r"labels_true .* shape \(2, 1\)"),
        ([0, 1], [0.0, 1.0], "labels_found must be integers, not float64"),
        ([0, 1], [0, -2], "labels_found must be at least -1, but has -2"),
        ([0, -1], [0, 1], "labels_true must be at least 0, but has -1"),
        ([0.5, 1.0], [0, 1], "labels_true must be integers, not float64"),
        (["a", None], [0, 1], "labels_true must be integers, not object"),
    ],
)
def test_bad_input_is_refused_in_one_line(true, found, message):
    with pytest.raises(OsmlError, match=message) as raised:
        discovery_metrics(true, found)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("is_old", "message"),
    [([True], "lengths differ: labels_true 2, is_old 1"), ([0, 1], "is_old must be bool, not int64")],
)
def test_a_bad_is_old_is_refused(is_old, message):
    with pytest.raises(OsmlError, match=message):
        discovery_metrics([0, 1], [0, 1], is_old)


def test_the_example_in_the_docstring():
    assert doctest.testmod(discovery) == (0, 1)
