"""What is written down of a sweep, and read back."""

from __future__ import annotations

import errno
import json
from types import SimpleNamespace

import pytest

from osml_plugin.tune.recorder import Recorder, Relay
from osml_plugin.tune.results import Sweep


def ray_trial(id_: str, margin: float = 1.0, error: Exception | None = None) -> SimpleNamespace:
    return SimpleNamespace(trial_id=id_, config={"loss.margin": margin}, get_error=lambda: error)


def report(epoch: int, oscr: float) -> dict:
    figures = {"epoch": epoch, "oscr": oscr}
    chosen = {"detector": f"of epoch {epoch}"}
    return figures | {"reported": list(figures), "chosen": chosen, "curve": [[0.0, oscr]], "time_total_s": 1.0 * epoch}


def recorder(tmp_path, epochs: int = 3, ids: str = "abc") -> Recorder:
    made = Recorder(tmp_path / "trials.jsonl", Sweep([], [], "oscr", 2), lambda params: epochs)
    made.meet(list(ids))
    return made


def test_it_is_the_same_when_read_back(tmp_path):
    first = recorder(tmp_path)
    a, b = ray_trial("a"), ray_trial("b", 2.0)
    first.started(a)
    first.started(b)
    for epoch, oscr in ((1, 0.5), (2, 0.9), (3, 0.7)):
        first.reported(a, report(epoch, oscr))
    first.completed(a)
    first.reported(b, report(1, 0.4))
    first.completed(b)
    assert recorder(tmp_path).sweep == first.sweep
    one, two = first.sweep.trials
    assert (one.status, two.status) == ("finished", "stopped")
    assert one.best("oscr")["epoch"] == 2
    assert one.chosen == {"detector": "of epoch 2"}
    assert list(one.curve) == [(0.0, 0.9)]
    assert two.params == {"loss.margin": 2.0}


def test_epochs_that_are_repeated_after_a_resume_count_once(tmp_path):
    first = recorder(tmp_path)
    first.started(ray_trial("a"))
    first.reported(ray_trial("a"), report(1, 0.5))
    first.reported(ray_trial("a"), report(2, 0.9))
    second = recorder(tmp_path)
    second.started(ray_trial("a"))
    second.reported(ray_trial("a"), report(2, 0.8))
    assert [(h["epoch"], h["oscr"]) for h in second.sweep.trials[0].history] == [(1, 0.5), (2, 0.8)]


def test_trials_are_numbered_as_they_were_drawn_not_as_they_began(tmp_path):
    now = recorder(tmp_path)
    now.started(ray_trial("b"))
    now.started(ray_trial("a"))
    assert [(t.id, t.number) for t in now.sweep.trials] == [("a", 0), ("b", 1)]


def test_a_line_that_was_cut_off_is_no_line(tmp_path):
    recorder(tmp_path).started(ray_trial("a"))
    with open(tmp_path / "trials.jsonl", "a") as out:
        out.write('{"id": "b", "par')
    second = recorder(tmp_path)
    assert [t.id for t in second.sweep.trials] == ["a"]
    second.started(ray_trial("c"))
    assert [t.id for t in recorder(tmp_path).sweep.trials] == ["a", "c"]


def test_trials_that_ray_does_not_know_are_forgotten(tmp_path, monkeypatch):
    """They began after its last snapshot, and are drawn again; no number is given twice."""
    now = recorder(tmp_path)
    for name in "abc":
        now.started(ray_trial(name))
    monkeypatch.setattr(Recorder, "current", now)
    d = ray_trial("d")
    Relay().on_trial_start(0, [ray_trial("a"), ray_trial("c"), d], d)
    assert [(t.id, t.number) for t in now.sweep.trials] == [("a", 0), ("c", 2), ("d", 3)]


def test_what_failed_and_is_taken_up_again_is_no_failure(tmp_path):
    now = recorder(tmp_path, epochs=1)
    a = ray_trial("a", error=RuntimeError("first line\nOSError: the disk is full"))
    now.died(a)
    assert now.sweep.trials[0].status == "failed"
    assert now.sweep.trials[0].error == "OSError: the disk is full"
    now.started(a)
    now.reported(a, report(1, 0.5))
    now.completed(a)
    assert (now.sweep.trials[0].status, now.sweep.trials[0].error) == ("finished", None)


def test_a_reported_error_is_a_failure(tmp_path):
    now = recorder(tmp_path)
    now.started(ray_trial("a"))
    now.reported(ray_trial("a"), {"epoch": 0, "oscr": 0.0, "error": "the loss is nan"})
    now.completed(ray_trial("a"))
    assert (now.sweep.trials[0].status, now.sweep.trials[0].error) == ("failed", "the loss is nan")
    assert now.sweep.ranked() == []
    assert json.loads((tmp_path / "trials.jsonl").read_text().splitlines()[-1])["status"] == "failed"


def test_a_full_disk_halts_and_nothing_that_was_written_is_lost(tmp_path):
    recorder(tmp_path).started(ray_trial("a"))
    journal = tmp_path / "trials.jsonl"
    written = journal.read_bytes() + b'{"id": "b", "par'  # cut off
    journal.write_bytes(written)
    now = recorder(tmp_path)
    journal.rename(tmp_path / "aside")
    journal.symlink_to("/dev/full")
    now.started(ray_trial("b"))
    with pytest.raises(OSError) as raised:
        now.step_ended([ray_trial("b")])
    assert raised.value.errno == errno.ENOSPC
    journal.unlink()
    (tmp_path / "aside").rename(journal)
    now.completed(ray_trial("a"))  # what Ray does in its cleaning up is no news of a trial
    now.step_ended([], last=True)
    assert journal.read_bytes() == written + b"\n"
    assert [(t.id, t.status) for t in recorder(tmp_path).sweep.trials] == [("a", "running")]


def test_a_trial_that_died_of_a_full_disk_has_not_failed(tmp_path):
    now = recorder(tmp_path)
    now.started(ray_trial("a"))
    now.died(ray_trial("a", error=RuntimeError("OSError: [Errno 28] No space left on device")))
    assert now.sweep.trials[0].status == "running"
    with pytest.raises(OSError, match="No space left on device: 'where trial 0 ran"):
        now.step_ended([ray_trial("a")])
