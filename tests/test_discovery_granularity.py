"""How fine to group: what known classes say, at equal sizes; and that what is told of it agrees with what came out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score
from test_discovery import blobs, check, unit

from osml_plugin import OsmlError
from osml_plugin.discovery import discover
from osml_plugin.discovery.granularity import MATCHED, by_evidence, climbed
from osml_plugin.discovery.methods import create, names
from osml_plugin.discovery.pool import Pool

METHODS = names()


class Ladder:
    """A method whose rungs are given, or made by a function of the pool."""

    def __init__(self, rungs):
        self._rungs = rungs
        self.pools: list[Pool] = []
        self.n_rungs = 99

    def ladder(self, pool, seed):
        self.pools.append(pool)
        rungs = self._rungs(pool) if callable(self._rungs) else self._rungs
        yield from ((float(i), groups) for i, groups in enumerate(rungs))


def plain_pool(n_unknown: int, classes: np.ndarray) -> Pool:
    """A pool of as many nodes as items, the unknown first."""
    rows = unit(np.random.default_rng(0).normal(size=(n_unknown + len(classes), 24))).astype(np.float32)
    pool = Pool.of(rows[:n_unknown], rows[n_unknown:], classes)
    return Pool(rows, np.arange(n_unknown), np.arange(n_unknown, len(rows)), classes, pool.links)


def counted(groups: np.ndarray, pool: Pool) -> int:
    """All groups with an unknown item are new."""
    return len(np.unique(groups[pool.of_item]))


def quiet(done: float) -> None:
    pass


# Thinned pools ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 11), min_size=1, max_size=60),
    st.lists(st.integers(6, 17), max_size=20),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_thinned(items, known, share, seed):
    """Some items are copies of one another, and of known ones."""
    rows = unit(np.random.default_rng(0).normal(size=(18, 24))).astype(np.float32)
    classes = np.arange(len(known)) % 3
    pool = Pool.of(rows[items], rows[known].reshape(-1, 24), classes)
    thinned = pool.thinned(share, seed)
    places = {row.tobytes(): node for node, row in enumerate(pool.nodes)}
    old = np.array([places[row.tobytes()] for row in thinned.nodes])
    assert len(set(old)) == len(old) and len(thinned.of_item) > 0
    assert set(old) == set(old[thinned.of_item]) | set(pool.of_known)
    np.testing.assert_array_equal(old[thinned.of_known], pool.of_known)
    np.testing.assert_array_equal(thinned.classes, classes)
    drawn = set(old[thinned.of_item])  # a node comes with all of its items, or not at all
    assert old[thinned.of_item].tolist() == [node for node in pool.of_item if node in drawn]
    assert thinned.links.blocks.shape == thinned.of_item.shape
    if share == 1:
        assert len(thinned.of_item) == len(items)
    again = Pool.of(rows[items[::-1]], rows[known].reshape(-1, 24), classes)
    np.testing.assert_array_equal(again.thinned(share, seed).nodes, thinned.nodes)  # in whatever order they come


def test_thinned_holds_about_the_share():
    pool = plain_pool(4000, np.arange(50) % 5)
    for share in (0.05, 0.3, 0.5):
        sizes = [len(pool.thinned(share, seed).of_item) for seed in range(4)]
        np.testing.assert_allclose(sizes, 4000 * share, atol=5 * np.sqrt(4000 * share * (1 - share)))
        assert len(set(sizes)) > 1


# The rung that is taken ------------------------------------------------------------------------------------


def climbed_slowly(rungs: list[np.ndarray], n_unknown: int, classes: np.ndarray) -> tuple[int, list[int], int]:
    """The chosen rung, the plausible ones, and how many were looked at; of groups without noise."""
    scores, looked = [], 0
    for groups in rungs:
        if looked and groups.max() + 1 > len(groups) / 2:
            break
        looked += 1
        of_known = groups[n_unknown:]
        row = []
        for i, c in enumerate(classes):
            both = np.sum((classes == c) & (of_known == of_known[i]))
            row.append(2 * both / (np.sum(classes == c) + np.sum(of_known == of_known[i])))
        scores.append(np.array(row))
        if np.mean(row) < max(np.mean(s) for s in scores) / 2:
            break
    best = max(scores, key=np.mean)
    errors = []
    for row in scores:
        off = best - row
        sums = [np.sum(off[classes == c] - off.mean()) ** 2 for c in set(classes)]
        error = np.sqrt(len(sums) / (len(sums) - 1) * np.sum(sums)) / len(classes)
        errors.append(off.mean() / error if error > 1e-12 else 0 if off.mean() < 1e-12 else np.inf)
    z = np.array(errors)
    mine = [groups[:n_unknown] for groups in rungs[:looked]]

    def steady(i: int) -> bool:
        beside = [mine[j] for j in (i - 1, i + 1) if 0 <= j < looked] or [mine[i]]
        return all(adjusted_rand_score(mine[i], other) == 1 for other in beside)

    same = [i for i in range(looked) if z[i] <= 1 and steady(i)]
    weights = np.exp(-(z**2) / 2)
    middle = sum(i * w for i, w in enumerate(weights)) / sum(weights)
    chosen = same[-1] if same else round(middle)
    return chosen, sorted({*np.flatnonzero(z <= 2).tolist(), chosen}), looked


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(2, 6), st.integers(1, 9), st.booleans())
def test_climbed_against_a_slow_twin(seed, n_classes, n_rungs, repeated):
    rng = np.random.default_rng(seed)
    classes = np.append(np.arange(n_classes), rng.integers(n_classes, size=40 - n_classes))
    pool = plain_pool(40, classes)
    true = np.append(rng.integers(100, 104, size=40), classes)
    rungs = []
    for rung in range(n_rungs):
        parts = np.where(rng.random(80) < 0.9, true, rng.integers(4, size=80)) + 1000 * rng.integers(1 + rung, size=80)
        if repeated and rungs and rng.random() < 0.6:
            parts = rungs[-1]
        rungs.append(np.unique(parts, return_inverse=True)[1])
    chosen, plausible, looked = climbed_slowly(rungs, 40, classes)
    found = climbed(Ladder(rungs), pool, 0, quiet, counted)
    assert (found.chosen, found.plausible.tolist(), len(found.groups)) == (chosen, plausible, looked)
    assert found.counts.tolist() == [len(set(groups[:40])) for groups in rungs[:looked]]
    assert found.span == (min(found.counts[plausible]), max(found.counts[plausible]))


def parts_of(size_of_a_part: list[int], true: np.ndarray):
    """Rungs on which each class is in parts of so many items: large classes fall apart before small ones do."""

    def rungs(pool: Pool):
        _, of_class, n = np.unique(true[pool_items(pool)], return_inverse=True, return_counts=True)
        within = np.empty(len(of_class), dtype=np.int64)
        for c in range(len(n)):
            within[of_class == c] = np.arange(n[c])
        for size in size_of_a_part:
            n_parts = np.maximum(1, np.rint(n / size)).astype(int)
            yield np.unique(of_class * 10_000 + within % n_parts[of_class], return_inverse=True)[1]

    def pool_items(pool: Pool) -> np.ndarray:
        return np.rint(pool.nodes[:, 0]).astype(int)

    return rungs


def numbered_pool(true: np.ndarray, n_unknown: int) -> Pool:
    """A pool whose nodes bear their numbers."""
    pool = plain_pool(n_unknown, true[n_unknown:])
    pool.nodes[:, 0] = np.arange(len(true))
    return pool


def test_unknown_classes_that_are_larger_are_counted_at_the_size_of_known_ones():
    true = np.concatenate([np.repeat(np.arange(100, 104), 400), np.repeat(np.arange(5), 40)])
    pool = numbered_pool(true, 1600)
    way = Ladder(parts_of([380, 200, 130, 100, 80, 60, 50, 40, 25, 15, 10, 6], true))
    alone = climbed(way, pool, 0, quiet, counted)
    assert alone.counts[alone.chosen] > 8
    way.pools.clear()
    choice = by_evidence(way, pool, 0, quiet, counted)
    assert counted(choice.groups, pool) == 4 and choice.source == "known classes"
    assert choice.counts[0] <= 4 <= choice.counts[1] < alone.counts[alone.chosen]
    assert way.pools[0] is pool and len(way.pools) > 2
    for thinned in way.pools[1:]:
        assert len(thinned.of_item) < 1.2 * MATCHED * 1600 and len(thinned.of_known) == 200
    again = by_evidence(way, pool, 0, quiet, counted)
    np.testing.assert_array_equal(again.groups, choice.groups)


def test_copies_do_not_make_known_classes_larger():
    true = np.concatenate([np.repeat(np.arange(100, 104), 400), np.repeat(np.arange(5), 40)])
    pool = numbered_pool(true, 1600)
    way = Ladder(parts_of([380, 200, 130, 100, 80, 60, 50, 40, 25, 15, 10, 6], true))
    copied = Pool(pool.nodes, pool.of_item, np.tile(pool.of_known, 20), np.tile(pool.classes, 20), pool.links)
    assert counted(by_evidence(way, copied, 0, quiet, counted).groups, pool) == 4


def test_unknown_classes_of_the_size_of_known_ones_are_not_thinned():
    true = np.concatenate([np.repeat(np.arange(100, 110), 40), np.repeat(np.arange(5), 40)])
    way = Ladder(parts_of([40, 40, 40, 20, 10], true))
    choice = by_evidence(way, numbered_pool(true, 400), 0, quiet, counted)
    assert len(way.pools) == 1 and choice.counts == (10, 10)


@pytest.mark.parametrize("n_known", [50, 4])
def test_known_items_of_one_class_or_one_each_do_not_say_how_fine(n_known):
    items, true = blobs(8, 50)
    known = true == 0 if n_known == 50 else np.isin(np.arange(400), 50 * np.arange(n_known))
    unknown = true >= 4
    found = discover(items[unknown], items[known][:n_known], true[known][:n_known])
    check(found, unknown.sum())
    assert found.granularity_source == "default" and found.n_classes == 4


# What is told of it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [{}, {"n_classes": 3}, {"granularity": 1.0}])
@pytest.mark.parametrize("size", [None, 10, 100])
def test_progress_rises_from_none_to_all(method, how, size):
    items, true = blobs(6, 100)
    known = (true < 3) & (np.arange(600) % 100 < (size or 0))
    options = {"known_embeddings": items[known], "known_labels": true[known]} if size else {}
    told = []
    discover(items[true >= 3], **options, **how, method=method, progress=told.append)
    assert told[0] == 0 and told[-1] == 1 and (np.diff(told) >= 0).all()
    assert all(type(done) is float for done in told)


def test_communities_tell_how_far_they_are_before_the_first_is_out():
    items, _ = blobs(3, 30)
    way, told = create("communities"), []
    way.made = told.append
    next(way.ladder(Pool.of(items.astype(np.float32), items[:0].astype(np.float32), np.empty(0, np.int64)), 0))
    np.testing.assert_allclose(told, np.arange(1, 25) / 24)


@pytest.mark.parametrize("method", METHODS)
def test_what_progress_raises_ends_the_work(method):
    items, _ = blobs(3, 30)

    def stop(done: float) -> None:
        raise InterruptedError

    for how in ({}, {"n_classes": 3}, {"granularity": 1.0}):
        with pytest.raises(InterruptedError):
            discover(items, **how, method=method, progress=stop)


@pytest.mark.parametrize("method", METHODS)
def test_granularity_far_out_of_range_is_the_end_of_the_ladder(method):
    items, _ = blobs(4, 40)
    coarse, fine = (discover(items, granularity=g, method=method) for g in (-1e300, 1e300))
    assert coarse.granularity < fine.granularity and coarse.n_classes < fine.n_classes
    assert discover(items, granularity=1e7, method=method).granularity == fine.granularity


@pytest.mark.parametrize("method", METHODS)
def test_a_pool_of_copies_of_known_items_is_all_known(method):
    items, true = blobs(4, 40)
    for pool in (slice(None), slice(0, None, 2), slice(0, 40)):
        found = discover(items[pool], items, true, method=method)
        check(found, len(items[pool]))
        assert found.n_classes == 0 and found.note == "all items lie among known classes"
        assert (found.known_class == true[pool]).all()
    new, of_new = blobs(8, 40)  # a few copies among new items hide nothing
    found = discover(new[of_new >= 3], new[of_new < 4], of_new[of_new < 4], in_gallery=of_new[of_new < 4] < 3)
    assert found.n_classes == 5


# Links, copies, noise --------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=12)
@given(st.integers(0, 1000), st.booleans(), st.booleans())
def test_confidence_is_that_of_the_groups_that_links_leave(seed, references, copies):
    rng = np.random.default_rng(seed)
    items, true = blobs(6, 20, spread=0.8, seed=seed)
    known = items[true < 2], true[true < 2]
    items = items[true >= 2]
    if copies:
        items = np.concatenate([items, np.repeat(items[:2], 5, axis=0)])
    pairs = rng.choice(len(items), size=(6, 2), replace=False)
    found = discover(items, *(known if references else ()), must_link=pairs[:4], cannot_link=pairs[4:], seed=seed)
    check(found, len(items))
    pool, n = found.pool, len(found.pool.nodes)
    weights = pool.graph.toarray()
    # Of each node the groups that its items are in; what the known ones are in is seen in the grouping without links.
    groups_at = [set() for _ in range(n)]
    for node, label in zip(pool.of_item, found.labels, strict=True):
        groups_at[node].add(label)
    only_unknown = np.ones(n, dtype=bool)
    only_unknown[pool.of_known] = False
    assert len(groups_at) == n
    for i, (node, label) in enumerate(zip(pool.of_item, found.labels, strict=True)):
        near = np.flatnonzero(weights[node])
        if label < 0 or not only_unknown[near].all():
            continue
        own = sum(weights[node, j] for j in near if label in groups_at[j])
        total = sum(weights[node, j] * len(groups_at[j]) for j in near)
        assert found.confidence[i] == pytest.approx(own / total)


def test_links_that_change_the_number_of_classes_are_in_the_interval():
    items, _ = blobs(4, 30)
    check(discover(items, must_link=[[0, 30]], cannot_link=[[1, 2], [2, 3], [1, 3]]), 120)
    same = np.repeat(items[:1], 20, axis=0)
    found = discover(same, cannot_link=[[0, 1], [1, 2], [0, 2]])
    check(found, 20)
    assert found.n_classes == 3 and found.n_classes_interval == (1, 3)


def test_noise_belongs_nowhere():
    rng = np.random.default_rng(0)
    apart = unit(np.append(np.zeros(15), 1) + 0.01 * rng.normal(size=(18, 16)))  # linked among themselves alone
    found = discover(np.concatenate([blobs(3, 100)[0], apart]), method="density", granularity=6.0)
    check(found, 318)
    np.testing.assert_array_equal(np.flatnonzero(found.labels == -1), np.arange(300, 318))
    assert (found.confidence[300:] == 0).all() and found.confidence[:300].min() > 0
    assert all(name is None for name in found.known_class)


# What is refused -------------------------------------------------------------------------------------------

GOOD = np.eye(4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", [{}, {"n_classes": np.int64(2)}])
def test_any_seed_within_the_range_will_do(method, how):
    items, _ = blobs(3, 20)
    for seed in (0, np.int64(7), 2**31 - 3, 2**31):
        check(discover(items, method=method, seed=seed, **how), 60)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"seed": 2**31 + 1}, "seed must be a whole number from 0"),
        ({"seed": 1.5}, "seed must be a whole number from 0"),
        ({"seed": None}, "seed must be a whole number from 0"),
        ({"n_classes": 2.0}, "must be whole, from 1 to the 4 items"),
        ({"n_classes": "2"}, "must be whole, from 1 to the 4 items"),
        ({"n_classes": True}, "must be whole, from 1 to the 4 items"),
        ({"known_embeddings": GOOD, "known_labels": [1, "a", 2, 3][:1] * 2 + [None, "a"]}, "integers, or strings"),
        ({"known_embeddings": GOOD, "known_labels": [1.0, np.nan, 2, 3]}, "known_labels has NaN"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(OsmlError, match=message) as error:
        discover(GOOD, **options)
    assert "\n" not in str(error.value)
