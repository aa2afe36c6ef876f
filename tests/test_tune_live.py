"""What is seen of a running sweep: the table on a terminal, the lines elsewhere, and the words shared with the page."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from osml_plugin.tune import live
from osml_plugin.tune.live import LiveTable, columns, reason, value, written
from osml_plugin.tune.results import Dimension, Sweep, Trial

DIMENSIONS = [
    Dimension("loss", "choice", choices=("ArcFaceLoss", "CosFaceLoss")),
    Dimension("loss.ArcFaceLoss.margin", "float", 5, 45),
    Dimension("loss.CosFaceLoss.margin", "float", 0.05, 0.5),
    Dimension("optimizer.lr", "float", 1e-4, 1e-1, log=True),
]


class Clock:
    """Stands for the module `time`."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(live, "time", Clock())
    return live.time


def trial(number: int, status: str = "running", scores: tuple = (), loss: str = "ArcFaceLoss", **more) -> Trial:
    params = {"loss": loss, f"loss.{loss}.margin": 20.0 if loss == "ArcFaceLoss" else 0.25, "optimizer.lr": 0.001}
    history = [{"epoch": e, "oscr": s} for e, s in enumerate(scores, 1)]
    return Trial(f"id{number}", number, status, params, history, **more)


def sweep(*trials: Trial, asked: int = 8, **facts) -> Sweep:
    return Sweep(list(trials), DIMENSIONS, "oscr", asked, {"epochs": 4} | facts)


def terminal(width: int = 120, height: int = 30, **more) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, **more)


def seen(some: Sweep, **console) -> list[str]:
    """The lines of a terminal without colours after this state was drawn for good."""
    out = terminal(color_system=None, **console)
    table = LiveTable(out)
    table.update(some)
    before = out.file.tell()
    table.stop()
    last = out.file.getvalue()[before:].rpartition("\x1b[2K")[2]
    return [line.rstrip() for line in last.replace("\x1b[?25h", "").splitlines() if line.strip()]


# --- on a terminal ---------------------------------------------------------------------------------------


def test_the_table_says_all_of_the_running_and_of_the_best_trials(clock):
    states = (
        trial(0, "finished", (0.5, 0.6, 0.91, 0.88)),
        trial(1, "failed", (0.99,), error="ValueError: x"),
        trial(2, "stopped", (0.3,), loss="CosFaceLoss"),
        trial(3, "running", (0.7, 0.65)),
        trial(4, "running"),
        trial(5, "waiting"),
    )
    progress, header, _, *rows = seen(sweep(*states))
    assert progress == "3/8 trials · 1 stopped · 1 failed · best oscr 0.910 (trial 0) · <1 min so far · – left"
    assert header.split() == ["trial", "status", "epoch", "oscr", "best", "loss", "margin", "lr"]
    assert [row.split() for row in rows] == [
        ["0", "finished", "4/4", "0.880", "0.910", "ArcFaceLoss", "20", "0.001"],
        ["3", "running", "2/4", "0.650", "0.700", "ArcFaceLoss", "20", "0.001"],
        ["2", "stopped", "1/4", "0.300", "0.300", "CosFaceLoss", "0.25", "0.001"],
        ["4", "running", "–", "–", "–", "ArcFaceLoss", "20", "0.001"],
    ]


@pytest.mark.parametrize("height, shown", [(50, 12), (14, 8), (7, 1), (3, 1)])
def test_rows_fit_the_terminal_and_keep_the_best(height, shown):
    states = [trial(i, "finished", (0.5 + i / 100,)) for i in range(20)]
    states += [trial(i, "running", (0.1 + i / 1000,)) for i in range(20, 40)]
    _, _, _, *rows = seen(sweep(*states, asked=50), height=height)
    assert len(rows) == shown
    assert rows[0].split()[0] == "19"
    assert [row.split()[0] for row in rows[1:]] == [str(i) for i in range(39, 39 - shown + 1, -1)]


def test_few_running_trials_leave_room_for_the_next_best():
    states = [trial(i, "finished", (0.5 + i / 100,)) for i in range(20)]
    rows = seen(sweep(*states, trial(20, "running", (0.9,)), trial(21)))[3:]
    assert [int(row.split()[0]) for row in rows] == [20, *range(19, 9, -1), 21]


@pytest.mark.parametrize("width", [20, 40, 50, 65, 66, 80])
def test_columns_that_do_not_fit_are_left_out_whole(width):
    lines = seen(sweep(trial(0, "finished", (0.5,) * 4)), width=width)
    header = next(i for i, line in enumerate(lines) if line.startswith("trial"))
    assert all(len(line) <= width and "…" not in line for line in lines[header:])
    names = ["trial", "status", "epoch", "oscr", "best", "loss", "margin", "lr"]
    got = lines[header].split()
    assert got == names[: len(got)] and (len(got) == 8) == (width >= 66)


def test_time_left_is_at_the_speed_of_this_process(clock):
    def left() -> str:
        return table._progress().plain.rpartition(" · ")[2]

    table = LiveTable(terminal())
    before = trial(0, "finished", (0.5,) * 4), trial(1, "stopped", (0.5,))  # before a resume
    table.update(sweep(*before, trial(2)))
    clock.now += 60
    assert left() == "– left"
    table.update(sweep(*before, trial(2, "running", (0.5, 0.6))))  # half a trial in a minute, 5.5 to go
    assert left() == "11 min left"
    table.update(sweep(*before, trial(2, "finished", (0.5,) * 4), trial(3, "failed", error="x")))  # 2 in one, 4 to go
    assert left() == "2 min left"
    table.update(sweep(*before, trial(2, "running", (0.5, 0.6)), asked=150))
    assert left() == "4 h 55 min left"
    table.update(sweep(*before, trial(2, "finished", (0.5,)), trial(3, "failed"), asked=5))
    assert left() == "<1 min left"
    table.update(sweep(*before, trial(2, "finished", (0.5,)), asked=3))
    assert left() == "1 min so far"
    table.update(Sweep([*before, trial(2, "running", (0.5,))], DIMENSIONS, "oscr", 8))  # epochs unknown
    assert left() == "– left"
    table.update(sweep(*before, replace(trial(2, "running", (0.5,)), params={"training.epochs": 2})))
    assert left() == "11 min left"
    table.stop()


def test_updates_do_not_draw_by_themselves():
    out = terminal()
    drawn, draw = [], LiveTable._draw

    class Counting(LiveTable):
        def _draw(self):
            drawn.append(1)
            return draw(self)

    table = Counting(out)
    start = time.monotonic()
    for i in range(3000):
        table.update(sweep(trial(0, "running", (i / 3000,))))
    table.stop()
    assert len(drawn) <= 4 + 5 * (time.monotonic() - start)
    assert "3000" not in out.file.getvalue() and "1.000" in out.file.getvalue()  # the last state is drawn for good


def test_stop_may_come_at_any_time_and_puts_the_terminal_back():
    out = terminal()
    table = LiveTable(out)
    table.stop()
    assert out.file.getvalue() == ""
    stdout, stderr = sys.stdout, sys.stderr
    table.update(sweep())
    assert sys.stdout is stdout, "standard output stays what it is"
    table.stop()
    table.stop()
    assert sys.stderr is stderr and out.file.getvalue().endswith("\x1b[?25h")


def test_no_colour_where_it_is_not_wanted(monkeypatch):
    some = sweep(trial(0, "finished", (0.5,)), trial(1, "running", (0.4,)))

    def colours() -> bool:
        out = Console(file=io.StringIO(), force_terminal=True, width=100, height=20, color_system="standard")
        table = LiveTable(out)
        table.update(some)
        table.stop()
        return "\x1b[32m" in out.file.getvalue() or ";32m" in out.file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert colours()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours()


def test_names_and_values_are_text_not_markup():
    dimensions = [Dimension("a.[bold]x", "choice", choices=("[red]y[/red]",))]
    t = Trial("i", 0, "finished", {"a.[bold]x": "[red]y[/red]"}, [{"epoch": 1, "oscr": 0.5}])
    _, header, _, row = seen(Sweep([t], dimensions, "oscr", 1))
    assert header.endswith("[bold]x") and row.endswith("[red]y[/red]")


# --- elsewhere -------------------------------------------------------------------------------------------


def test_lines_when_trials_end_and_nothing_else(clock):
    out = io.StringIO()
    table = LiveTable(Console(file=out, width=20))
    running = trial(3, "running", (0.2,))
    table.update(sweep(running, trial(4), trial(5, "waiting")))
    assert out.getvalue() == ""
    clock.now += 240
    first = trial(3, "finished", (0.2, 0.94, 0.9, 0.9))
    table.update(sweep(first, trial(4)))
    table.update(sweep(first, trial(4, "running", (0.5,))))
    second = trial(4, "stopped", (0.5, 0.931))
    table.update(sweep(first, second))
    broken = trial(7, "failed", error="Traceback\n  File\n\x1b[36mValueError\x1b[0m: [x] is <NaN>\n\n")
    table.update(sweep(first, second, broken, asked=4))
    table.update(sweep(first, second, broken, trial(8, "stopped"), asked=4))
    table.stop()
    assert out.getvalue().splitlines() == [
        "trial 3 finished: oscr 0.940 (best 0.940, trial 3), 1/8, about 37 min left",
        "trial 4 stopped: oscr 0.931 (best 0.940, trial 3), 2/8, about 14 min left",
        "trial 7 failed: ValueError: [x] is <NaN>, 3/4, about 1 min left",
        "trial 8 stopped: it reported nothing, 4/4",
    ]


def test_standard_error_is_where_it_goes(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # a file stays a file
    table = LiveTable()
    table.update(sweep(trial(0, "finished", (0.5,))))
    table.stop()
    out, err = capsys.readouterr()
    assert out == "" and err == "trial 0 finished: oscr 0.500 (best 0.500, trial 0), 1/8\n"


def test_a_pickled_copy_goes_on_elsewhere(capsys):
    table = LiveTable(terminal())
    table.update(sweep(trial(0, "finished", (0.5,))))
    copy = pickle.loads(pickle.dumps(table))
    table.stop()
    copy.update(sweep(trial(0, "finished", (0.5,))))
    assert capsys.readouterr().err == "trial 0 finished: oscr 0.500 (best 0.500, trial 0), 1/8\n"
    again = pickle.loads(pickle.dumps(copy))
    again.update(sweep(trial(0, "finished", (0.5,)), trial(1, "finished", (0.6,))))
    assert capsys.readouterr().err == "trial 1 finished: oscr 0.600 (best 0.600, trial 1), 2/8\n"


def test_it_draws_without_the_libraries_of_the_page():
    code = "import sys, osml_plugin.tune.live; print([m for m in ('matplotlib', 'ray', 'mlflow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


# --- words -----------------------------------------------------------------------------------------------


def test_headings_are_as_short_as_they_can_be():
    names = [
        "loss",
        "loss.ArcFaceLoss.margin",
        "loss.CosFaceLoss.margin",
        "loss.CosFaceLoss.inner",
        "loss.CosFaceLoss.inner.a.b.depth",
        "optimizer.lr",
        "loss_optimizer.lr",
        "lr",
        "embedder.size",
    ]
    choices = {"loss": ("ArcFaceLoss", "CosFaceLoss"), "loss.CosFaceLoss.inner": ("a.b", "c")}
    dimensions = [
        Dimension(n, "choice", choices=choices[n]) if n in choices else Dimension(n, "float", 0, 1) for n in names
    ]
    assert columns(dimensions) == {
        "loss": ["loss"],
        "margin": ["loss.ArcFaceLoss.margin", "loss.CosFaceLoss.margin"],
        "inner": ["loss.CosFaceLoss.inner"],
        "depth": ["loss.CosFaceLoss.inner.a.b.depth"],
        "optimizer.lr": ["optimizer.lr"],
        "loss_optimizer.lr": ["loss_optimizer.lr"],
        "lr": ["lr"],
        "size": ["embedder.size"],
    }
    assert columns([]) == {}


def test_values_and_reasons_are_written_short():
    assert [written(v) for v in (0.1 + 0.2, 1e-5, 3, True, None, "x")] == ["0.3", "1e-05", "3", "True", "None", "x"]
    t = trial(0, loss="CosFaceLoss")
    assert value(t, ["loss.ArcFaceLoss.margin", "loss.CosFaceLoss.margin"]) == "0.25"
    assert value(t, ["loss.ArcFaceLoss.margin"]) == "–"
    assert reason(t) == "no reason given" and reason(replace(t, error="a\nb: c \n")) == "b: c"
