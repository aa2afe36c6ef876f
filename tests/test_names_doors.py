"""One name is one class, whichever door it comes through and in whatever Unicode form."""

import json
import unicodedata
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image
from serving import served
from sqlalchemy import create_engine, text
from test_names import NO_TEXT, REFUSED, TAKEN, TEXTS, ZWNJ

from osml_plugin import OpenSetRecognizer, evaluate
from osml_plugin.bundle import MANIFEST, _manifest_sha256, load_bundle
from osml_plugin.commands import enroll, forget
from osml_plugin.data import Items, Split, draw_split, open_items, test_indices, training_roles, write_embeddings
from osml_plugin.discovery import Discovery
from osml_plugin.errors import OsmlError
from osml_plugin.evaluation import evaluate_embeddings
from osml_plugin.names import class_name
from osml_plugin.serve.settings import ServeConfig
from osml_plugin.serve.store import Conflict, NewItem, NotThere, Store, Write

pytest_plugins = ["postgres"]

NFC, NFD = (lambda name, form=form: unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
ANN, MODEL = Write("ann"), "m/1"
LABELS = ("label", "word", "word in capitals", "word with a capital")
CENTERS = np.random.default_rng(0).normal(size=(8, 6)).astype("f4")


def items_of(center: int, n: int = 30, seed: int = 0) -> np.ndarray:
    return CENTERS[center] + 0.05 * np.random.default_rng(seed + 100 * center).normal(size=(n, 6)).astype("f4")


def recognizer(*names: str) -> OpenSetRecognizer:
    embeddings = np.concatenate([items_of(i) for i in range(len(names))])
    return OpenSetRecognizer("knn").fit(embeddings, np.repeat(names, 30))


@pytest.fixture(scope="module")
def fitted():
    return recognizer("Käfer", "Möwe")


def doors(tmp_path):
    """Each takes a name of a class and gives the names that are known behind it."""
    rows = torch.from_numpy(items_of(2, 2))

    def fit(name):
        return recognizer("cat", name).class_names

    def add(name):
        return base.gallery.add(name, rows).class_names

    base, grouped = recognizer("cat", "dog"), one_group(2)

    def learn(name):
        return deepcopy(base).enroll(name, rows).class_names

    def groups(name):
        found = deepcopy(base)
        found.enroll_groups(rows, grouped, {0: name})
        return found.class_names

    def items(name):
        return Items((name, name), None, rows.numpy(), None).class_names()

    def file(name):
        np.savez(tmp_path / "e.npz", embeddings=rows.numpy(), labels=np.array([name, name], dtype=object).astype(str))
        return open_items(tmp_path / "e.npz").class_names()

    def written(name):
        write_embeddings(tmp_path / "w.npz", rows.numpy(), [name, name])
        return open_items(tmp_path / "w.npz").class_names()

    @cache
    def store():
        opened = Store(f"sqlite:///{tmp_path}/store.db")
        opened.ask_model(ANN, MODEL, "m", ["cat", "dog"])
        return opened

    def stored(name):
        found = store().enroll(ANN, name, [NewItem(rows[0].numpy())], MODEL)
        assert found.result["name"] in store().classes()
        return [store().forget(ANN, name).result["name"]]

    return [fit, add, learn, groups, items, file, written, stored]


def one_group(n: int) -> Discovery:
    return recognizer("a", "b").group(torch.from_numpy(items_of(3, n)), n_classes=1)


@pytest.mark.parametrize("door", range(8))
def test_every_door_takes_the_same_names(tmp_path, door):
    door = doors(tmp_path)[door]
    for name in TAKEN.values():
        assert NFC(name) in door(NFD(name))
    for kind, name in REFUSED.items():
        if door.__name__ in ("items", "file", "written") and kind in LABELS:
            assert name in door(name)  # the items are of unknown classes
            continue
        with pytest.raises(OsmlError) as error:
            door(name)
        assert len(str(error.value).splitlines()) == 1
        str(error.value).encode()


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
def test_what_is_no_text_is_refused_when_it_is_enrolled(fitted, value):
    before = fitted.class_names
    with pytest.raises(OsmlError, match="the name of a class is text"):
        fitted.enroll_groups(items_t(3, 2), one_group(2), {0: value})
    if not isinstance(value, list):  # which is no key of a dictionary
        with pytest.raises(OsmlError, match="the name of a class is text"):
            fitted.enroll(value, items_t(2, 2))
    assert fitted.class_names == before


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(TEXTS)
def test_a_gallery_takes_a_name_or_raises_our_error(fitted, name):
    before = fitted.gallery
    try:
        after = before.add(name, torch.from_numpy(items_of(2, 2)))
    except OsmlError:
        return
    assert set(after.class_names) - set(before.class_names) == {class_name(name)} - set(before.class_names)
    assert set(after.remove(NFD(name)).class_names) == set(before.class_names) - {class_name(name)}


def test_a_class_is_enrolled_and_forgotten_in_whatever_form(fitted):
    found = recognizer("Käfer", "Möwe", "Fuchs")
    found.enroll(NFD("Käfer"), items_of(0, 4, seed=5)).learn({NFD("Möwe"): items_t(1, 3, 5), "Möwe": items_t(1, 3, 7)})
    assert found.class_names == ["Fuchs", "Käfer", "Möwe"]
    assert found.gallery.enrolled.sum() == 10
    found.forget(NFD("Käfer"))
    assert found.class_names == ["Fuchs", "Möwe"] and not {"Käfer", NFD("Käfer")} & set(found.calibration.names)
    with pytest.raises(OsmlError, match="unknown class '5'"):
        found.forget(5)


def items_t(*args) -> torch.Tensor:
    return torch.from_numpy(items_of(*args))


def test_groups_of_one_name_in_two_forms_become_one_class():
    found = recognizer("cat", "dog")
    items = np.concatenate([items_of(3, 20), items_of(4, 20)])
    enrolled = found.enroll_groups(items, found.discover(items, n_classes=2), {0: "Käfer", 1: NFD("Käfer")})
    assert found.class_names == ["cat", "dog", "Käfer"] and {g.name for g in enrolled} == {"Käfer"}


def test_test_data_from_a_mac_are_of_the_classes_of_a_model_from_elsewhere():
    for trained, tested in ((NFC, NFD), (NFD, NFC)):
        found = recognizer(trained("Käfer"), trained("Möwe"))
        items = torch.from_numpy(np.concatenate([items_of(i, 10, seed=9) for i in range(3)]))
        names = np.repeat([tested("Käfer"), tested("Möwe"), "Dachs"], 10)
        evaluation = evaluate_embeddings(found, items, names)
        assert evaluation.metrics.auroc == 1
        assert evaluation.labels.tolist() == [0] * 10 + [1] * 10 + [-1] * 10


def test_test_data_that_look_alike_are_refused():
    found = recognizer(f"کار{ZWNJ}ها", "b")
    with pytest.raises(OsmlError, match="look alike"):
        evaluate_embeddings(found, items_t(0, 4), ["کارها"] * 4)
    items = Items(("کارها", "b"), None, items_of(0, 2), None)
    with pytest.raises(OsmlError, match="look alike"):
        test_indices(items, found.class_names, ())


def test_folders_of_two_forms_are_one_class(tmp_path):
    for form, n in ((NFC, 0), (NFD, 3)):
        folder = tmp_path / "data" / form("Käfer")
        folder.mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.full((4, 4), 10 * i + n, np.uint8)).save(folder / f"{i}.png")
    items = open_items(tmp_path / "data")
    assert items.class_names() == ["Käfer"] and len(items) == 6


def test_a_split_and_its_data_may_be_of_two_forms(tmp_path):
    (tmp_path / "split.json").write_text(json.dumps({"known": [NFD("Käfer"), "Möwe"], "unknown": ["Dächs"]}))
    split = Split.load(tmp_path / "split.json")
    items = Items((NFC("Käfer"), NFD("Möwe"), NFD("Dächs")) * 4, None, np.eye(12, dtype="f4"), None)
    split.check(items.class_names())
    assert len(training_roles(items, split).train) >= 2
    with pytest.raises(OsmlError, match="names class 'Käfer' twice"):
        Split(("Käfer", NFD("Käfer"), "Möwe")).check(items.class_names())


@pytest.mark.parametrize("word", ["unknown", "Unknown", "UNKNOWN"])
def test_a_folder_of_what_is_unknown_is_no_class(word):
    with pytest.raises(OsmlError, match=f"a class '{word}', but that is the label of what is unknown"):
        draw_split(["a", "b", "c", word])
    for split in (Split(("a", "b", word)), Split(("a", "b"), (word,))):
        with pytest.raises(OsmlError, match=f"names class '{word}' in '(known|pseudo_unknown)'"):
            split.check(["a", "b", word])
    Split(("a", "b"), unknown=(word,)).check(["a", "b", word])
    found = recognizer("a", "b")
    evaluation = evaluate_embeddings(found, torch.cat([items_t(0, 5), items_t(5, 5)]), ["a"] * 5 + [word] * 5)
    assert evaluation.labels.tolist() == [0] * 5 + [-1] * 5


# --- what 0.1.0 wrote ------------------------------------------------------------------------------------


def rewritten(bundle, names: dict[str, str]):
    """A bundle as 0.1.0 wrote it: with other names of its classes."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["classes"] = {i: names.get(name, name) for i, name in manifest["classes"].items()}
    for kind, held in manifest["held_out_names"].items():
        manifest["held_out_names"][kind] = [names.get(name, name) for name in held]
    manifest["sha256"] = _manifest_sha256(manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False))
    return bundle


def test_a_bundle_of_an_older_release_opens_whatever_its_classes_are_called(tmp_path):
    recognizer("Käfer", "b", "c", "d").save(tmp_path / "bundle")
    rewritten(tmp_path / "bundle", {"Käfer": NFD("Käfer"), "b": "unknown", "c": " c", "d": "x" * 700})
    found = load_bundle(tmp_path / "bundle")
    assert sorted(found.class_names) == sorted(["Käfer", "unknown", " c", "x" * 700])
    assert set(found.calibration.names) == set(found.class_names)
    found.enroll("unknown", items_of(1, 3)).forget("unknown")  # a class that is there may learn more
    with pytest.raises(OsmlError, match="label of what is unknown"):
        found.enroll("unknown", items_of(1, 3))


@pytest.mark.parametrize("with_proxies", [False, True])
def test_two_forms_of_one_name_in_a_bundle_are_one_class(tmp_path, with_proxies):
    embeddings = np.concatenate([items_of(i) for i in range(3)])
    made = OpenSetRecognizer("max_logit" if with_proxies else "centroid").fit(
        embeddings,
        np.repeat(["a", "b", "c"], 30),
        class_weights=torch.from_numpy(CENTERS[:3]) if with_proxies else None,
    )
    made.save(tmp_path / "bundle")
    rewritten(tmp_path / "bundle", {"b": NFC("Käfer"), "c": NFD("Käfer")})
    found = load_bundle(tmp_path / "bundle")
    assert found.class_names == ["a", "Käfer"] and set(found.calibration.names) == {"a", "Käfer"}
    assert (found.gallery.labels == 1).sum() == (made.gallery.labels > 0).sum()
    answer = found.predict(np.concatenate([items_of(i, 5, seed=3) for i in range(3)]))
    assert set(answer.nearest[:5]) == {"a"} and set(answer.nearest[5:]) == {"Käfer"}
    if with_proxies:
        assert found.class_weights.shape[:2] == (2, 2) and len(found.proxy_ids) == 2
    found.save(tmp_path / "again")
    assert load_bundle(tmp_path / "again").class_names == ["a", "Käfer"]


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path) -> str:
    return f"sqlite:///{tmp_path}/store.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url")


def test_a_store_keeps_one_class_for_one_name(url):
    store = Store(url)
    store.ask_model(ANN, MODEL, "m", ["Käfer", "Möwe"])
    new = [NewItem(CENTERS[0])]
    assert store.enroll(ANN, NFD("Käfer"), new, MODEL).result["name"] == "Käfer"
    assert store.classes() == {"Käfer": 1, "Möwe": 0} and len(store.examples(NFD("Käfer"), 9)[0]) == 1
    store.rename(ANN, NFD("Käfer"), NFD("Bär"))
    with pytest.raises(Conflict, match="there is a class 'Möwe' already"):
        store.rename(ANN, "Bär", NFD("Möwe"))
    store.enroll(ANN, "a b", new, MODEL)
    for call in (
        lambda: store.enroll(ANN, "a\u00a0b", new, MODEL),
        lambda: store.rename(ANN, "Möwe", "a  b"),
    ):
        with pytest.raises(OsmlError, match="look alike"):
            call()
    store.rename(ANN, "a b", "a\u00a0b")  # the class itself may get another look
    store.merge(ANN, NFD("Möwe"), NFD("Bär"))
    [example, *_] = store.examples("Bär", 9)[0]
    store.remove_example(ANN, NFD("Bär"), example.id)
    assert store.classes() == {"Bär": 0, "a\u00a0b": 1}
    with pytest.raises(NotThere):
        store.forget(ANN, "Möwe")
    store.close()


def test_names_of_an_older_store_are_composed(url):
    store = Store(url)
    store.ask_model(ANN, MODEL, "m", ["x", "y", "Möwe", "cat"])
    store.enroll(ANN, "Käfer", [NewItem(CENTERS[0])], MODEL)
    store.rename(ANN, "x", "w")
    store.forget(ANN, "Möwe")
    store.close()
    engine = create_engine(url.replace("postgresql:", "postgresql+pg8000:"))
    with engine.begin() as connection:  # as 0.1.0 left it
        of = {"nfd": NFD("Käfer"), "bär": NFD("Bär"), "other": NFD("Möwe")}
        two = [form("Uhu ä") for form in (NFC, NFD)], [form("Fuß ö") for form in (NFC, NFD)]
        classes = json.dumps([NFD("Bär"), NFD("Möwe"), "Möwe", "cat", *two[0], *two[1], NFD("Wü")])
        connection.execute(text("UPDATE osml_items SET name = :nfd, nearest = :nfd"), of)
        connection.execute(text("UPDATE osml_models SET classes = :classes"), {"classes": classes})
        connection.execute(text("DELETE FROM osml_trained_classes"))
        # Of two forms of a name, this one or that one was forgotten, or both; and a name of one form.
        forgotten = NFD("Möwe"), two[0][0], *two[1], NFD("Wü")
        for name, current in ((NFD("Bär"), NFD("Grizzlybär")), *((name, None) for name in forgotten)):
            row = {"name": name, "current": current}
            connection.execute(text("INSERT INTO osml_trained_classes VALUES (:name, :current)"), row)
        connection.execute(text("UPDATE osml_schema SET version_num = '0002'"))
    engine.dispose()
    store = Store(url)
    assert store.classes() == {"Grizzlybär": 0, "Käfer": 1, "Möwe": 0, "Uhu ä": 0, "cat": 0}
    assert store.changes_since(0, MODEL).trained == {"Bär": "Grizzlybär", "Fuß ö": None, "Wü": None}
    assert [i.name for i in store.changes_since(0, MODEL).items] == ["Käfer"]
    assert store.models()[0].classes == ("Bär", "Möwe", "cat", "Uhu ä", "Fuß ö", "Wü")
    store.close()


def test_commands_take_a_name_in_whatever_form(tmp_path):
    recognizer("Käfer", "Möwe", "Fuchs").save(tmp_path / "bundle")
    np.savez(tmp_path / "new.npz", embeddings=items_of(4, 3))
    enroll(tmp_path / "bundle", NFD("Bär"), [tmp_path / "new.npz"], progress=False)
    forget(tmp_path / "bundle", NFD("Käfer"))
    labels = np.repeat([NFD("Möwe"), "Bär", "Dachs"], 10)
    embeddings = np.concatenate([items_of(i, 10, seed=9) for i in (1, 4, 6)])
    np.savez(tmp_path / "test.npz", embeddings=embeddings, labels=labels)
    evaluation, _ = evaluate(tmp_path / "bundle", tmp_path / "test.npz", progress=False)
    assert evaluation.metrics.n_known_items == 20 and evaluation.metrics.auroc == 1


# --- over HTTP -------------------------------------------------------------------------------------------

ODD = (
    *("birds/robin", "/lead", "trail/", "a//b", "birds/examples/robin", "examples", "50%", "a?b#c", "...", "CON"),
    *("ä" * 250, f"می{ZWNJ}خواهم", "❤\ufe0f", "猫\u3000犬", "unknown", "-1", " k", "𒀀" * 500),
)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory):
    """A model of an older release, whose classes are called oddly."""
    home = tmp_path_factory.mktemp("odd")
    names = [f"k{i}" for i in range(len(ODD))]
    embeddings = np.concatenate([10 * np.eye(20, dtype="f4")[i] + 0.1 * np.eye(20, dtype="f4") for i in range(18)])
    OpenSetRecognizer("knn").fit(embeddings, np.repeat(names, 20)).save(home / "bundle")
    rewritten(home / "bundle", dict(zip(names, ODD, strict=True)))
    with served(ServeConfig(home=home / "home", model=str(home / "bundle")), jobs=False) as (_, client):
        yield client


def names_of(client) -> set[str]:
    return {c.name for c in client.classes().classes}


def test_all_names_of_a_model_can_be_listed_renamed_merged_and_forgotten(endpoint):
    assert names_of(endpoint) == set(ODD)
    for name in ODD[:-2]:
        new = f"new {name}" if name.strip() == name else "new"
        assert endpoint.rename(name, NFD(new)).name == NFC(new)
        assert list(endpoint.examples(new)) == [] and endpoint.enroll(NFD(new), embeddings=np.eye(20)[:2]).name == new
        assert len(list(endpoint.examples(new))) == 2
        endpoint.remove_example(new, next(iter(endpoint.examples(new))).id)
        if name in ("unknown", "birds/robin", "a//b"):
            assert endpoint.merge(new, ODD[-1]).name == ODD[-1]
        else:
            assert endpoint.forget(new).name == new
    assert names_of(endpoint) == set(ODD[-2:])
    endpoint.enroll("a/b", embeddings=np.eye(20)[:1])
    assert endpoint._http.delete("/v1/classes/a/b").status_code == 200  # a slash may come as it is
    assert endpoint._http.delete("/v1/classes/a/b").status_code == 404


@pytest.mark.parametrize("kind", sorted(REFUSED.keys() - {"half a character"}))  # which cannot be sent
def test_a_name_that_is_refused_is_refused_over_http(endpoint, kind):
    name, before = REFUSED[kind], names_of(endpoint)
    for call in (
        lambda: endpoint.enroll(name, embeddings=np.eye(20)[:1]),
        lambda: endpoint.rename(ODD[-1], name),
    ):
        with pytest.raises(OsmlError) as error:
            call()
        assert len(str(error.value).splitlines()) == 1
    assert names_of(endpoint) == before


def test_the_body_of_a_class_that_is_called_examples_is_no_upload(endpoint):
    for path in ("examples", "a/examples", "a%2Frecognize"):
        assert endpoint._http.patch(f"/v1/classes/{path}", content=b"x" * 2**17).status_code == 413


def test_an_address_with_a_wrong_method_names_the_right_ones(endpoint):
    answer = endpoint._http.get("/v1/classes/birds/robin")
    assert answer.status_code == 405 and answer.headers["Allow"] == "PATCH, DELETE"
    for path, allowed in (("examples", "GET, POST"), (f"examples/{'0' * 32}", "DELETE"), ("merge", "POST")):
        answer = endpoint._http.patch(f"/v1/classes/nobody/{path}", json={"name": "b"})
        assert answer.status_code == 405 and answer.headers["Allow"] == allowed
    assert endpoint._http.delete("/v1/classes/nobody/merge").status_code == 405
    endpoint.enroll("its/examples", embeddings=np.eye(20)[:1])
    assert endpoint.rename("its/examples", "its/merge").name == endpoint.forget("its/merge").name == "its/merge"
