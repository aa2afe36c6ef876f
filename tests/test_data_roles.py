from __future__ import annotations

import json
from dataclasses import astuple
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from osml_plugin import OsmlError
from osml_plugin.data import Fractions, Items, Split, draw_split, test_indices, training_roles
from osml_plugin.data.roles import _counts

DIGITS = load_digits()
SPLIT = Split(("0", "1", "2", "3"), ("4", "5"), ("6", "7"))


def items_of(rows, labels, roles=None) -> Items:
    rows = np.asarray(rows, dtype=np.float32).reshape(len(labels), -1)
    return Items(tuple(str(label) for label in labels), None, rows, roles and tuple(roles))


def digits(n: int | None = None, roles=None) -> Items:
    return items_of(DIGITS.data[:n], DIGITS.target[:n], roles)


def seen_by(items, roles) -> np.ndarray:
    return items.fingerprints()[np.concatenate([roles.train, roles.calibration, roles.validation])]


# --- splits ----------------------------------------------------------------------------------------------


def test_split_file(tmp_path):
    file = tmp_path / "split.json"
    file.write_text(json.dumps({"known": [0, "1", "é"], "unknown": [7]}, ensure_ascii=False), encoding="utf-8-sig")
    split = Split.load(file)
    assert split == Split(("0", "1", "é"), (), ("7",))
    assert Split.from_dict(split.to_dict()) == split and json.loads(json.dumps(split.to_dict())) == split.to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"known": ["a"], "unknwon": []}', "unknown key of a split 'unknwon': did you mean 'unknown'"),
        ('{"unknown": ["a"]}', "needs 'known'"),
        ('{"known": "ab"}', "'known' of a split must be a list of class names, not 'ab'"),
        ('{"known": ["a", null]}', "must be a list of class names"),
        ('["a", "b"]', "not list"),
        ('{"known": [', "is not JSON"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_bad_split_files(tmp_path, content, message):
    (tmp_path / "split.json").write_text(content)
    with pytest.raises(OsmlError, match=message) as error:
        Split.load(tmp_path / "split.json")
    assert "split.json" in str(error.value) and "\n" not in str(error.value)


def test_absent_split_file(tmp_path):
    with pytest.raises(OsmlError, match=r"cannot read the split '.*no\.json': No such file"):
        Split.load(tmp_path / "no.json")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (Split(("cat",)), "at least 2 known classes, not 1"),
        (Split(("cat", "cat")), "at least 2 known classes, not 1"),
        (Split(("cat", "dog", "cat")), "class 'cat' twice in 'known'"),
        (Split(("cat", "dog"), ("cat",)), "class 'cat' in 'known' and in 'pseudo_unknown'"),
        (Split(("cat", "dog"), ("bird",), ("bird",)), "class 'bird' in 'pseudo_unknown' and in 'unknown'"),
        (Split(("cat", "dog"), (), ("brid",)), "class 'brid' in 'unknown' of the split .* did you mean 'bird'"),
        (Split(("cat", "zebra", "q")), r"class 'zebra' in 'known' .* \(and 1 more\); the data has 3 classes"),
    ],
)
def test_split_that_does_not_fit(split, message):
    with pytest.raises(OsmlError, match=message):
        split.check(["cat", "dog", "bird"])


def test_split_that_fits():
    Split(("cat", "dog"), ("bird",)).check(["bird", "cat", "cow", "dog"])


@settings(deadline=None, max_examples=60)
@given(st.sets(st.text("abcé0 _", min_size=1, max_size=4), min_size=2, max_size=30), st.integers(0, 3), st.randoms())
def test_drawn_split(names, seed, random):
    split = draw_split(names, seed=seed)
    split.check(names)
    assert set(split.known) | set(split.pseudo_unknown) | set(split.unknown) == names
    others = len(names) - len(split.known)
    assert len(split.known) == max(2, round(len(names) / 2))
    assert abs(len(split.pseudo_unknown) - 0.4 * others) <= 0.6
    assert bool(split.pseudo_unknown) == (others >= 2) and bool(split.unknown) == (others >= 1)
    shuffled = list(names) * 2
    random.shuffle(shuffled)
    assert draw_split(shuffled, seed=seed) == split


def test_drawn_split_varies_with_the_seed_and_takes_every_class():
    names = [str(i) for i in range(10)]
    splits = [draw_split(names, n_known=6, seed=seed) for seed in range(200)]
    for field, share in (("known", 0.6), ("pseudo_unknown", 0.2), ("unknown", 0.2)):
        counts = [sum(name in getattr(split, field) for split in splits) for name in names]
        assert 200 * share - 30 < min(counts) <= max(counts) < 200 * share + 30  # over 4 standard deviations
    assert draw_split(names, n_known=10) == Split(tuple(names))
    for n_known in (1, 11):
        with pytest.raises(OsmlError, match=f"cannot draw {n_known} known of 10 classes"):
            draw_split(names, n_known=n_known)
    with pytest.raises(OsmlError, match="cannot draw 2 known of 1 classes"):
        draw_split(["a"])


def test_the_label_minus_one_is_unknown_and_never_drawn():
    for seed in range(20):
        split = draw_split(["-1", "a", "b", "c", "d"], n_known=2, seed=seed)
        assert split.unknown[0] == "-1" and len(split.unknown) == len(split.known) + len(split.pseudo_unknown) - 1 == 2
        split.check(["-1", "a", "b", "c", "d"])
    with pytest.raises(OsmlError, match="cannot draw 3 known of 2 classes"):
        draw_split(["-1", "a", "b"], n_known=3)
    for split in (Split(("a", "b", "-1")), Split(("a", "b"), ("-1",))):
        with pytest.raises(OsmlError, match=r"names class '-1' in '(known|pseudo_unknown)', but that is the label of"):
            split.check(["-1", "a", "b"])
    items = items_of(range(9), [0, 0, 0, 1, 1, 1, -1, -1, -1])
    split = draw_split(items.class_names())
    roles = training_roles(items, split)
    test = test_indices(items, split.known, split.pseudo_unknown, seen=seen_by(items, roles))
    assert {6, 7, 8} <= set(test.tolist())


# --- fractions -------------------------------------------------------------------------------------------


def largest_remainder(n: int, weights: list[int]) -> list[int]:
    """By the book, in exact fractions."""
    quota = [Fraction(n * w, sum(weights)) for w in weights]
    counts = [int(q) for q in quota]
    while sum(counts) < n:
        remainders = [q - c for q, c in zip(quota, counts, strict=True)]
        counts[remainders.index(max(remainders))] += 1
    return counts


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 400), st.lists(st.integers(0, 20), min_size=3, max_size=3), st.integers(1, 20))
def test_counts_against_exact_largest_remainder(n, rest, train):
    weights = [train, *rest]
    (counts, owed), exact = _counts(n, np.array(weights) / sum(weights)), largest_remainder(n, weights)
    assert counts.sum() == n and counts.min() >= 0 and counts[0] >= 1
    quota = n * np.array(weights) / sum(weights)
    assert owed == pytest.approx(quota - counts)
    # Equal remainders may be served in another order; the minimum moves at most one item.
    moved = 2 * (exact[0] == 0)
    assert np.abs(counts - quota).sum() <= np.abs(exact - quota).sum() + moved + 1e-9


def test_counts_by_hand():
    shares = np.array(astuple(Fractions()))
    by_hand = {
        1: [1, 0, 0, 0],
        2: [1, 0, 0, 1],
        3: [2, 0, 0, 1],
        4: [2, 1, 0, 1],
        20: [11, 3, 2, 4],
        200: [110, 30, 20, 40],
    }
    assert {n: _counts(n, shares)[0].tolist() for n in by_hand} == by_hand


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(2, 40), min_size=1, max_size=40), st.integers(0, 3))
def test_each_role_has_the_classes_in_their_proportions(sizes, seed):
    """A class gets its share of each role up to one item, and all classes together get theirs."""
    shares, carried, total = np.array(astuple(Fractions())), None, np.zeros(4)
    for n in np.random.default_rng(seed).permutation(sizes):
        counts, carried = _counts(int(n), shares, carried)
        assert (np.abs(counts - n * shares) < 1 + 1e-9).all()
        total += counts
    assert carried == pytest.approx(sum(sizes) * shares - total)
    assert np.abs(carried).max() < 2


@pytest.mark.parametrize("shares", [(0.5, 0.5, 0.5, 0.5), (0, 0.5, 0.5, 0), (0.7, 0.5, -0.2, 0)])
def test_bad_fractions(shares):
    with pytest.raises(OsmlError, match=r"fractions \("):
        Fractions(*shares)


# --- near-copies -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 6), min_size=16, max_size=40), st.integers(0, 3), st.booleans())
def test_a_set_of_near_copies_has_one_role_and_counts_once(sizes, seed, across):
    """Sets of several items, some of which lie in two classes."""
    sets = np.repeat(np.arange(len(sizes)), sizes)
    labels = [("ab" if (s + (across and i % 3 == 0)) % 2 else "ba")[0] for i, s in enumerate(sets)]
    labels = [("p" if s % 5 == 4 else label) for label, s in zip(labels, sets, strict=True)]
    items = items_of(range(len(sets)), labels)
    roles = training_roles(items, Split(("a", "b"), ("p",)), sets=sets, seed=seed)
    parts = [roles.train, roles.calibration, roles.validation]
    assert len(np.unique(np.concatenate([*parts, roles.copies]))) == sum(map(len, parts)) + len(roles.copies)
    of_part = [set(sets[part]) for part in parts]
    assert not (of_part[0] & of_part[1] or of_part[0] & of_part[2] or of_part[1] & of_part[2])
    for part in (roles.references, roles.calibration, roles.validation):
        pairs = [(sets[i], labels[i]) for i in part]
        assert len(pairs) == len(set(pairs))
    assert set(roles.references) <= set(roles.train) and set(sets[roles.references]) == of_part[0]
    assert set(sets[roles.copies]) <= of_part[1] | of_part[2]
    # All items of a set that takes part are seen: none of them is left to test on.
    seen = np.isin(sets, sets[roles.seen])
    assert (np.sort(np.flatnonzero(seen)) == roles.seen).all()


def test_a_set_that_is_declared_to_have_several_roles_keeps_the_first():
    declared = ["train", "train", "calibration", "calibration", "train", "train", "calibration", "calibration"]
    items = items_of(range(8), "aaaabbbb", declared)
    roles = training_roles(items, Split(("a", "b")), sets=np.array([0, 1, 0, 2, 3, 4, 5, 5]))
    assert roles.train.tolist() == [0, 1, 4, 5] and len(roles.calibration) == 2
    assert roles.calibration[0] == 3 and roles.calibration[1] in (6, 7)
    assert sorted({2, 6, 7} - set(roles.calibration)) == roles.copies.tolist()


# --- roles -----------------------------------------------------------------------------------------------


def test_roles_of_the_digits():
    items = digits()
    roles = training_roles(items, SPLIT)
    labels = np.array(items.labels)
    assert set(labels[roles.train]) == set(labels[roles.calibration]) == set(SPLIT.known)
    assert set(labels[roles.validation]) == {*SPLIT.known, *SPLIT.pseudo_unknown}
    for name in SPLIT.pseudo_unknown:
        assert (labels[roles.validation] == name).sum() == (labels == name).sum()
    for name in SPLIT.known:
        n = (labels == name).sum()
        for part, share in zip(
            (roles.train, roles.calibration, roles.validation), astuple(Fractions())[:3], strict=True
        ):
            assert abs((labels[part] == name).sum() - share * n) < 1
    for part in (roles.train, roles.calibration, roles.validation):
        assert (np.diff(part) > 0).all()

    test = test_indices(items, SPLIT.known, SPLIT.pseudo_unknown, seen=seen_by(items, roles))
    assert set(labels[test]) == {*SPLIT.known, *SPLIT.unknown, "8", "9"}
    assert np.isin(labels[test], SPLIT.known).mean() < 0.4


def test_roles_depend_on_content_and_seed_alone():
    items = digits(600)
    order = np.random.default_rng(0).permutation(600)
    shuffled = items.select(order)
    roles, moved = training_roles(items, SPLIT), training_roles(shuffled, SPLIT)
    for part in ("train", "calibration", "validation"):
        assert set(order[getattr(moved, part)]) == set(getattr(roles, part))
    other = training_roles(items, SPLIT, seed=1)
    assert len(other.train) == len(roles.train) and set(other.train) != set(roles.train)


# Few distinct contents, so that there are duplicates, also across classes.
flat = st.lists(st.tuples(st.integers(0, 12), st.sampled_from("abcdef")), max_size=60).map(
    lambda pairs: [(100, "a"), (101, "a"), (102, "b"), (103, "b"), (104, "p"), (105, "u"), *pairs]
)


@settings(deadline=None, max_examples=150)
@given(flat, flat, st.integers(0, 5))
def test_flat_items_fall_into_one_role_and_never_move_into_test(pairs, more, seed):
    split = Split(("a", "b"), ("p",), ("u",))
    items = items_of(*zip(*pairs, strict=True))
    roles = training_roles(items, split, seed=seed)
    parts = [set(part.tolist()) for part in (roles.train, roles.calibration, roles.validation)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    seen = seen_by(items, roles)
    test = test_indices(items, split.known, split.pseudo_unknown, seen=seen).tolist()

    labels, prints = np.array(items.labels), items.fingerprints()
    where = {(label, print_): set() for label, print_ in zip(labels, prints, strict=True)}
    for number, part in enumerate([*parts, test]):
        for i in part:
            where[labels[i], prints[i]].add(number)
    assert all(len(numbers) <= 1 for numbers in where.values())  # duplicates stay together
    # Together they are all known items, but for copies that another class brought into training.
    known = set(np.flatnonzero(np.isin(labels, split.known)))
    covered = set().union(*parts, test)
    assert all(prints[i] in seen for i in known - covered)
    assert not set(prints[test]) & set(seen) and "p" not in labels[test]
    assert set(labels[roles.train]) == {"a", "b"} and set(labels[roles.calibration]) <= {"a", "b"}
    assert len(roles.calibration)

    grown = items_of(*zip(*(more[::-1] + pairs), strict=True))
    grown_test = test_indices(grown, split.known, split.pseudo_unknown, seen=seen)
    assert not set(grown.fingerprints()[grown_test]) & set(seen)
    assert set(prints[test]) <= set(grown.fingerprints()[grown_test])


def test_declared_train_and_test():
    declared = ["test" if i % 3 == 0 else "train" for i in range(600)]
    items = digits(600, declared)
    roles = training_roles(items, SPLIT)
    labels, declared = np.array(items.labels), np.array(declared)
    trained = np.concatenate([roles.train, roles.calibration, roles.validation])
    expected = (declared == "train") & np.isin(labels, SPLIT.known + SPLIT.pseudo_unknown)
    assert sorted(trained) == np.flatnonzero(expected).tolist()
    for name in SPLIT.known:
        n = (expected & (labels == name)).sum()
        for part, share in zip(
            (roles.train, roles.calibration, roles.validation), (0.6875, 0.1875, 0.125), strict=True
        ):
            assert abs((labels[part] == name).sum() - share * n) < 1
    test = test_indices(items, SPLIT.known, SPLIT.pseudo_unknown)
    assert test.tolist() == np.flatnonzero((declared == "test") & ~np.isin(labels, SPLIT.pseudo_unknown)).tolist()
    seen = np.concatenate([seen_by(items, roles), items.fingerprints()[test[:3]]])  # three were enrolled
    assert test_indices(items, SPLIT.known, SPLIT.pseudo_unknown, seen=seen).tolist() == test[3:].tolist()


def test_copies_of_training_items_in_a_declared_test_set_are_left_out():
    items = items_of([1, 2, 3, 4, 1, 5, 6], "aabbaab", ["train"] * 4 + ["test"] * 3)
    roles = training_roles(items, Split(("a", "b")))
    assert test_indices(items, ("a", "b"), (), seen=seen_by(items, roles)).tolist() == [5, 6]


def test_all_roles_declared():
    declared = np.random.default_rng(0).choice(["train", "calibration", "validation", "test"], 600)
    items = digits(600, declared.tolist())
    roles = training_roles(items, SPLIT)
    labels = np.array(items.labels)
    known, pseudo = np.isin(labels, SPLIT.known), np.isin(labels, SPLIT.pseudo_unknown)
    for part in ("train", "calibration"):
        assert getattr(roles, part).tolist() == np.flatnonzero((declared == part) & known).tolist()
    expected = (known & (declared == "validation")) | (pseudo & (declared != "test"))
    assert roles.validation.tolist() == np.flatnonzero(expected).tolist()

    without = ["train" if r == "calibration" and c == "2" else r for r, c in zip(declared, labels, strict=True)]
    with pytest.raises(OsmlError, match="declared for class '2' leave it without"):
        training_roles(digits(600, without), SPLIT)


def test_too_few_items():
    split = Split(("a", "b"))
    with pytest.raises(OsmlError, match="class 'b' has 1 embedding; a known class needs at least 2"):
        training_roles(items_of([1, 2, 3], "aab"), split)
    with pytest.raises(OsmlError, match="class 'b' has 1 distinct embedding; "):
        training_roles(items_of([1, 2, 3, 3, 3], "aabbb"), split)
    with pytest.raises(OsmlError, match="class 'a' has 0 embeddings outside 'test'; "):
        training_roles(items_of([1, 2, 3, 4], "aabb", ["test", "test", "train", "train"]), split)
    with pytest.raises(
        OsmlError, match="embeddings of class 'b' lie in other classes as well, such as 'c', and too few"
    ):
        training_roles(items_of([1, 2, 3, 4, 3, 4], "aabbcc"), Split(("a", "b"), ("c",)))
    roles = training_roles(items_of([1, 2, 3, 4], "aabb"), split)
    assert len(roles.train) == 2 and len(roles.calibration) == 1 and len(roles.validation) == 0


def test_items_that_cannot_be_used():
    unlabelled = Items(None, None, DIGITS.data[:5].astype(np.float32), None)
    for call in (lambda: training_roles(unlabelled, SPLIT), lambda: test_indices(unlabelled, SPLIT.known, ())):
        with pytest.raises(OsmlError, match="no labels"):
            call()
    with pytest.raises(OsmlError, match="none of the 2 known classes, such as 'cat', is in the data"):
        test_indices(digits(50), ("cat", "dog"), ())
