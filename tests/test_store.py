"""The store's contract, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial

import numpy as np
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import create_engine, select, text, update

from osml_plugin import OsmlError
from osml_plugin.serve.store import (
    Conflict,
    Group,
    KeyRecord,
    KeyReused,
    NewItem,
    NotThere,
    Observation,
    StaleModel,
    Store,
    StoreFull,
    StoreUnavailable,
    Write,
    new_id,
    tables,
)
from osml_plugin.serve.store.reserve import RESERVED

pytest_plugins = ["postgres"]

ANN = Write("ann")
MODEL = "m/1"


def keyed(key: str, fingerprint: str = "f", actor: str = "ann") -> Write:
    return Write(actor, key, fingerprint)


def vector(value: float, width: int = 4) -> np.ndarray:
    return np.full(width, value, np.float32)


def item(value: float = 0, image: bool = True) -> NewItem:
    return NewItem(vector(value), b"image %d" % value if image else None, "image/png" if image else None)


def observation(value: float = 0, image: bool = True, model: str = MODEL) -> Observation:
    return Observation(new_id(), item(value, image), model, score=value, nearest="cat", p_value=0.25)


def gallery(store: Store, model: str = MODEL) -> dict[str, str]:
    return {i.id: i.name for i in store.changes_since(0, model).items}


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    return f"sqlite:///{tmp_path}/store.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")


@pytest.fixture
def empty(url):
    store = Store(url)
    yield store
    store.close()


@pytest.fixture
def store(empty):
    empty.ask_model(ANN, MODEL, "models:/m/1", ["cat", "dog"])
    return empty


# --- the schema ------------------------------------------------------------------------------------------


def raw(url: str):
    return create_engine(url.replace("postgresql:", "postgresql+pg8000:"))


def test_migrations_make_the_tables_as_they_are_written_down(url):
    Store(url).close()
    with raw(url).connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": "osml_schema", "compare_type": True})
        assert compare_metadata(context, tables.metadata) == []


def test_groups_of_the_first_schema_become_groups_of_their_own(url):
    Store(url).close()  # makes the file, or fails
    with raw(url).begin() as connection:
        for table in (*reversed(tables.metadata.sorted_tables), tables.Table("osml_schema", tables.MetaData())):
            table.drop(connection)
        config = Config()
        config.set_main_option("script_location", "osml_plugin.serve.store:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        for job in "ab":
            job = {"id": job * 32, "kind": "discovery", "args": "{}", "actor": "ann", "state": "done", "progress": 1}
            job |= {"created_at": datetime(2026, 1, 1), "attempts": 1}
            connection.execute(text(f"INSERT INTO osml_jobs ({', '.join(job)}) VALUES (:{', :'.join(job)})"), job)
            for number in (1, 0):
                connection.execute(
                    text(
                        "INSERT INTO osml_groups (job_id, number, confidence, state) VALUES (:job, :number, 1, 'proposed')"
                    ),
                    {"job": job["id"], "number": number},
                )
    store = Store(url)
    store.ask_model(ANN, MODEL, "models:/m/1", ["cat", "dog"])
    store.observe([one := observation()])
    latest = discovered(store, Group(0, 1.0, (one.id,), ()))
    assert [[g.id for g in store.groups(job)] for job in ("a" * 32, "b" * 32, latest)] == [[0, 1], [2, 3], [4]]
    store.close()


def test_several_processes_open_an_empty_database_at_once(url):
    program = (
        "import sys; from osml_plugin.serve.store import Store, Write; input(); s = Store(sys.argv[1]);"
        "print(s.state().gallery_version, s.set_alpha(Write('x'), 0.1).gallery_version)"
    )
    started = [process(program, url) for _ in range(4)]
    time.sleep(1)  # all wait for the line
    for one in started:
        one.stdin.write("\n")
        one.stdin.close()
    assert [(one.wait(30), one.stderr.read()) for one in started] == [(0, "")] * 4, "opening logs and prints nothing"
    assert sorted(int(one.stdout.read().split()[1]) for one in started) == [1, 2, 3, 4]


def test_a_newer_schema_is_refused(url):
    Store(url).close()
    with raw(url).begin() as connection:
        connection.execute(text("UPDATE osml_schema SET version_num = '9999'"))
    with pytest.raises(OsmlError, match="newer version.*update osml-plugin"):
        Store(url)


@pytest.mark.parametrize(
    "url", ["mysql://u:secret@h/x", "sqlite://", "nothing", "postgresql://u:secret@h/x?sslmode=no", "postgresql://h/x"]
)
def test_urls_of_other_databases_are_refused(url):
    with pytest.raises(OsmlError, match="expected sqlite:///FILE or postgresql://") as caught:
        Store(url)
    assert "secret" not in str(caught.value) and "\n" not in str(caught.value)


def process(program: str, *arguments: str) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, "-c", program, *arguments], text=True, **pipes)


# --- the gallery -----------------------------------------------------------------------------------------


def test_enroll(store):
    written = store.enroll(ANN, "otter", [item(1), item(2, image=False)], MODEL)
    assert (written.result["name"], written.result["n_examples"], written.gallery_version) == ("otter", 2, 1)
    assert store.classes() == {"cat": 0, "dog": 0, "otter": 2}
    first, second = written.result["example_ids"]
    assert store.image(first) == (b"image 1", "image/png")
    for id in (second, new_id()):
        with pytest.raises(NotThere):
            store.image(id)
    found = {i.id: i for i in store.changes_since(0, MODEL).items}
    assert found[first].embedding.tolist() == [1] * 4 and found[first].embedding.dtype == np.float32
    assert all(i.embedding is None for i in store.changes_since(0, "m/other").items)
    rows, following = store.examples("otter", 1)
    assert (rows[0].id, rows[0].has_image, following) == (first, True, first)
    assert rows[0].created_at.tzinfo and abs(rows[0].created_at - datetime.now(UTC)) < timedelta(minutes=1)
    rows, following = store.examples("otter", 1, following)
    assert (rows[0].id, rows[0].has_image, following) == (second, False, None)
    with pytest.raises(NotThere, match="did you mean 'otter'"):
        store.examples("oter", 1)
    with pytest.raises(StaleModel):
        store.enroll(ANN, "otter", [item()], "m/0")
    assert store.state().gallery_version == 1


def test_a_key_is_used_once(store):
    first = store.enroll(keyed("k"), "otter", [item()], MODEL)
    again = store.enroll(keyed("k"), "otter", [item()], MODEL)
    store.enroll(keyed("other"), "otter", [item()], MODEL)
    store.enroll(keyed("k", actor="bob"), "otter", [item()], MODEL)
    assert (again.result, again.gallery_version, again.replayed) == (first.result, 1, True)
    assert store.classes()["otter"] == 3
    with pytest.raises(KeyReused):
        store.forget(keyed("k", "another request"), "otter")
    # A day later the key can be used anew.
    with store._database.write() as connection:
        connection.execute(update(tables.requests).values(at=datetime.now(UTC) - timedelta(hours=25)))
    assert not store.forget(keyed("k", "another request"), "otter").replayed


def test_concurrent_writes_with_one_key_take_effect_once(store, url):
    second = Store(url)
    with ThreadPoolExecutor(8) as pool:
        written = list(
            pool.map(lambda i: (store, second)[i % 2].enroll(keyed("k"), "otter", [item(i)], MODEL), range(16))
        )
    second.close()
    assert sum(not w.replayed for w in written) == 1
    assert len({json.dumps(w.result) for w in written}) == 1 and store.classes()["otter"] == 1


def test_a_failed_write_leaves_nothing_behind(store):
    store.observe([known := observation()])
    before = store.changes_since(-1, MODEL)
    for wrong in (
        lambda: store.enroll_observations(keyed("a"), "x", [known.id, new_id()]),
        lambda: store.discard(keyed("b"), [known.id, new_id()]),
        lambda: store.enroll(keyed("c"), "x\0y", [item()], MODEL),
        lambda: store.enroll(keyed("d"), "\ud800", [item()], MODEL),
        lambda: store.enroll(keyed("e"), "x", [item(), NewItem(np.zeros((2, 2), np.float32))], MODEL),
        lambda: store.enroll(keyed("\0"), "x", [item()], MODEL),
        lambda: store.enroll(keyed("f"), "x", [], MODEL),
        lambda: store.forget(keyed("g"), "cat"),
        lambda: store.rename(keyed("h"), "cat", "dog"),
        lambda: store.merge(keyed("i"), "cat", "cat"),
        lambda: store.merge(keyed("j"), "cat", "dog"),
        lambda: store.remove_example(keyed("k"), "cat", known.id),
    ):
        with pytest.raises(OsmlError):
            wrong()
    assert store.changes_since(-1, MODEL) == before and store.unknowns(10)[0] == 1
    assert not store.enroll(keyed("a"), "x", [item()], MODEL).replayed


def test_unicode_survives(store):
    actor = "Ὀδυσσεύς 🦦 %s %(x)s :y 'quoted' \\ \u2028 e\u0301"
    name = actor.replace("\u2028 e\u0301", "é")
    store.enroll(Write(actor, actor, actor), name, [item()], MODEL)
    assert store.classes()[name] == 1 and set(gallery(store).values()) == {name}


def test_what_was_forgotten_does_not_come_back(store):
    store.enroll(ANN, "otter", [item()], MODEL)
    [example] = store.enroll(ANN, "cat", [item()], MODEL).result["example_ids"]
    store.forget(ANN, "cat")
    with pytest.raises(NotThere):
        store.image(example)
    version = store.state().gallery_version
    store.enroll(ANN, "cat", [item()], MODEL)
    store.rename(ANN, "cat", "lynx")
    store.rename(ANN, "dog", "cat")
    changes = store.changes_since(0, MODEL)
    assert changes.trained == {"cat": None, "dog": "cat"}
    assert sorted(i.name for i in changes.items) == ["lynx", "otter"]
    assert [i.name for i in store.changes_since(version, MODEL).items] == ["lynx"]
    assert [(i.id, i.name, i.embedding) for i in store.changes_since(version - 1, MODEL).items if i.name is None] == [
        (example, None, None)
    ]


class Twin:
    """The gallery as plain dictionaries."""

    def __init__(self, bundle):
        self.trained = {name: name for name in bundle}
        self.examples, self.unknown = {}, {}

    def names(self):
        return {n for n in self.trained.values() if n} | {name for name, _ in self.examples.values()}

    def give(self, old, new):
        self.trained = {k: new if v == old else v for k, v in self.trained.items()}
        renamed = {k: (new if n == old else n, v) for k, (n, v) in self.examples.items()}
        self.examples = {k: (n, v) for k, (n, v) in renamed.items() if n is not None}


@pytest.mark.parametrize("seed", range(2))
def test_it_is_what_plain_dictionaries_would_be(store, seed):
    draw, twin, bundle = random.Random(seed), Twin(["cat", "dog"]), ["cat", "dog"]
    pool = ["cat", "dog", "otter", "lynx", "newt"]
    at = {0: {}}
    done = set()
    for step in range(100):
        by = keyed(f"{step}")
        verb = draw.choice(["enroll", "observe", "promote", "rename", "merge", "forget", "remove", "alpha", "discard"])
        a, b, version = draw.choice(pool), draw.choice(pool), store.state().gallery_version
        names = twin.names()
        try:
            if verb == "enroll":
                values = [draw.random() for _ in range(draw.randint(1, 3))]
                new = [item(v, draw.random() < 0.5) for v in values]
                call = partial(store.enroll, by, a, new, MODEL)
                ids = call().result["example_ids"]
                twin.examples |= {i: (a, np.float32(v)) for i, v in zip(ids, values, strict=True)}
            elif verb == "observe":
                one = observation(draw.random())
                store.observe([one])
                store.observe([one])
                twin.unknown[one.id] = np.float32(one.score)
            elif verb == "promote":
                ids = draw.sample(sorted(twin.unknown), min(2, len(twin.unknown)))
                call = partial(store.enroll_observations, by, a, ids)
                call()
                twin.examples |= {i: (a, twin.unknown.pop(i)) for i in ids}
            elif verb == "rename":
                call = partial(store.rename, by, a, b)
                call()
                assert a in names and b not in names
                twin.give(a, b)
            elif verb == "merge":
                call = partial(store.merge, by, a, b)
                assert call().result["n_examples"] == sum(n == a for n, _ in twin.examples.values())
                assert {a, b} <= names and a != b and len(names) > 2
                twin.give(a, b)
            elif verb == "forget":
                call = partial(store.forget, by, a)
                call()
                assert a in names and len(names) > 2
                twin.give(a, None)
            elif verb == "remove":
                id = draw.choice([*sorted(twin.examples), new_id()])
                call = partial(store.remove_example, by, a, id)
                call()
                assert twin.examples.pop(id)[0] == a and len(twin.names()) >= 2
            elif verb == "alpha":
                call = partial(store.set_alpha, by, 0.1)
                call()
            elif verb == "discard":
                ids = draw.sample(sorted(twin.unknown), min(1, len(twin.unknown)))
                call = partial(store.discard, by, ids)
                call()
                twin.unknown = {i: v for i, v in twin.unknown.items() if i not in ids}
        except OsmlError as refused:
            assert isinstance(refused, NotThere | Conflict) or not ids
            assert store.state().gallery_version == version
        else:
            done.add(verb)
            assert store.state().gallery_version == version + (verb not in ("observe", "discard"))
            if verb != "observe":
                assert call().replayed and store.state().gallery_version == version + (verb != "discard")
        at[store.state().gallery_version] = dict(twin.examples)
        counted = {n: sum(m == n for m, _ in twin.examples.values()) for n in twin.names()}
        assert store.classes() == counted and store.unknowns(0)[0] == len(twin.unknown)

        # From any version on, replaying the changes leads here.
        since = draw.choice(sorted(at))
        changes, replica = store.changes_since(since, MODEL), dict(at[since])
        for i in changes.items:
            replica.pop(i.id, None)
            if i.name is not None:
                replica[i.id] = (i.name, i.embedding[0])
        assert replica == twin.examples
        assert {n: changes.trained.get(n, n) for n in bundle} == twin.trained
    assert len(done) >= 8
    with store._database.read() as connection:
        log = connection.execute(select(tables.changes).order_by(tables.changes.c.id)).all()
    # The first line is the model's. Each version has its line.
    assert {row.version for row in log} == set(range(store.state().gallery_version + 1)) == set(at)


# --- the unknown -----------------------------------------------------------------------------------------


def test_the_unknown_pool(store):
    seen = [observation(i, image=i % 2 == 0) for i in range(5)]
    store.observe(seen)
    store.observe(seen[:2])
    total, rows, following = store.unknowns(3)
    assert (total, [r.id for r in rows], following) == (5, sorted((o.id for o in seen), reverse=True)[:3], rows[-1].id)
    _, rest, following = store.unknowns(3, following)
    assert len(rest) == 2 and following is None and not {r.id for r in rest} & {r.id for r in rows}
    one = store.unknown(seen[2].id)
    assert (one.score, one.nearest, one.p_value, one.has_image) == (2, "cat", 0.25, True)
    ids, embeddings = store.unknown_embeddings(MODEL, 4)
    assert ids == sorted((o.id for o in seen), reverse=True)[:4] and embeddings.shape == (4, 4)
    scores = {o.id: o.score for o in seen}
    assert embeddings[:, 0].tolist() == [scores[id] for id in ids] and embeddings.dtype == np.float32
    assert store.unknown_embeddings("m/9", 4)[0] == []
    assert store.state().gallery_version == 0

    first = store.discard(keyed("d"), [seen[0].id, seen[0].id])
    assert first.gallery_version == 0 and store.discard(keyed("d"), [seen[0].id, seen[0].id]).replayed
    with pytest.raises(NotThere):
        store.image(seen[0].id)
    with pytest.raises(NotThere):
        store.discard(ANN, [seen[0].id])
    assert store.enroll_observations(ANN, "otter", [seen[1].id]).gallery_version == 1
    with pytest.raises(NotThere):
        store.unknown(seen[1].id)
    with pytest.raises(NotThere):
        store.enroll_observations(ANN, "otter", [seen[1].id])


def test_pruning_leaves_the_newest_and_every_example(store):
    seen = [observation(i) for i in range(1200)]
    store.observe(seen)
    newest = sorted((o.id for o in seen), reverse=True)
    store.enroll_observations(ANN, "otter", newest[-2:])
    with store._database.write() as connection:
        old = tables.items.c.id == newest[1]
        connection.execute(update(tables.items).where(old).values(created_at=datetime.now(UTC) - timedelta(days=31)))
    assert store.prune_unknowns(100, 30) == 1200 - 2 - 100 + 1
    assert [u.id for u in store.unknowns(1000)[1]] == [newest[0], *newest[2:100]]
    assert store.prune_unknowns(100, 30) == 0
    assert store.prune_unknowns(0, 30) == 99 and set(gallery(store)) == set(newest[-2:])


# --- discovery -------------------------------------------------------------------------------------------


def discovered(store: Store, *groups: Group) -> str:
    id = store.start_discovery(ANN, {"seed": 0}, MODEL).result["id"]
    assert store.claim_job("w", 60).id == id
    assert store.finish_discovery(id, "w", groups, {"n_items": 7})
    return id


def test_groups_are_accepted_merged_and_rejected(store):
    seen = [observation(i) for i in range(12)]
    ids = [o.id for o in seen]
    store.observe(seen)
    store.discard(ANN, [ids[11]])
    job = discovered(
        store,
        Group(0, 0.9, tuple(ids[2::-1]), (ids[1], ids[0])),
        Group(1, 0.8, tuple(ids[3:6]), (ids[3],)),
        Group(2, 0.7, tuple(ids[6:9]), ()),
        Group(3, 0.6, (*ids[9:12], new_id()), ()),
    )
    groups = store.groups(job)
    assert [g.members for g in groups] == [tuple(ids[2::-1]), tuple(ids[3:6]), tuple(ids[6:9]), tuple(ids[9:11])]
    assert groups[0] == Group(0, 0.9, tuple(ids[2::-1]), (ids[1], ids[0]), id=0)

    assert store.merge_groups(ANN, job, 1, 0).result["n_examples"] == 3
    store.enroll_observations(ANN, "newt", [ids[2]])
    assert store.groups(job)[0].members == (ids[1], ids[0], *ids[3:6])
    accepted = store.accept_group(keyed("a"), job, 0, "otter")
    assert accepted.result["example_ids"] == [ids[1], ids[0], *ids[3:6]]
    assert store.accept_group(keyed("a"), job, 0, "otter").result == accepted.result
    with pytest.raises(Conflict):
        store.accept_group(keyed("b"), job, 0, "otter")
    assert store.classes() == {"cat": 0, "dog": 0, "newt": 1, "otter": 5}
    store.reject_group(ANN, job, 2)
    with pytest.raises(Conflict):
        store.merge_groups(ANN, job, 2, 3)
    store.discard(ANN, ids[9:11])
    with pytest.raises(Conflict, match="no unknown item left"):
        store.accept_group(ANN, job, 3, "lynx")
    with pytest.raises(NotThere):
        store.accept_group(ANN, job, 4, "lynx")
    with pytest.raises(NotThere):
        store.groups(new_id())
    groups = store.groups(job)
    assert [g.state for g in groups] == ["accepted", "merged", "rejected", "proposed"] and groups[0].name == "otter"
    assert groups[0].members == (ids[1], ids[0], *ids[3:6]) and groups[1].members == groups[3].members == ()
    assert store.unknowns(0)[0] == 3 and store.state().gallery_version == 2


def found_as(store: Store, *members: list[str]) -> tuple[list[int], list[str]]:
    """The ids that groups of these items get, and what is said to have happened."""
    id = discovered(store, *(Group(i, 0.5, tuple(inside), ()) for i, inside in enumerate(members)))
    return [group.id for group in store.groups(id)], store.job(id).result["changes"]


def observed(store: Store, n: int) -> list[str]:
    seen = [observation(i) for i in range(n)]
    store.observe(seen)
    return [o.id for o in seen]


def test_groups_keep_their_ids(store, url):
    a, b, c, d = (observed(store, n) for n in (5, 4, 3, 3))
    assert found_as(store, a, b, c) == ([0, 1, 2], [])
    # In another order, with a new group, by another replica.
    replica = Store(url)
    assert found_as(replica, d, b, [*a, *observed(store, 2)], c) == ([3, 1, 0, 2], ["3 is new"])
    replica.close()
    # Discoveries that fail, however many, and one that finds nothing.
    for _ in range(25):
        store.start_discovery(ANN, {}, MODEL)
        store.fail_job(store.claim_job("w", 60).id, "w", "no memory")
    nothing = store.start_discovery(ANN, {}, MODEL).result["id"]
    store.claim_job("w", 60)
    store.finish_discovery(nothing, "w", [], {})
    assert store.job(nothing).result == {"changes": ["0 is gone", "1 is gone", "2 is gone", "3 is gone"]}
    assert found_as(store, a, b, c, d) == ([0, 1, 2, 3], [])
    # Items that were dropped or enrolled are not asked; a group that was enrolled is not missed, nor its id used again.
    store.discard(ANN, a[:4])
    latest = store.jobs("discovery", 1)[0].id
    store.enroll_observations(ANN, "newt", b[:1])
    store.accept_group(ANN, latest, 2, "otter")
    new = observed(store, 3)
    assert found_as(store, new, [a[4], *observed(store, 1)], b) == ([4, 0, 1], ["4 is new", "3 is gone"])
    assert found_as(store, b[1:3], b[3:], d, new) == (
        [1, 5, 6, 4],
        ["1 was split into 1 and 5", "6 is new", "0 is gone"],
    )
    assert found_as(store, [*d, *b[1:], *new]) == ([4], ["1, 5 and 6 were merged into 4"])


def test_items_of_merged_groups_are_linked(store):
    a, b, c, d = (observed(store, 3) for _ in range(4))
    job = discovered(store, *(Group(i, 0.5, tuple(inside), ()) for i, inside in enumerate((a, b, c, d))))
    assert store.links() == {}
    store.merge_groups(keyed("m"), job, 1, 0)
    store.merge_groups(keyed("m"), job, 1, 0)
    store.merge_groups(ANN, job, 3, 2)
    blocks = store.links()
    assert {blocks[i] for i in a + b} == {1} and {blocks[i] for i in c + d} == {2} and len(blocks) == 12
    # The union has one id. What is linked to a part is linked to all that the part is merged with.
    later = discovered(store, *(Group(i, 0.5, tuple(inside), ()) for i, inside in enumerate((a + b, c, d))))
    assert store.group(later, 0).id == 0
    store.merge_groups(ANN, later, 1, 0)
    assert set(store.links()) == {*a, *b, *c, *d} and len(set(store.links().values())) == 1
    # Items that are enrolled are out of it; what is no class holds nothing together.
    store.enroll_observations(ANN, "newt", d[:1])
    store.reject_group(ANN, later, 0)
    assert set(store.links()) == set(d[1:])


def test_a_group_that_was_rejected_is_rejected_when_it_is_found_again(store):
    a, b, c = observed(store, 4), observed(store, 4), observed(store, 4)
    store.reject_group(ANN, discovered(store, Group(0, 0.5, tuple(a), ()), Group(1, 0.5, tuple(b), ())), 0)
    states = []
    for members in ([b, [*a, *c[:3]]], [c, a[:1], a[1:], b], [[*a, *c]], [a]):
        job = discovered(store, *(Group(i, 0.5, tuple(inside), ()) for i, inside in enumerate(members)))
        states.append([group.state for group in store.groups(job)])
    assert states == [
        ["proposed", "rejected"],
        ["rejected", "rejected", "rejected", "proposed"],
        ["rejected"],
        ["rejected"],
    ]


def test_jobs_have_one_worker_at_a_time(store, url):
    assert store.claim_job("w", 60) is None
    started = [store.start_discovery(ANN, {"seed": i}, MODEL).result["id"] for i in range(6)]
    second = Store(url)
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda i: (store, second)[i % 2].claim_job(f"w{i}", 60), range(12)))
    second.close()
    assert sorted(job.id for job in claimed if job) == sorted(started)
    i = claimed.index(next(job for job in claimed if job and job.id == started[0]))
    mine, worker = claimed[i], f"w{i}"
    assert mine.args == {"seed": 0, "model": MODEL} and mine.state == "running"
    assert store.renew(mine.id, worker, 0.5, 0) and store.job(mine.id).progress == 0.5
    assert store.claim_job("late", 60).id == mine.id, "its lease has run out"
    assert not store.renew(mine.id, worker, 0.6, 60) and not store.finish_discovery(mine.id, worker, [], {})
    assert not store.fail_job(mine.id, worker, "gone")
    assert store.fail_job(mine.id, "late", "no memory") and store.job(mine.id).error == "no memory"
    assert store.job(mine.id).finished_at.tzinfo is not None
    with pytest.raises(NotThere):
        store.job(new_id())


def test_a_job_that_kills_its_workers_fails_in_the_end(store):
    id = store.start_discovery(ANN, {}, MODEL).result["id"]
    lost = 0
    while store.claim_job("w", 0):
        lost += 1
        assert lost < 100
    assert store.job(id).state == "failed" and "lost" in store.job(id).error


def test_only_the_newest_finished_discoveries_are_kept(store):
    store.observe([one := observation()])
    ids = [discovered(store, Group(0, 1.0, (one.id,), ())) for _ in range(23)]
    waiting = store.start_discovery(ANN, {}, MODEL).result["id"]
    assert [j.id for j in store.jobs("discovery", 100)] == [waiting, *ids[:2:-1]]
    assert [j.id for j in store.jobs("discovery", 2)] == [waiting, ids[-1]]
    with pytest.raises(NotThere):
        store.groups(ids[0])
    assert store.unknown(one.id)


# --- models ----------------------------------------------------------------------------------------------


def test_another_model_is_prepared_and_then_active(empty):
    store = empty
    first = store.ask_model(ANN, MODEL, "models:/m/1", ["cat", "dog"])
    assert first.result == {"target": MODEL, "state": "active"} and store.previous_model() is None
    [example, bare] = store.enroll(ANN, "otter", [item(1), item(2, image=False)], MODEL).result["example_ids"]
    store.observe([seen := observation(3), late := observation(4), observation(5, image=False)])
    assert store.ask_model(ANN, "m/2", "models:/m/2", ["cat", "fox"]).result["state"] == "preparing"
    assert store.state().pending == "m/2" and store.state().model == MODEL
    superseded = store.claim_job("w", 60)
    assert store.ask_model(ANN, "m/3", "models:/m/3", ["cat", "fox"]).result["state"] == "preparing"
    assert store.ask_model(ANN, "m/3", "models:/m/3", ["cat", "fox"]).result["state"] == "preparing"
    assert store.job(superseded.id).error == "superseded" and not store.renew(superseded.id, "w", 0.1, 60)
    assert not store.finish_model(superseded.id, "m/2")
    job = store.claim_job("w", 60)
    assert (job.kind, job.args, store.claim_job("v", 60)) == ("model", {"version": "m/3"}, None)
    assert store.without_embedding("m/3", 1) == [(example, b"image 1")]
    assert dict(store.without_embedding("m/3", 9)) == {example: b"image 1", seen.id: b"image 3", late.id: b"image 4"}
    store.add_embeddings("m/3", {example: vector(10, 6), new_id(): vector(11, 6), late.id: vector(12, 6)})
    store.rename(ANN, "cat", "lynx")
    assert not store.finish_model(job.id, "m/3")
    store.add_embeddings("m/3", {seen.id: vector(13, 6)})
    version = store.state().gallery_version
    assert store.finish_model(job.id, "m/3") and not store.finish_model(job.id, "m/3")
    state = store.state()
    assert (state.model, state.pending, state.gallery_version) == ("m/3", None, version + 1)
    assert store.job(job.id).state == "done" and store.classes() == {"fox": 0, "lynx": 0, "otter": 2}
    found = {i.id: i.embedding for i in store.changes_since(0, "m/3").items}
    assert found[example].tolist() == [10] * 6 and found[bare] is None

    # What another replica saw with the old model before it noticed.
    store.observe([stale := observation(6), hopeless := observation(7, image=False)])
    with pytest.raises(StaleModel):
        store.enroll_observations(ANN, "fox", [stale.id])
    with pytest.raises(OsmlError, match="no image"):
        store.enroll_observations(ANN, "fox", [hopeless.id])
    store.add_embeddings("m/3", {stale.id: vector(14, 6)})
    store.enroll_observations(ANN, "fox", [stale.id])

    assert [m.version for m in store.models()] == ["m/3", "m/2", MODEL]
    assert [m.active for m in store.models()] == [True, False, False]
    assert store.models()[1].activated_at is None and store.models()[0].classes == ("cat", "fox")
    back = store.previous_model()
    assert back.version == MODEL
    store.add_embeddings(MODEL, {stale.id: vector(6)})
    assert store.ask_model(ANN, MODEL, back.source, back.classes).result["state"] == "active"
    assert store.previous_model().version == "m/3" and "dog" in store.classes()


def test_asking_for_the_active_model_ends_a_preparation(store):
    store.enroll(ANN, "otter", [item()], MODEL)
    store.ask_model(ANN, "m/2", "models:/m/2", ["cat", "dog"])
    job = store.claim_job("w", 60)
    version = store.state().gallery_version
    assert store.ask_model(ANN, MODEL, "models:/m/1", ["cat", "dog"]).result["state"] == "active"
    assert store.state().pending is None and store.job(job.id).error == "superseded"
    store.ask_model(ANN, "m/2", "models:/m/2", ["cat", "dog"])
    assert store.fail_job(store.claim_job("w", 60).id, "w", "the bundle is broken")
    assert store.state().pending is None and store.state().gallery_version == version


# --- keys ------------------------------------------------------------------------------------------------


def test_keys(store):
    key = KeyRecord("id1", "door", ("recognize", "enroll"), "00ff")
    store.add_key(key)
    assert store.keys() == [key] and store.state().keys_version == 1
    with pytest.raises(Conflict):
        store.add_key(KeyRecord("id2", "door", (), "11"))
    assert store.revoke_key("door") and not store.revoke_key("door") and not store.revoke_key("gate")
    store.add_key(KeyRecord("id2", "door", ("admin",), "11"))
    records = store.keys()
    assert [(k.id, k.revoked_at is None) for k in records] == [("id1", False), ("id2", True)]
    assert store.state().keys_version == 3


# --- many at once, and accidents -------------------------------------------------------------------------

WRITER = """
import json, sys, numpy as np
from osml_plugin.serve.store import Store, Write, NewItem
store = Store(sys.argv[1])
for i in range(int(sys.argv[3])):
    actor, key = ("all", f"{i}") if i % 2 else (sys.argv[2], f"{i}")
    written = store.enroll(Write(actor, key, "f"), "otter", [NewItem(np.zeros(4, np.float32), b"x" * 5000, "image/png")], "m/1")
    print(json.dumps([written.gallery_version, written.result["example_ids"], written.replayed]), flush=True)
"""


def test_several_processes_write_at_once(store, url):
    started = [process(WRITER, url, f"p{n}", "24") for n in range(4)]
    outputs = [one.communicate(timeout=60) for one in started]
    assert [errors for _, errors in outputs] == [""] * 4
    written = [[json.loads(line) for line in output.splitlines()] for output, _ in outputs]
    fresh = [row for rows in written for row in rows if not row[2]]
    assert all(len(rows) == 24 for rows in written) and len(fresh) == 4 * 12 + 12
    assert sorted(version for version, _, _ in fresh) == list(range(1, 61)) and store.state().gallery_version == 60
    assert {id for _, [id], _ in fresh} == {id for rows in written for _, [id], _ in rows} == set(gallery(store))
    for rows in written:
        own = [version for version, _, replayed in rows if not replayed]
        assert own == sorted(set(own))


def test_what_was_acknowledged_survives_the_death_of_its_writer(store, url):
    acknowledged = {}
    for _ in range(3):
        writer = process(WRITER, url, "p", "100000")
        for line in writer.stdout:
            version, [id], _ = json.loads(line)
            acknowledged[id] = version
            if len(acknowledged) % 30 == 0:
                writer.send_signal(signal.SIGKILL)
                break
        acknowledged |= {ids[0]: version for version, ids, _ in map(json.loads, writer.stdout.read().splitlines())}
        writer.stdin.close()
        writer.stderr.close()
        assert writer.wait(30) == -signal.SIGKILL
    there = gallery(store)
    version = store.state().gallery_version
    assert acknowledged.keys() <= there.keys() and sorted(acknowledged.values()) == list(set(acknowledged.values()))
    assert len(there) == version <= len(acknowledged) + 3
    assert store.enroll(ANN, "otter", [item()], MODEL).gallery_version == version + 1


def test_threads_share_a_store(store):
    with ThreadPoolExecutor(16) as pool:
        versions = list(
            pool.map(lambda i: store.enroll(keyed(f"{i}"), "otter", [item(i)], MODEL).gallery_version, range(64))
        )
    assert sorted(versions) == list(range(1, 65))


@pytest.fixture
def sqlite(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/store.db")
    store.ask_model(ANN, MODEL, "models:/m/1", ["cat", "dog"])
    yield store
    store.close()


def test_a_full_disk_is_said_and_gone_with_its_cause(sqlite):
    def limit(pages: int) -> None:
        with sqlite._database._engine.connect() as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    limit(60)
    acknowledged = 0
    with pytest.raises(StoreFull, match="no room left"):
        for _ in range(100):
            sqlite.enroll(ANN, "otter", [NewItem(vector(0), bytes(20_000), "image/png")], MODEL)
            acknowledged += 1
    with pytest.raises(StoreFull):
        sqlite.observe([Observation(new_id(), NewItem(vector(0), bytes(90_000), "image/png"), MODEL, 1, "cat", None)])
    assert 0 < acknowledged == sqlite.classes()["otter"] == sqlite.state().gallery_version
    limit(10**6)
    assert sqlite.enroll(ANN, "otter", [item()], MODEL).gallery_version == acknowledged + 1


@contextmanager
def mounted(folder, *options: str):
    """A file system of the test's own; where this user may not mount one, the test is skipped, and says so."""
    folder.mkdir(exist_ok=True)
    mount = ["mount", *options, str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here: that takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_lets_forget_make_room(tmp_path):
    picture = NewItem(vector(0), bytes(20_000), "image/png")
    with (
        mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=48M", "tmpfs") as disk,
        closing(Store(f"sqlite:///{disk}/store.db")) as store,
    ):
        reserve = disk / "store.db.reserve"
        assert reserve.stat().st_blocks * 512 >= RESERVED
        store.ask_model(ANN, MODEL, "models:/m/1", ["cat", "dog"])
        (disk / "others").write_bytes(bytes(16 * 2**20))
        with pytest.raises(StoreFull):
            for n in range(10_000):
                store.enroll(ANN, ("otter", "lynx")[n % 2], [picture] * 5, MODEL)
        with (disk / "filler").open("wb") as file, pytest.raises(OSError, match="No space left"):
            while True:
                os.write(file.fileno(), bytes(512))
        with pytest.raises(StoreFull, match="no room left"):
            for _ in range(10_000):  # the log has some room of its own
                store.set_alpha(ANN, 0.1)
        assert reserve.exists(), "it is for what makes room"
        examples, version = store.classes()["otter"], store.state().gallery_version
        assert examples > 100
        assert store.forget(keyed("f"), "otter").result["n_examples"] == examples
        assert store.forget(keyed("f"), "otter").replayed and store.state().gallery_version == version + 1
        assert not reserve.exists() and "otter" not in store.classes()
        assert store.enroll(ANN, "lynx", [picture] * 5, MODEL).result["n_examples"] == 5
        store.reserve_room()
        assert not reserve.exists(), "it takes no room that is needed"
        (disk / "others").unlink()
        store.reserve_room()
        assert reserve.exists() and list(disk.glob(".*")) == []


def test_a_store_that_is_read_only_is_told(tmp_path):
    folder = tmp_path / "disk"
    with closing(Store(f"sqlite:///{folder}/store.db")) as store:
        assert store.is_read_only() is False
        with mounted(folder, "--bind", str(folder)):
            subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
            assert store.is_read_only() is True and store.state().gallery_version == 0
        assert store.is_read_only() is False
        (folder / "store.db").rename(folder / "elsewhere")
        assert store.is_read_only() is False, "it is not there at all"


def test_a_file_that_is_taken_away_is_missed_and_found_again(sqlite, tmp_path):
    (tmp_path / "store.db").rename(tmp_path / "elsewhere.db")
    for use in (sqlite.state, lambda: sqlite.enroll(ANN, "otter", [item()], MODEL)):
        with pytest.raises(StoreUnavailable):
            use()
    assert not (tmp_path / "store.db").exists()
    (tmp_path / "elsewhere.db").rename(tmp_path / "store.db")
    assert sqlite.enroll(ANN, "otter", [item()], MODEL).gallery_version == 1


def test_a_lock_that_is_not_given_back_is_an_error(sqlite, tmp_path):
    with raw(f"sqlite:///{tmp_path}/store.db").connect() as connection:
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        assert sqlite.state().gallery_version == 0, "readers do not wait"
        with pytest.raises(StoreUnavailable, match="locked"):
            sqlite.enroll(ANN, "otter", [item()], MODEL)
    assert sqlite.enroll(ANN, "otter", [item()], MODEL).gallery_version == 1


@pytest.fixture
def on_postgres(postgres_url):
    store = Store(postgres_url)
    store.ask_model(ANN, MODEL, "models:/m/1", ["cat", "dog"])
    yield store
    store.close()


def test_a_server_that_stops_is_missed_and_found_again(on_postgres, postgres_server):
    on_postgres.enroll(ANN, "otter", [item()], MODEL)
    postgres_server.stop()
    try:
        for _ in range(2):
            for use in (on_postgres.state, lambda: on_postgres.enroll(ANN, "otter", [item()], MODEL)):
                with pytest.raises(StoreUnavailable) as caught:
                    use()
                assert "\n" not in str(caught.value)
        with pytest.raises(StoreUnavailable):
            Store(postgres_server.url("other"))
    finally:
        postgres_server.start()
    assert on_postgres.enroll(ANN, "otter", [item()], MODEL).gallery_version == 2


def test_a_server_that_falls_silent_is_an_error_in_time(on_postgres, postgres_server):
    """Bounded by the five seconds after which both ends give up: what hangs here fails."""
    outcome = []

    def use() -> None:
        try:
            on_postgres.enroll(ANN, "otter", [item()], MODEL)
        except Exception as error:
            outcome.append(error)

    with postgres_server.frozen():
        waiting = threading.Thread(target=use, daemon=True)
        waiting.start()
        waiting.join(20)
        assert not waiting.is_alive() and isinstance(outcome[0], StoreUnavailable)
    assert on_postgres.enroll(ANN, "otter", [item()], MODEL).gallery_version >= 1
