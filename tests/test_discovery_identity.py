"""Ids and names from run to run: what is carried over, split, merged, new and gone; and new items that join."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix

from osml_plugin import OsmlError
from osml_plugin.discovery.graph import neighbor_graph
from osml_plugin.discovery.identity import Identities, Update, identify, join


def of(*sizes_of: tuple[int, int]) -> tuple[list[str], np.ndarray]:
    """Keys and groups of so many items (size, group) one after another."""
    groups = np.concatenate([np.full(size, group) for size, group in sizes_of])
    return [f"{i}.png" for i in range(len(groups))], groups


def after(old: list[tuple[int, int]], new: list[tuple[int, int]], names: dict[int, str] | None = None) -> Update:
    """The second run, over the same items."""
    keys, groups = of(*old)
    first = identify(Identities(), keys, groups).identities
    for group, name in (names or {}).items():
        first = first.named(group, name)
    keys, groups = of(*new)
    return identify(first, keys, groups)


# What becomes of groups ------------------------------------------------------------------------------------


def test_the_first_run_numbers_the_groups():
    keys, groups = of((5, 1), (3, 0), (2, -1), (4, 2))
    update = identify(Identities(), keys, groups)
    np.testing.assert_array_equal(update.ids, [0, 1, 2])
    assert update.new == (0, 1, 2) and not update.splits and not update.merges and not update.gone
    assert update.identities.next_id == 3
    assert set(update.identities.of_item) == {key for key, group in zip(keys, groups, strict=True) if group >= 0}


def test_groups_keep_ids_and_names_whatever_their_numbers():
    update = after([(5, 0), (4, 1), (3, 2)], [(5, 2), (4, 0), (3, 1)], {1: "otter"})
    np.testing.assert_array_equal(update.ids, [1, 2, 0])
    assert update.identities.names == {1: "otter"} and update.identities.next_id == 3
    assert update.sentences() == []


def test_a_group_that_grows_is_the_same():
    keys, groups = of((5, 0), (5, 1))
    first = identify(Identities(), keys, groups).identities
    keys, groups = of((5, 0), (5, 1), (95, 0))
    assert identify(first, keys, groups).ids.tolist() == [0, 1]


def test_items_that_are_gone_or_left_out_do_not_count():
    keys, groups = of((10, 0), (10, 1))
    first = identify(Identities(), keys, groups).identities
    update = identify(first, keys[6:], np.repeat([1, -1, 0], [2, 4, 8]))
    np.testing.assert_array_equal(update.ids, [1, 0])


def test_a_split_keeps_the_id_where_most_of_it_is():
    update = after([(10, 0), (4, 1)], [(6, 0), (4, 2), (4, 1)], {0: "otter"})
    np.testing.assert_array_equal(update.ids, [0, 1, 2])
    assert update.splits == {0: (0, 2)} and update.new == ()
    assert update.sentences() == ["0 was split into 0 and 2"]
    assert update.identities.names == {0: "otter"}


def test_no_small_part_keeps_the_name_of_what_fell_apart():
    for parts in ([(4, 0), (3, 1), (3, 2)], [(5, 0), (5, 1)]):
        update = after([(10, 0)], parts, {0: "otter"})
        assert update.ids.tolist() == list(range(1, len(parts) + 1))
        assert update.identities.names == {}
        assert update.splits == {0: tuple(update.ids.tolist())}
    assert update.sentences() == ["0 was split into 1 and 2"]


def test_a_merger_keeps_the_id_of_the_largest():
    update = after([(4, 0), (6, 1), (3, 2)], [(13, 0)])
    assert update.ids.tolist() == [1] and update.merges == {1: (0, 1, 2)}
    assert update.sentences() == ["0 and 2 were merged into 1"]
    assert after([(4, 0), (6, 1)], [(10, 0)]).sentences() == ["0 was merged into 1"]


def test_of_equals_the_named_one_goes_first_then_the_lower_id():
    old, new = [(4, 0), (4, 1), (4, 2)], [(12, 0)]
    assert after(old, new).ids.tolist() == [0]
    assert after(old, new, {1: "otter"}).ids.tolist() == [1]
    assert after(old, new, {1: "otter", 2: "lynx"}).ids.tolist() == [1]


def test_a_small_class_does_not_rename_the_large_one_that_swallows_it():
    # 95 of the 300 items of group 1 come to the 5 of group 0.
    update = after([(5, 0), (300, 1)], [(100, 0), (205, 1)], {0: "otter", 1: "lynx"})
    assert update.ids.tolist() == [2, 1] and update.identities.names == {1: "lynx"}
    assert update.splits == {1: (1, 2)} and update.merges == {2: (0,)}
    assert update.sentences() == ["1 was split into 1 and 2", "0 was merged into 2"]


def test_part_of_a_group_may_become_another():
    update = after([(5, 0), (5, 1), (5, 2), (2, 3)], [(5, 0), (2, 1), (3, 2), (5, 2), (2, 3)])
    # Of group 1, two items are a group of their own, three went to 2: that is no split of 1 in two.
    assert update.ids.tolist() == [0, 4, 2, 3]
    assert update.splits == {1: (4,)} and update.merges == {2: (1, 2)}
    assert update.sentences() == ["part of 1 became 4", "1 was merged into 2"]


def test_strays_are_neither_a_split_nor_a_merger():
    update = after([(50, 0), (50, 1)], [(49, 0), (51, 1)])
    assert update.ids.tolist() == [0, 1] and update.sentences() == []


def test_ids_are_never_used_again():
    keys, groups = of((5, 0), (4, 1))
    first = identify(Identities(), keys, groups).identities.named(1, "otter")
    second = identify(first, keys[:5], groups[:5])
    assert second.gone == (1,) and second.sentences() == ["1 is gone"] and second.identities.names == {}
    third = identify(second.identities, keys, groups)
    assert third.ids.tolist() == [0, 2] and third.new == (2,) and third.sentences() == ["2 is new"]


def test_three_parts_are_listed_as_people_do():
    update = after([(10, 0)], [(6, 0), (2, 1), (2, 2)])
    assert update.sentences() == ["0 was split into 0, 1 and 2"]


# Against slow twins ----------------------------------------------------------------------------------------

RUNS = st.lists(st.tuples(st.integers(-1, 4), st.integers(-1, 4)), min_size=1, max_size=60)


def numbered(groups: list[int]) -> np.ndarray:
    """The same groups, 0 … G−1."""
    kept = np.unique([g for g in groups if g >= 0])
    return np.array([-1 if g < 0 else np.searchsorted(kept, g) for g in groups], dtype=np.int64)


@settings(deadline=None, max_examples=150)
@given(RUNS, st.sets(st.integers(0, 4)), st.integers(0, 9))
def test_the_best_assignment_of_those_allowed(runs, named, more):
    """What is carried over is the assignment of most common items (scipy's) among pairs of which one may be the other;
    splits and mergers are as they are defined."""
    keys = [str(i) for i in range(len(runs))]
    old, new = [a for a, _ in runs], numbered([b for _, b in runs])
    names = {i: str(i) for i in named if i in old}
    previous = Identities({k: i for k, i in zip(keys, old, strict=True) if i >= 0}, names, 5 + more)
    update = identify(previous, keys, new)

    olds, n_new = sorted({i for i in old if i >= 0}), new.max() + 1
    common = np.array(
        [[sum(a == i and b == g for a, b in zip(old, new, strict=True)) for g in range(n_new)] for i in olds]
    )
    common = common.reshape(len(olds), n_new)
    heir = 2 * common > common.sum(axis=1, keepdims=True)
    allowed = heir & (common == common.max(axis=0, initial=0))
    rows, columns = linear_sum_assignment(np.where(allowed, common, 0), maximize=True)
    best = common[rows, columns][allowed[rows, columns]].sum()
    carried = [(olds.index(i), g) for g, i in enumerate(update.ids) if i in olds]
    assert all(allowed[pair] for pair in carried)
    assert sum(common[pair] for pair in carried) == best
    for r, g in carried:  # of equals
        equals = [olds[q] for q in np.flatnonzero(allowed[:, g]) if common[q, g] == common[r, g]]
        assert olds[r] == min(equals, key=lambda i: (i not in names, i))

    ids = update.ids.tolist()
    assert len(set(ids)) == n_new
    fresh = [i for i in ids if i not in olds]
    assert fresh == list(range(5 + more, 5 + more + len(fresh))) and update.identities.next_id == 5 + more + len(fresh)
    assert update.identities.names == {i: names[i] for i in sorted(set(ids) & set(names))}
    assert update.identities.of_item == {k: ids[g] for k, g in zip(keys, new, strict=True) if g >= 0}

    merges = {ids[g]: tuple(olds[r] for r in np.flatnonzero(heir[:, g])) for g in range(n_new)}
    assert update.merges == {i: m for i, m in merges.items() if m and m != (i,)}
    size = np.bincount(new[new >= 0], minlength=n_new)
    splits = {
        i: tuple(sorted(ids[g] for g in range(n_new) if 2 * common[r, g] > size[g] or ids[g] == i))
        for r, i in enumerate(olds)
    }
    assert update.splits == {i: s for i, s in splits.items() if s and s != (i,)}
    told = {*update.merges, *(i for parts in update.splits.values() for i in parts)}
    assert set(update.new) == set(fresh) - told
    ended = {*update.splits, *(i for m in update.merges.values() for i in m)}
    assert set(update.gone) == set(olds) - set(ids) - ended


@settings(deadline=None, max_examples=50)
@given(RUNS, st.integers(0, 1000))
def test_neither_order_nor_numbers_matter_and_the_same_again_changes_nothing(runs, seed):
    rng = np.random.default_rng(seed)
    keys = [str(i) for i in range(len(runs))]
    first = identify(Identities(), keys, numbered([a for a, _ in runs])).identities
    new = numbered([b for _, b in runs])
    update = identify(first, keys, new)
    order = rng.permutation(len(keys))
    shuffled = identify(first, [keys[i] for i in order], new[order])
    assert shuffled.identities == update.identities and shuffled.sentences() == update.sentences()

    number = rng.permutation(new.max() + 1)
    renumbered = identify(first, keys, np.append(number, -1)[new])
    kept = update.ids < first.next_id
    np.testing.assert_array_equal(renumbered.ids[number][kept], update.ids[kept])
    again = identify(update.identities, keys, new)
    assert again.identities == update.identities and again.sentences() == []


def test_thousands_of_groups():
    rng = np.random.default_rng(0)
    keys = [str(i) for i in range(40_000)]
    groups = np.repeat(np.arange(4000), 10)
    first = identify(Identities(), keys, groups)
    stray = np.where(rng.random(len(keys)) < 0.1, rng.integers(0, 4000, len(keys)), groups)
    second = identify(first.identities, keys, stray[::-1][::-1])
    assert (second.ids == np.arange(4000)).mean() > 0.99


# The record ------------------------------------------------------------------------------------------------


def test_the_record_goes_through_json():
    update = after([(10, 0), (3, 1)], [(6, 0), (4, 2), (3, 1)], {0: "Otter ø"})
    state = json.loads(json.dumps(update.to_dict()))
    assert Identities.from_dict(state["identities"]) == update.identities
    assert state["ids"] == [0, 1, 2] and state["splits"] == [[0, [0, 2]]] and state["merges"] == []
    assert Identities.from_dict(json.loads(json.dumps(Identities().to_dict()))) == Identities()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no record of groups"),
        ({"items": {}, "names": {}}, "next_id"),
        ({"items": [], "names": {}, "next_id": 0}, "no record of groups"),
        ({"items": {"a": 3}, "names": {}, "next_id": 3}, "next_id must be higher"),
        ({"items": {"a": 3}, "names": {}, "next_id": 2}, "below next_id 2; got 3"),
        ({"items": {"a": "3"}, "names": {}, "next_id": 5}, "got '3'"),
        ({"items": {"a": -1}, "names": {}, "next_id": 5}, "got -1"),
        ({"items": {"a": 1.0}, "names": {}, "next_id": 5}, "got 1.0"),
        ({"items": {"a": 1}, "names": {"x": "otter"}, "next_id": 5}, "no record of groups"),
        ({"items": {"a": 1}, "names": {"7": "otter"}, "next_id": 5}, "got 7"),
        ({"items": {}, "names": {}, "next_id": None}, "got None"),
        ({"items": 3, "names": {}, "next_id": 0}, "no record of groups"),
        ([], "no record of groups"),
        (None, "no record of groups"),
    ],
)
def test_bad_records(state, message):
    with pytest.raises(OsmlError, match=message) as error:
        Identities.from_dict(state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "groups", "message"),
    [
        (["a", "b"], [0], "2 keys need as many groups"),
        (["a", "b"], [0.0, 1.0], "integers"),
        (["a", "a"], [0, 1], "key 'a' is there twice"),
        (["a", "b"], [0, 2], "skip a number"),
        (["a", "b"], [0, -2], "skip a number"),
    ],
)
def test_bad_groups(keys, groups, message):
    for call in (identify, lambda *a: join(*a[:2], csr_matrix((2, 2)), np.arange(2), a[2])):
        with pytest.raises(OsmlError, match=message) as error:
            call(Identities(), keys, np.array(groups))
        assert "\n" not in str(error.value)


def test_only_a_group_that_is_there_can_be_named():
    with pytest.raises(OsmlError, match=r"no group 2 to be named: choose from \[0, 1\]"):
        identify(Identities(), ["a", "b"], np.array([0, 1])).identities.named(2, "otter")


def test_no_items_are_no_groups():
    update = identify(Identities(), [], np.empty(0, dtype=np.int64))
    assert update.ids.shape == (0,) and update.identities == Identities()


# Joining ---------------------------------------------------------------------------------------------------


def blobs(sizes: list[int], seed: int = 0) -> tuple[csr_matrix, np.ndarray]:
    rng = np.random.default_rng(seed)
    true = np.repeat(np.arange(len(sizes)), sizes)
    items = np.eye(16)[true] + 0.1 * rng.normal(size=(len(true), 16))
    items /= np.linalg.norm(items, axis=1, keepdims=True)
    return neighbor_graph(items.astype(np.float32)), true


def test_new_items_join_or_found_new_groups():
    graph, true = blobs([40, 40, 40])
    keys = [str(i) for i in range(120)]
    # Known: half of class 0 and half of class 1, under ids 7 and 3. Class 2 is new.
    old = {keys[i]: 7 if true[i] == 0 else 3 for i in range(0, 80, 2)}
    previous = Identities(old, {7: "otter"}, 9)
    joined = join(previous, keys, graph, np.arange(120), true)
    assert joined.names == {7: "otter"} and joined.next_id == 10
    assert [joined.of_item[key] for key in keys] == np.array([7, 3, 9])[true].tolist()


def test_a_group_of_several_named_ones_is_shared_out_along_the_graph():
    graph, true = blobs([40, 40])
    keys = [str(i) for i in range(80)]
    previous = Identities({keys[0]: 0, keys[40]: 1, keys[41]: 1}, {}, 2)
    joined = join(previous, keys, graph, np.arange(80), np.zeros(80, dtype=int))
    # The two blobs are not linked, each is reached by its own.
    assert [joined.of_item[key] for key in keys] == true.tolist()


def test_strays_do_not_claim_a_new_class_but_stay_where_they_are():
    graph, true = blobs([30, 30])
    keys = [str(i) for i in range(60)]
    old = {key: 0 for key in keys[:30]} | {keys[30]: 0, keys[31]: 0}  # two of class 1 were taken for class 0
    joined = join(Identities(old, {0: "otter"}, 1), keys, graph, np.arange(60), true)
    assert [joined.of_item[key] for key in keys] == [0] * 32 + [1] * 28


def test_what_no_link_reaches_joins_the_largest_of_its_group():
    previous = Identities({"a": 0, "b": 1, "c": 1}, {}, 2)
    joined = join(previous, list("abcd"), csr_matrix((4, 4)), np.arange(4), np.zeros(4, dtype=int))
    assert joined.of_item["d"] == 1


def test_copies_join_their_original():
    graph = csr_matrix(np.array([[0, 0.5], [0.5, 0]]))
    joined = join(
        Identities({"a": 0, "b": 1}, {}, 2), list("abcd"), graph, np.array([0, 1, 0, 1]), np.zeros(4, dtype=int)
    )
    assert joined.of_item == {"a": 0, "b": 1, "c": 0, "d": 1}


@settings(deadline=None, max_examples=60)
@given(RUNS, st.integers(0, 10**6), st.sampled_from([0.0, 0.2]))
def test_nobody_who_has_a_group_changes_it(runs, seed, density):
    rng = np.random.default_rng(seed)
    n = len(runs)
    weights = np.triu(rng.random((n, n)) * (rng.random((n, n)) < density), 1)
    keys = [str(i) for i in range(n)]
    old, groups = [a for a, _ in runs], numbered([b for _, b in runs])
    previous = Identities({"absent": 4} | {k: i for k, i in zip(keys, old, strict=True) if i >= 0}, {}, 5)
    joined = join(previous, keys, csr_matrix(weights + weights.T), np.arange(n), groups)
    assert joined.of_item.items() >= previous.of_item.items()
    ids = np.array([joined.of_item.get(key, -1) for key in keys])
    np.testing.assert_array_equal(ids < 0, (groups < 0) & (np.array(old) < 0))
    for g in range(groups.max() + 1):
        inside = groups == g
        here = {i for i in np.array(old)[inside] if i >= 0}
        for i in set(ids[inside & (np.array(old) < 0)]):
            assert i in here or (i >= 5 and (ids == i).sum() == (inside & (np.array(old) < 0)).sum())
    found = np.unique(ids[ids >= 5])
    np.testing.assert_array_equal(found, np.arange(5, joined.next_id))
