"""The endpoint over HTTP, without Ray: recognise, learn, forget, group, go over to another model."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import shutil
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from serving import images_of, make_bundle, served, until

from osml_plugin import OpenSetRecognizer
from osml_plugin.bundle import load_bundle
from osml_plugin.serve import learned
from osml_plugin.serve.client import ServerError
from osml_plugin.serve.keys import make_key
from osml_plugin.serve.settings import ServeConfig, Unknowns
from osml_plugin.thresholds import Fixed


@pytest.fixture(scope="module")
def bundles(digits_folder, tmp_path_factory):
    """Two recognisers of the same digits, from other seeds."""
    folder = tmp_path_factory.mktemp("bundles")
    return [make_bundle(digits_folder, folder / str(seed), seed=seed) for seed in (0, 1)]


@pytest.fixture
def config(bundles, tmp_path):
    return ServeConfig(model=str(bundles[0]), home=tmp_path / "home")


def test_answers_are_the_recognizers(config, bundles, digits_folder):
    images = [file for digit in "0279" for file in images_of(digits_folder, digit, 0, 5)]
    expected = load_bundle(bundles[0]).predict(images, neighbours=2)
    with served(config) as (_, client):
        files = client.recognize(images, neighbours=2)
        text = [base64.b64encode(file.read_bytes()).decode() for file in images]
        posted = client._http.post("/v1/recognize?neighbours=2&remember=false", json={"images": text}).json()
    assert files.gallery_version == 0
    assert files.model_version.startswith("bundle/")
    for i, result in enumerate(files.results):
        assert (result.label, result.nearest, result.known) == (
            expected.names[i],
            expected.nearest[i],
            expected.names[i] is not None,
        )
        assert result.score == pytest.approx(float(expected.scores[i]), rel=1e-4)
        assert result.threshold == pytest.approx(expected.threshold)
        assert result.p_value == pytest.approx(expected.p_values[i], abs=0.02)
        assert [n.name for n in result.neighbours] == [n.name for n in expected.neighbours[i]]
        assert (result.observation_id is None) == result.known
        assert posted["results"][i]["label"] == result.label
        assert posted["results"][i]["observation_id"] is None


def test_the_unknown_are_kept_grouped_named_and_then_known(config, digits_folder):
    met = {digit: images_of(digits_folder, digit, 0, 30) for digit in "6789"}
    with served(config) as (_, client):
        sent = {}
        for digit, files in met.items():
            for file, result in zip(files, client.recognize(files).results, strict=True):
                if result.observation_id:
                    sent[result.observation_id] = (digit, file)
        rows = list(client.unknowns())
        assert {row.id for row in rows} == set(sent)
        assert all(before.created_at >= after.created_at for before, after in pairwise(rows))
        assert client.image(rows[0].id) == sent[rows[0].id][1].read_bytes()

        client.discard(rows[0].id)
        with pytest.raises(ServerError, match="404"):
            client.unknown(rows[0].id)

        found = client.discover()
        assert found.state == "done"
        assert found.n_items == len(rows) - 1
        assert found.n_classes == len(found.groups) >= 2
        assert sum(group.size for group in found.groups) + found.left_out == found.n_items
        first = found.groups[0]
        inside = client.members(found.id, 0).members
        assert inside[: len(first.exemplars)] == first.exemplars
        assert len(inside) == first.size
        name = max("6789", key=[sent[i][0] for i in inside].count)
        accepted = client.accept(found.id, 0, name)
        assert accepted.n_examples == first.size
        assert accepted.gallery_version == 1
        with pytest.raises(ServerError, match="409"):
            client.accept(found.id, 0, "again")
        later = client.recognize(images_of(digits_folder, name, 30, 40)).results
        assert [r.label for r in later].count(name) >= 6
        assert name in [c.name for c in client.classes().classes]

        client.reject(found.id, 1)
        state = [group.state for group in client.discovery(found.id).groups]
        assert state[:2] == ["accepted", "rejected"]


def test_groups_go_on_from_discovery_to_discovery(config, digits_folder):
    def together(client, found) -> dict[int, set[str]]:
        return {group.id: set(client.members(found.id, group.group).members) for group in found.groups}

    with served(config) as (_, client):
        for digit in "6789":
            client.recognize(images_of(digits_folder, digit, 0, 30))
        first = client.discover()
        assert [group.id for group in first.groups] == [group.group for group in first.groups]
        assert len(first.groups) >= 4 and first.changes == []
        merged = client.merge_groups(first.id, 0, 1)
        assert [group.state for group in merged.groups[:2]] == ["merged", "proposed"]
        client.reject(first.id, 2)
        before = together(client, first)
    with served(config) as (_, client):
        for digit in "6789":
            client.recognize(images_of(digits_folder, digit, 30, 34))
        found = client.discover()
        assert found.n_items > first.n_items
        after = together(client, found)
        assert len(after) == len(found.groups)
        assert before[1] <= after[1] and 0 not in after
        assert len(after.keys() & before.keys()) >= 3
        for group in found.groups:
            again = 2 * len(after[group.id] & before[2]) > group.size
            assert group.state == ("rejected" if again else "proposed")
        assert "rejected" in [group.state for group in found.groups]
        assert {line for line in found.changes if line.endswith("is new")} <= {f"{id} is new" for id in after}
        told = client.discover(n_classes=7)
        assert told.n_classes == 7 and any(before[1] <= ids for ids in together(client, told).values())
        assert before[1] <= next(ids for ids in together(client, client.discover()).values() if before[1] & ids)


def test_enrol_rename_merge_forget(config, digits_folder):
    with served(config) as (_, client):
        made = client.enroll("seven", images_of(digits_folder, "7", 0, 6))
        assert (made.n_examples, made.gallery_version) == (6, 1)
        assert client.classes().gallery_version == 1  # the replica that wrote it knows it at once
        assert [e.id for e in client.examples("seven")] == made.example_ids
        assert client.rename("seven", "7").gallery_version == 2
        assert client.remove_example("7", made.example_ids[0]).gallery_version == 3
        assert {c.name: c.enrolled for c in client.classes().classes}["7"] == 5
        client.rename("0", "zero")
        assert client.recognize(images_of(digits_folder, "0", 0, 1)).results[0].label == "zero"
        client.merge("zero", "1")
        assert client.recognize(images_of(digits_folder, "0", 0, 1)).results[0].label == "1"
        client.forget("7")
        assert [c.name for c in client.classes().classes] == ["1", "2", "3"]
        with pytest.raises(ServerError, match=r"unknown class 'seven'.*404"):
            client.forget("seven")
        client.forget("1")
        with pytest.raises(ServerError, match="409"):
            client.forget("2")
        # What was forgotten and comes again is the new examples alone.
        client.enroll("1", images_of(digits_folder, "7", 0, 6))
        assert {c.name: (c.trained, c.enrolled) for c in client.classes().classes}["1"] == (0, 6)


def test_a_key_makes_a_write_happen_once(config, digits_folder):
    with served(config) as (_, client):
        files = images_of(digits_folder, "8", 0, 3)
        first = client.enroll("8", files, idempotency_key="k1")
        again = client.enroll("8", files, idempotency_key="k1")
        assert again == first
        assert {c.name: c.enrolled for c in client.classes().classes}["8"] == 3
        with pytest.raises(ServerError, match="409"):
            client.enroll("8", images_of(digits_folder, "8", 3, 6), idempotency_key="k1")


def test_what_was_learned_is_there_after_a_restart_and_can_be_taken_away(config, digits_folder, tmp_path):
    probe = images_of(digits_folder, "9", 20, 30)
    with served(config) as (_, client):
        client.enroll("9", images_of(digits_folder, "9", 0, 10))
        client.set_alpha(0.1)
        before = client.recognize(probe, remember=False)
    with served(config) as (_, client):
        after = client.recognize(probe, remember=False)
        assert client.model().alpha == pytest.approx(0.1)
    assert after.gallery_version == before.gallery_version == 2
    assert [r.label for r in after.results] == [r.label for r in before.results]
    learned(config.home).save(tmp_path / "taken")
    names = load_bundle(tmp_path / "taken").predict(probe).names
    assert list(names) == [r.label for r in before.results]


def test_two_replicas_agree_within_a_second(config, digits_folder):
    other = config.model_copy(update={"model": None})
    with served(config) as (_, one), served(other) as (_, two):
        for n in range(5):
            version = one.enroll(f"class {n}", images_of(digits_folder, "6", 5 * n, 5 * n + 5)).gallery_version
            began = time.monotonic()
            until(lambda version=version: two.classes().gallery_version >= version, timeout=5)
            assert time.monotonic() - began < 1.0 + 0.5  # half a second of grace for a busy machine
            assert one.classes() == two.classes()


def test_another_model_takes_over_with_all_that_was_enrolled(config, bundles, digits_folder):
    probe = images_of(digits_folder, "9", 20, 40)
    with served(config) as (service, client):
        client.enroll("9", images_of(digits_folder, "9", 0, 15))
        client.recognize(images_of(digits_folder, "6", 0, 10))  # unknown ones are embedded anew as well
        first = client.model().model_version
        service.configure(config.model_copy(update={"model": str(bundles[1])}))
        until(lambda: client.model().model_version != first)
        now = client.model()
        assert now.pending is None
        labels = [r.label for r in client.recognize(probe, remember=False).results]
        expected = load_bundle(bundles[1]).enroll("9", images_of(digits_folder, "9", 0, 15)).predict(probe)
        assert labels == list(expected.names)
        assert {c.name: c.enrolled for c in client.classes().classes}["9"] == 15
        assert client.discover().n_items == len(list(client.unknowns()))
        assert [m.active for m in client.history().models] == [True, False]

        back = client.rollback()
        assert back.target == first
        until(lambda: client.model().model_version == first)
        # Asked for once: what was rolled back is not rolled forward by a replica that starts.
        service.configure(config.model_copy(update={"model": str(bundles[1])}))
        assert client.model().model_version == first


def test_what_is_enrolled_while_a_model_is_prepared_is_not_lost(config, bundles, digits_folder):
    with served(config, jobs=True) as (service, client):
        client.enroll("9", images_of(digits_folder, "9", 0, 10))
        first = client.model().model_version
        service.configure(config.model_copy(update={"model": str(bundles[1])}))
        versions, n = set(), 0
        while client.model().model_version == first or n < 6:
            answer = client.enroll(f"c{n % 3}", images_of(digits_folder, "678"[n % 3], 3 * n % 30, 3 * n % 30 + 3))
            versions.add(answer.gallery_version)
            n += 1
        assert len(versions) == n
        assert sum(c.enrolled for c in client.classes().classes) == 10 + 3 * n


def test_the_model_shows_the_threshold_of_each_class_that_has_its_own(digits_folder, tmp_path):
    """Whatever is enrolled, renamed, merged, forgotten or asked for: the answers are judged by what is shown."""
    overrides = ["threshold={name: class_conformal, alpha: 0.2}"]
    bundle = make_bundle(digits_folder, tmp_path / "bundle", overrides=overrides)
    probe = [file for digit in "0123456" for file in images_of(digits_folder, digit, 32, 40)]
    with served(ServeConfig(model=str(bundle), home=tmp_path / "home")) as (_, client):
        assert set(client.model().thresholds) == set("0123")
        assert client.model().thresholds == load_bundle(bundle).class_thresholds
        steps = [
            lambda: client.enroll("six", images_of(digits_folder, "6", 0, 20)),
            lambda: client.enroll("five", images_of(digits_folder, "5", 0, 1)),
            lambda: client.rename("six", "6"),
            lambda: client.rename("0", "zero"),
            lambda: client.merge("five", "6"),
            lambda: client.merge("zero", "1"),
            lambda: client.set_alpha(0.25),
            lambda: client.forget("2"),
            lambda: client.forget("6"),
        ]
        for step in steps:
            step()
            model, results = client.model(), client.recognize(probe, remember=False).results
            assert set(model.thresholds) == {c.name for c in client.classes().classes}
            for r in results:
                assert r.threshold == model.thresholds.get(r.nearest, model.threshold)
                assert r.known == (r.threshold is None or r.score <= r.threshold) == (r.p_value > model.alpha)
        assert set(model.thresholds) == set("13")
        learned(tmp_path / "home").save(tmp_path / "taken")
        assert load_bundle(tmp_path / "taken").class_thresholds == pytest.approx(model.thresholds)
    conformal = make_bundle(digits_folder, tmp_path / "plain", overrides=["training.epochs=1"])
    with served(ServeConfig(model=str(conformal), home=tmp_path / "other")) as (_, client):
        assert client.model().thresholds == {}


def test_enrolled_examples_make_no_rate_possible_that_the_calibration_cannot_keep(config, digits_folder):
    with served(config) as (service, client):
        n = len(service.live.snapshot.recognizer.calibration_scores)
        client.enroll("7", images_of(digits_folder, "7", 0, 40))
        with pytest.raises(ServerError, match="calibration items are needed.*409"):
            client.set_alpha(1 / (n + 2))
        client.set_alpha(1 / (n + 1))
        assert client.model().threshold is not None


def test_a_chosen_rate_is_taken_up_at_once(config, digits_folder):
    with served(config) as (_, client):
        before = client.model().threshold
        assert client.set_alpha(0.3).gallery_version == 1
        assert client.model().threshold < before
        assert client.model().alpha == pytest.approx(0.3)
        with pytest.raises(ServerError, match="422"):
            client.set_alpha(1.5)


def test_keys_open_what_their_scopes_say(config, digits_folder):
    image = images_of(digits_folder, "0", 0, 1)
    with served(config) as (service, client):
        client.recognize(image)
        plain, record = make_key("camera", ["recognize"])
        service.store.add_key(record)
        until(lambda: service.keyring.required)
        with pytest.raises(ServerError, match="401"):
            client.recognize(image)
        client._headers = {"Authorization": f"Bearer {plain}"}
        client.recognize(image)
        with pytest.raises(ServerError, match=r"enroll.*403"):
            client.enroll("x", image)
        with pytest.raises(ServerError, match="403"):
            client.set_alpha(0.1)
        service.store.revoke_key("camera")
        until(lambda: not _works(client, image))
        # The door does not open because the last key is gone.
        client._headers = {}
        assert not _works(client, image)
        assert client._http.get("/healthz").status_code == 200


def _works(client, image) -> bool:
    try:
        client.recognize(image)
    except ServerError:
        return False
    return True


def test_every_write_leaves_a_line(config, digits_folder):
    with served(config) as (_, client):
        client.enroll("7", images_of(digits_folder, "7", 0, 2), idempotency_key="abc")
        client.enroll("7", images_of(digits_folder, "7", 0, 2), idempotency_key="abc")
        client.forget("7")
    lines = [json.loads(line) for line in (config.home / "audit.jsonl").read_text().splitlines()]
    assert [(line["actor"], line["action"], line["subject"]) for line in lines] == [
        ("configuration", "ask_model", lines[0]["subject"]),
        ("local", "enroll", "7"),
        ("local", "forget", "7"),
    ]
    assert lines[1]["details"]["gallery_version"] == 1


def test_the_unknown_are_kept_up_to_a_number(config, digits_folder):
    few = config.model_copy(update={"unknowns": Unknowns(keep=5)})
    with served(few) as (service, client):
        client.recognize(images_of(digits_folder, "7", 0, 20))
        service.store.prune_unknowns(5, 30)
        assert len(list(client.unknowns())) == 5
    none = config.model_copy(update={"unknowns": Unknowns(keep=0)})
    with served(none) as (_, client):
        assert {r.observation_id for r in client.recognize(images_of(digits_folder, "8", 0, 20)).results} == {None}


def test_without_its_store_it_recognises_and_says_so_where_it_cannot_learn(config, digits_folder, tmp_path):
    home = config.home
    with served(config) as (service, client):
        client.enroll("9", images_of(digits_folder, "9", 0, 3))
        for file in home.glob("store.db*"):
            shutil.move(file, tmp_path / file.name)
        unknown = client.recognize(images_of(digits_folder, "7", 0, 5)).results
        assert {r.observation_id for r in unknown} == {None}
        with pytest.raises(ServerError, match="503"):
            client.enroll("9", images_of(digits_folder, "9", 3, 6))
        until(lambda: not service.store_is_up)
        assert client.ready()
        for file in tmp_path.glob("store.db*"):
            shutil.move(file, home / file.name)
        until(lambda: service.store_is_up)
        assert client.enroll("9", images_of(digits_folder, "9", 3, 6)).gallery_version == 2
        assert {c.name: c.enrolled for c in client.classes().classes}["9"] == 6


def test_embeddings_of_ones_own(tmp_path, digit_vectors):
    vectors, labels = digit_vectors
    known = labels < 5
    recognizer = OpenSetRecognizer("knn").fit(vectors[known][:600], [str(c) for c in labels[known][:600]])
    recognizer.save(tmp_path / "bundle")
    other = OpenSetRecognizer("centroid").fit(vectors[known][:700], [str(c) for c in labels[known][:700]])
    other.save(tmp_path / "other")
    config = ServeConfig(model=str(tmp_path / "bundle"), home=tmp_path / "home")
    nines = vectors[labels == 9]
    with served(config) as (service, client):
        assert client.model().input == "embeddings"
        expected = recognizer.predict(torch.from_numpy(vectors[600:640]))
        found = client.recognize(embeddings=vectors[600:640]).results
        assert [r.label for r in found] == list(expected.names)
        client.enroll("9", embeddings=nines[:10])
        row = next(client.unknowns())
        assert not row.has_image
        with pytest.raises(ServerError, match="404"):
            client.image(row.id)
        with pytest.raises(ServerError, match=r"embeddings, not images.*422"):
            client.recognize(b"anything")
        with pytest.raises(ServerError, match=r"3 wide.*422"):
            client.recognize(embeddings=np.ones((1, 3)))
        # They are embedded anew from what was sent, as images are.
        first = client.model().model_version
        service.configure(config.model_copy(update={"model": str(tmp_path / "other")}))
        until(lambda: client.model().model_version != first)
        expected = other.enroll("9", nines[:10]).predict(nines[10:40])
        assert [r.label for r in client.recognize(embeddings=nines[10:40]).results] == list(expected.names)


def test_metrics_tell_what_was_done(config, digits_folder):
    with served(config) as (_, client):
        client.recognize([*images_of(digits_folder, "1", 0, 5), *images_of(digits_folder, "7", 0, 5)])
        page = client._http.get("/metrics").text
    told = {line.split(" ")[0]: float(line.split(" ")[-1]) for line in page.splitlines() if line.startswith("osml_")}
    assert told['osml_items_total{verdict="unknown"}'] >= 4
    assert any(name.startswith('osml_requests_total{method="POST",route="/v1/recognize",status="200"') for name in told)
    assert told["osml_gallery_references"] > 50
    assert told["osml_alpha"] == pytest.approx(0.05)
    assert "osml_request_seconds_bucket" in page and "osml_batch_size_bucket" in page


def test_calls_that_come_together_share_a_pass(config, digits_folder):
    with served(config) as (service, client):
        sizes = []
        service._batches._observe = sizes.append
        files = images_of(digits_folder, "1", 0, 30)

        async def at_once():
            async def one(file):
                snapshot, items = await service.items([file.read_bytes()], None)
                return await service.recognize(snapshot, items, neighbours=1, remember=False)

            return await asyncio.gather(*map(one, files))

        together = [r[0]["score"] for r in asyncio.run(at_once())]
        assert sum(sizes) == 30 and len(sizes) <= 3
        alone = [client.recognize(file, remember=False).results[0].score for file in files]
        assert together == pytest.approx(alone, rel=1e-3)


def fresh(config):
    """What a replica that starts now would know."""
    return learned(config.home)


def test_replicas_that_came_another_way_decide_alike(config, digits_folder):
    """One takes in a write after the other, the other finds them all."""
    with served(config) as (service, client):
        seen = client.recognize(images_of(digits_folder, "7", 0, 20)).results
        client.enroll("7", images_of(digits_folder, "7", 20, 30))
        client.enroll("7", observations=[r.observation_id for r in seen if r.observation_id])  # these are older
        client.enroll("8", images_of(digits_folder, "8", 0, 10))
        here, there = service.live.snapshot.recognizer, fresh(config)
        assert here.threshold.tau == pytest.approx(there.threshold.tau, rel=1e-6)
        assert np.allclose(here.enrolled_scores, there.enrolled_scores)
        assert here.class_names == there.class_names


def test_all_that_was_trained_may_be_forgotten(config, digits_folder):
    with served(config) as (_, client):
        client.set_alpha(0.1)
        for digit in "67":
            client.enroll(digit, images_of(digits_folder, digit, 0, 15))
        for digit in "0123":
            client.forget(digit)
        assert [c.name for c in client.classes().classes] == ["6", "7"]
        labels = [r.label for r in client.recognize(images_of(digits_folder, "6", 15, 40)).results]
        assert labels.count("6") >= 15  # the threshold is fitted on what is left
        client.set_alpha(0.2)
        assert client.enroll("8", images_of(digits_folder, "8", 0, 5)).gallery_version == 9
    assert fresh(config).class_names == ["6", "7", "8"]


def test_a_rate_that_nothing_can_be_fitted_on_is_refused(tmp_path, digit_vectors):
    vectors, labels = digit_vectors
    known = labels < 5
    names = [str(c) for c in labels[known]]
    nothing = (vectors[:0].reshape(0, vectors.shape[1]), [])
    recognizer = OpenSetRecognizer("knn", Fixed(tau=0.5)).fit(vectors[known], names, calibration=nothing)
    recognizer.save(tmp_path / "bundle")
    with served(ServeConfig(model=str(tmp_path / "bundle"), home=tmp_path / "home")) as (_, client):
        with pytest.raises(ServerError, match=r"no calibration items.*409"):
            client.set_alpha(0.1)
        assert client.enroll("9", embeddings=vectors[labels == 9][:5]).gallery_version == 1


def test_a_merged_class_keeps_the_proxies_of_both(tmp_path, digits_folder):
    bundle = make_bundle(digits_folder, tmp_path / "bundle", overrides=["detector=max_logit"])
    with served(ServeConfig(model=str(bundle), home=tmp_path / "home")) as (service, client):
        of_both = images_of(digits_folder, "2", 0, 20) + images_of(digits_folder, "3", 0, 20)
        before = client.recognize(of_both, remember=False).results
        client.merge("2", "3")
        after = client.recognize(of_both, remember=False).results
        assert service.live.snapshot.recognizer.detector.name == "max_logit"
        assert [r.nearest.replace("2", "3") for r in before] == [r.nearest for r in after]


def test_little_that_becomes_much_does_not_stop_others(config, digits_folder):
    wide = io.BytesIO()
    Image.new("1", (5600, 5600)).save(wide, "PNG")
    with served(config) as (service, client):
        small = client._http.post(
            "/v1/discoveries", content=b"[" * 100_000, headers={"Content-Type": "application/json"}
        )
        assert small.status_code == 413
        longest = []

        async def work():
            async def beat():
                while not done.is_set():
                    began = time.perf_counter()
                    await asyncio.sleep(0.005)
                    longest.append(time.perf_counter() - began)

            done = asyncio.Event()
            pulse = asyncio.create_task(beat())
            await service.items([wide.getvalue()] * 6, None)
            done.set()
            await pulse

        asyncio.run(work())
        assert max(longest) < 1  # six of them take seconds
        with pytest.raises(ServerError, match=r"pixels in all.*422"):
            client.recognize([wide.getvalue()] * 10)


def test_the_page_of_the_routes_needs_no_network(config):
    with served(config) as (_, client):
        page = client._http.get("/", follow_redirects=True)
        assert page.url.path == "/docs"
        sources = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert any(source.endswith(".js") for source in sources)
        for source in sources:
            assert source.startswith("/") and client._http.get(source).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "sent", "says"),
    [
        ("POST", "/v1/recognize?neighbors=3", {"json": {"images": []}}, "did you mean 'neighbours'?"),
        ("GET", "/v1/classes?limit=3", {}, "no query parameters"),
        ("POST", "/v1/recognize", {"files": [("files", (None, "image.jpg"))]}, "files=@"),
        ("PATCH", "/v1/classes/0", {"json": {"name": "unknown"}}, "unknown"),
        ("PUT", "/v1/model/alpha", {"json": {"alpha": 1e-5}}, "at least 99999 calibration items"),
    ],
)
def test_what_would_be_misunderstood_is_refused(config, method, path, sent, says):
    with served(config) as (_, client):
        answer = client._http.request(method, path, **sent)
        assert answer.status_code in (409, 422) and says in answer.json()["detail"]
