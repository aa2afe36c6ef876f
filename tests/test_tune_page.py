"""The page of a sweep: what it says is what the sweep holds."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import optuna
import pytest
from test_report import Parsed

from osml_plugin.errors import OsmlError
from osml_plugin.tune import page as parts
from osml_plugin.tune import pictures
from osml_plugin.tune.page import summary, write_page
from osml_plugin.tune.results import Dimension, Sweep, Trial

DIMENSIONS = [
    Dimension("loss", "choice", choices=("ArcFaceLoss", "CosFaceLoss")),
    Dimension("loss.ArcFaceLoss.margin", "float", 5, 45),
    Dimension("loss.CosFaceLoss.margin", "float", 0.05, 0.5),
    Dimension("loss.CosFaceLoss.scale", "float", 4, 64, log=True),
    Dimension("miner", "choice", choices=(None, "MultiSimilarityMiner")),
    Dimension("miner.MultiSimilarityMiner.epsilon", "float", 0.05, 0.3),
    Dimension("embedder.size", "choice", choices=(32, 64, 128)),
    Dimension("optimizer.lr", "float", 1e-4, 1e-1, log=True),
    Dimension("images_per_class", "int", 2, 16),
]
CURVE = [(0.0, 0.0), (0.05, 0.6), (0.2, 0.9), (1.0, 1.0)]
FACTS = {"data": "a & b", "epochs": 4, "alpha": None, "split": {"known": ["x", "y"], "unknown": []}, "lr": 1e-5}
FACTS["folds"] = [{"known": ["x"]}, {"known": ["y"]}]


def draw(dimension: Dimension, rng: np.random.Generator):
    if dimension.kind == "choice":
        return dimension.choices[rng.integers(len(dimension.choices))]
    if dimension.kind == "int":
        return int(rng.integers(dimension.low, dimension.high + 1))
    low, high = dimension.low, dimension.high
    return float(low * (high / low) ** rng.uniform() if dimension.log else rng.uniform(low, high))


def sweep(n: int, *, failed: tuple = (4,), seed: int = 0) -> Sweep:
    """The objective depends on the learning rate, and in CosFaceLoss on its scale."""
    rng, trials = np.random.default_rng(seed), []
    for i in range(n):
        params = {}
        for d in DIMENSIONS:
            owner, _, rest = d.name.partition(".")
            if owner not in ("loss", "miner") or not rest or rest.startswith(f"{params[owner]}."):
                params[d.name] = draw(d, rng)
        score = 0.9 - 0.05 * (math.log10(params["optimizer.lr"]) + 2) ** 2 + 0.002 * rng.normal()
        score -= 0.03 * math.log(params.get("loss.CosFaceLoss.scale", 16) / 16) ** 2
        status, epochs = ("failed", 1) if i in failed else ("stopped", 2) if i % 5 == 3 else ("finished", 4)
        history = [{"epoch": e, "oscr": score - 0.2 / e**2, "auroc": score + 0.03} for e in range(1, epochs + 1)]
        error = "Traceback:\n  some line\nValueError: <b>bad</b> & worse" if i in failed else None
        chosen = {"output": "embedding", "detector": "knn", "params": {"k": 5, "share": 0.25}, "threshold": {}}
        trials.append(Trial(f"t{i}", i, status, params, history, chosen, CURVE, error))
    return Sweep(trials, DIMENSIONS, "oscr", n, FACTS)


def written_page(path, *arguments) -> Parsed:
    write_page(path / "page.html", *arguments)
    return Parsed(path / "page.html")


HEADINGS = [
    "Best configurations",
    "The run of the search",
    "The space",
    "Trade-off of the best trials",
    "Learning curves",
    "What mattered",
    "Failed trials",
    "Facts",
]


@pytest.fixture(scope="module")
def some():
    return sweep(30)


@pytest.fixture(scope="module")
def page(some, tmp_path_factory):
    return written_page(tmp_path_factory.mktemp("page"), some)


def table(page: Parsed, heading: str) -> tuple[str, list[list[str]]]:
    """The note and the rows of a table, its header first."""
    source = page.source[page.source.index(f"<h2>{heading}</h2>") :].partition("</section>")[0]
    note = re.search(r'<p class="note">(.*?)</p>', source)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", source, re.DOTALL)]
    return note.group(1) if note else "", rows


# --- the page --------------------------------------------------------------------------------------------


def test_its_parts_come_in_order_and_it_fetches_nothing(page):
    nav = page.texts[page.texts.index("Best configurations") :]
    assert [text for text in nav if text][: len(HEADINGS)] == HEADINGS
    # the run, two losses, two trade-offs, learning, importance for all and for each loss
    assert len(page.all("img")) == 1 + 2 + 2 + 1 + 3
    text = re.sub(r'src="data:image/[^"]*"', "", page.source)
    assert not re.search(r"https?:|//|src=|<script|@import|url\(", text)


def test_the_lead_says_what_won(some, page):
    assert summary(some, {}) in page.texts
    of = next(t for t in some.trials if t.params["loss"] == "CosFaceLoss" and t.params["miner"])
    p = of.params
    assert summary(replace(some, trials=[of, some.trials[4]]), {}) == (
        f"The best oscr on validation is {of.history[-1]['oscr']:.4f}, of trial {of.number}: loss CosFaceLoss, "
        f"margin {p['loss.CosFaceLoss.margin']:.4g}, scale {p['loss.CosFaceLoss.scale']:.4g}, "
        f"miner MultiSimilarityMiner, epsilon {p['miner.MultiSimilarityMiner.epsilon']:.4g}, "
        f"size {p['embedder.size']}, 2 more below, detector knn (k 5, share 0.25) on embedding. "
        "30 trials asked for: 1 finished, 1 failed."
    )
    assert f"of trial {some.ranked()[0].number}: " in summary(
        some, {}
    ) and "finished, 6 stopped early, 1 failed." in summary(some, {})
    assert "On test it is 0.8123. 30 trials" in summary(some, {"validation": {}, "test": {"oscr": 0.8123}})
    assert "On test" not in summary(some, {"validation": {}, "test": None})


def test_best_configurations_are_the_ten_best(some, page):
    note, (header, *rows) = table(page, "Best configurations")
    searched = ["loss", "margin", "scale", "miner", "epsilon", "size", "lr", "images_per_class"]
    assert header == ["trial", "oscr", "auroc", "epochs", "status", "chosen detector", *searched]
    ranked = sorted((t for t in some.trials if t.status != "failed"), key=lambda t: -t.history[-1]["oscr"])[:10]
    assert [int(row[0]) for row in rows] == [t.number for t in ranked]
    for row, t in zip(rows, ranked, strict=True):
        assert row[1:5] == [
            f"{t.history[-1]['oscr']:.4f}",
            f"{t.history[-1]['auroc']:.4f}",
            str(len(t.history)),
            t.status,
        ]
        assert row[5].replace("\N{NO-BREAK SPACE}", " ") == "knn (k 5, share 0.25) on embedding"
        assert row[6] == t.params["loss"] and row[9] == str(t.params["miner"])
        assert row[7] == f"{t.params[f'loss.{row[6]}.margin']:.4g}"
        assert (row[8] == "–") == (row[6] == "ArcFaceLoss") and (row[10] == "–") == (row[9] == "None")
    assert "oscr" in note


def test_failed_trials_are_named_with_their_error(some, page):
    _, (_, *rows) = table(page, "Failed trials")
    drawn = ", ".join(parts._drawn(some, some.trials[4]))
    assert rows == [["4", "ValueError: &lt;b&gt;bad&lt;/b&gt; &amp; worse", drawn]]
    assert page.all("b") == []
    assert "loss " in drawn and f"lr {some.trials[4].params['optimizer.lr']:.4g}" in drawn


def test_facts_are_flat(page):
    assert table(page, "Facts")[1][1:] == [
        ["data", "a &amp; b"],
        ["epochs", "4"],
        ["alpha", "–"],
        ["split.known", "x, y"],
        ["split.unknown", "–"],
        ["lr", "1e-05"],
        ["folds.1.known", "x"],
        ["folds.2.known", "y"],
    ]


def test_the_winner_stands_on_validation_and_on_test(tmp_path):
    some = sweep(1, failed=(0,))
    test = {"oscr": 0.8, "n_known_items": 7, "detector": "knn", "threshold": None, "discovery": {"nmi": 0.5}}
    page = written_page(tmp_path, some, {"validation": {"oscr": 0.9, "system/memory": 3.0}, "test": test})
    _, (_, *rows) = table(page, "The winner, on validation and once on test")
    assert [row[:3] for row in rows] == [
        ["n_known_items", "–", "7"],
        ["threshold", "–", "–"],
        ["oscr", "0.9000", "0.8000"],
        ["nmi", "–", "0.5000"],
    ]
    assert all(len(row[3]) > 20 for row in rows)
    page = written_page(tmp_path, some, {"validation": {"oscr": 0.9}, "test": None})
    assert table(page, "The winner, on validation and once on test")[1][1][1:3] == ["0.9000", "–"]


def test_the_same_sweep_gives_the_same_page(tmp_path):
    some = sweep(10)
    write_page(tmp_path / "one.html", some)
    write_page(tmp_path / "two.html", sweep(10))
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_names_are_text_wherever_they_stand(tmp_path):
    nasty, odd = "<b>&\"'", "$d_g$ [x]"
    dimensions = [Dimension(nasty, "choice", choices=(nasty, odd)), Dimension(odd, "float", 0, 1)]
    trials = [
        Trial(str(i), i, "finished", {nasty: (nasty, odd)[i % 2], odd: i / 9}, [{"epoch": 1, "oscr": i / 10}])
        for i in range(10)
    ]
    trials.append(Trial("f", 10, "failed", {nasty: odd}, error="\x1b[31m<script>alert(1)</script>\x1b[0m"))
    page = written_page(tmp_path, Sweep(trials, dimensions, "oscr", 11, {nasty: nasty}))
    assert page.all("b") == page.all("script") == [] and "\x1b" not in page.source
    assert page.texts.count(nasty) >= 3 and "<script>alert(1)</script>" in page.texts
    drawings = "".join(content.decode() for _, content in page.pictures())
    assert "<b>" not in drawings and "&lt;b&gt;&amp;" in drawings and "$d_g$" in drawings


@pytest.mark.parametrize("n", [1, 2, 3, 8, 12])
@pytest.mark.filterwarnings("error")
def test_small_sweeps_have_a_page(n, tmp_path):
    page = written_page(tmp_path, sweep(n, failed=()))
    assert {"The run of the search", "The space", "Learning curves"} <= set(page.texts)
    note, rows = table(page, "What mattered")
    if n < 8:
        assert note == f"It takes 8 trials with a result to tell what mattered; there are {n}." and rows == []
    else:
        assert "random forest" in note


@pytest.mark.filterwarnings("error")
def test_all_failed_none_begun_and_still_running(tmp_path):
    page = written_page(tmp_path, sweep(3, failed=(0, 1, 2)))
    assert "No trial has a result. 3 trials asked for: 3 failed." in page.texts
    assert len(table(page, "Failed trials")[1]) == 4 and len(page.all("img")) == 1

    page = written_page(tmp_path, Sweep([], DIMENSIONS, "oscr", 1))
    assert "No trial has a result. 1 trial asked for: none has begun." in page.texts
    assert page.all("img") == []

    some = sweep(12, failed=())
    open_ones = [replace(t, status="running", history=t.history[: i % 3]) for i, t in enumerate(some.trials[:6])]
    waiting = Trial("w", 12, "waiting", {})
    page = written_page(tmp_path, replace(some, trials=[*open_ones, *some.trials[6:], waiting], asked=20))
    lead = next(t for t in page.texts if "asked for" in t)
    assert lead.endswith("20 trials asked for: 5 finished, 1 stopped early, 6 still running.")
    assert "there are 6." in table(page, "What mattered")[0]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "change",
    [
        lambda t: replace(t, chosen=None, curve=()),
        lambda t: replace(t, history=[{"epoch": 1, "oscr": 0.5}]),
        lambda t: replace(t, params={"optimizer.lr": t.params["optimizer.lr"]}),
        lambda t: replace(t, params={}),
        lambda t: replace(t, params=t.params | {"optimizer.lr": 0.5 + t.number, "images_per_class": 99}),
        lambda t: replace(t, params=t.params | {"miner": "other"}),
        lambda t: replace(t, curve=[(0, 0), (1, 1)]),
    ],
    ids=["no curve", "one epoch, equal", "one parameter", "nothing drawn", "outside", "another choice", "two points"],
)
def test_odd_sweeps_have_a_page(change, tmp_path):
    some = sweep(12)
    page = written_page(tmp_path, replace(some, trials=[change(t) for t in some.trials]))
    assert page.all("img")


def test_a_place_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OsmlError, match=r"^cannot write the page '.*': No such file or directory; choose another"):
        write_page(tmp_path / "absent" / "page.html", sweep(1, failed=(0,)))


# --- pictures --------------------------------------------------------------------------------------------


def test_the_run_shows_the_best_so_far_in_order_of_numbers(some):
    shuffled = replace(some, trials=some.trials[::-1])
    axes = pictures.search(shuffled).axes[0]
    x, y = next(line for line in axes.lines if len(line.get_xdata())).get_data()
    best = -math.inf
    expected = []
    for t in some.trials:
        if t.status != "failed":
            best = max(best, t.history[-1]["oscr"])
            expected.append((t.number, best))
    assert list(zip(x, y, strict=True)) == [*expected, (29, best)]
    assert [tick for tick in pictures.search(sweep(1)).axes[0].get_xticks() if -0.6 <= tick <= 0.6] == [0]
    dots = {c.get_label(): len(c.get_offsets()) for c in axes.collections}
    assert dots == {"finished: 23": 23, "stopped: 6": 6, "failed: 1": 1}


def test_learning_curves_are_those_of_all_that_did_not_fail(some):
    lines = [line for line in pictures.learning(some).axes[0].lines if len(line.get_xdata())]
    drawn = sorted(tuple(line.get_ydata()) for line in lines)
    assert drawn == sorted(tuple(e["oscr"] for e in t.history) for t in some.trials if t.status != "failed")
    bold = max(lines, key=lambda line: line.get_linewidth())
    assert bold.get_ydata()[-1] == some.ranked()[0].history[-1]["oscr"] and bold.get_color() == pictures.OTHER
    assert pictures.learning(sweep(2, failed=(0, 1))) is None


def test_trade_offs_are_those_of_the_five_best(some):
    trials = [replace(t, curve=[(0, 0), (1, 1), (0.1, t.number / 100)]) for t in some.trials]
    best = [t.number for t in replace(some, trials=trials).ranked()[:5]]
    whole, part = pictures.trade_off(replace(some, trials=trials))
    for figure in (whole, part):
        curves = [line.get_xydata().tolist() for line in figure.axes[0].lines if len(line.get_xdata()) == 3]
        assert curves == [[[0, 0], [0.1, n / 100], [1, 1]] for n in best[::-1]], "the best lies on top"
    labels = [text.get_text().partition(":")[0] for text in whole.axes[0].get_legend().get_texts()]
    assert labels == [f"trial {n}" for n in best]
    assert pictures.trade_off(replace(some, trials=[replace(t, curve=()) for t in trials])) is None


def test_branches_are_those_of_the_choice_that_owns_most(some):
    found = pictures.branches(some)
    best = some.ranked()[0].params["loss"]
    assert found[0][0] == f"loss: {best}" and len(found) == 2
    for name, trials in found:
        assert [t for t in some.ranked() if f"loss: {t.params['loss']}" == name] == trials
    alone = replace(some, trials=found[0][1])
    assert pictures.branches(alone) == [("", alone.ranked())], "nothing to tell apart"
    plain = replace(some, dimensions=[d for d in DIMENSIONS if d.name.count(".") < 2])
    assert pictures.branches(plain) == [("", some.ranked())]


def lines_of(figure) -> tuple[np.ndarray, np.ndarray]:
    """The lines of a picture of the space, the best first, and where its axes stand."""
    axes = figure.axes[0]
    best = next(line for line in axes.lines if line.get_color() == pictures.OTHER).get_xydata()
    others = axes.collections[0].get_segments()[::-1] if axes.collections[0].get_segments() else []
    return np.stack([best, *others]), best[:, 0]


def test_lines_pass_their_axes_where_their_values_lie(some):
    name, trials = next(b for b in pictures.branches(some) if b[0] == "loss: CosFaceLoss")
    figure = pictures.parallel(some, name, trials)
    lines, places = lines_of(figure)
    assert len(lines) == len(trials) and np.all(np.diff(places) > 0.9) and np.isfinite(lines).all()
    titles = [t.get_text().replace("\n", "") for t in figure.axes[0].texts if t.get_weight() == "bold"]
    assert titles == ["margin", "scale", "miner", "epsilon", "size", "lr", "images_per_class", "oscr"]
    y = dict(zip(titles, lines[:, :, 1].T, strict=True))

    def of(parameter):
        return np.array([t.params[parameter] for t in trials])

    np.testing.assert_allclose(y["margin"], (of("loss.CosFaceLoss.margin") - 0.05) / 0.45)
    np.testing.assert_allclose(y["lr"], (np.log10(of("optimizer.lr")) + 4) / 3)
    np.testing.assert_allclose(y["images_per_class"], (of("images_per_class") - 2) / 14)
    scores = np.array([t.history[-1]["oscr"] for t in trials])
    np.testing.assert_allclose(y["oscr"], (scores - scores.min()) / np.ptp(scores), atol=1e-12)
    without = np.array([t.params["miner"] is None for t in trials])
    assert without.any() and np.all((y["epsilon"] < 0) == without), "what is not used runs below"
    for i, size in enumerate((32, 64, 128)):
        inside = (y["size"] > i / 3) & (y["size"] < (i + 1) / 3)
        assert np.array_equal(inside, of("embedder.size") == size)
        np.testing.assert_allclose(y["size"][inside].mean(), (i + 0.5) / 3)
        assert np.all(np.diff(y["size"][inside]) < 0), "spread, the better above"
    ticks = {t.get_text(): t.get_position() for t in figure.axes[0].texts if t.get_weight() != "bold"}
    np.testing.assert_allclose(ticks["0.01"][1], 2 / 3)
    np.testing.assert_allclose(ticks["MultiSimilarityMi…"][1], 0.75)


def test_no_two_labels_of_the_space_lie_on_each_other(some):
    for name, trials in [*pictures.branches(some), ("", some.ranked())]:
        figure = pictures.parallel(some, name, trials)
        figure.savefig("/dev/null", format="svg")
        boxes = [t.get_window_extent() for t in figure.axes[0].texts]
        for i, one in enumerate(boxes):
            assert not any(one.shrunk(0.95, 0.8).overlaps(other.shrunk(0.95, 0.8)) for other in boxes[:i])
            assert figure.bbox.padded(1).contains(one.x0, one.y0) and figure.bbox.padded(1).contains(one.x1, one.y1)


def test_of_too_many_parameters_those_that_mattered_are_shown():
    rng = np.random.default_rng(0)
    dimensions = [Dimension(f"p{i}", "float", 0, 1) for i in range(20)]
    trials = []
    for i in range(40):
        params = {d.name: rng.uniform() for d in dimensions}
        trials.append(Trial(str(i), i, "finished", params, [{"epoch": 1, "oscr": params["p17"] + params["p4"]}]))
    some = Sweep(trials, dimensions, "oscr", 40)
    shares = pictures.importances(some, trials)
    assert set(list(shares)[:2]) == {"p4", "p17"}
    figure = pictures.parallel(some, "", some.ranked())
    titles = [t.get_text() for t in figure.axes[0].texts if t.get_weight() == "bold"]
    assert titles == [*(d.name for d in dimensions if d.name in list(shares)[:11]), "oscr"]


@pytest.mark.parametrize(
    "low, high, log, whole, expected",
    [
        (0.0001, 0.1, True, False, [1e-4, 1e-3, 1e-2, 1e-1]),
        (4, 64, True, False, [5, 10, 20, 50]),
        (0.0, 1.0, False, False, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (1, 3, False, True, [1, 2, 3]),
        (0.41, 0.42, True, False, [0.41, 0.42]),
        (5, 5, False, False, [5]),
        (1e-12, 1.0, True, False, [1e-12, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2, 1]),
    ],
)
def test_marks_are_few_and_round(low, high, log, whole, expected):
    np.testing.assert_allclose(pictures._marks(low, high, log, whole), expected)


# --- what mattered ---------------------------------------------------------------------------------------


def test_importance_finds_what_the_objective_depends_on():
    some = sweep(80, failed=(4, 9))
    everywhere = pictures.importances(some, some.ranked())
    assert set(everywhere) == {"loss", "miner", "embedder.size", "optimizer.lr", "images_per_class"}
    assert next(iter(everywhere)) == "optimizer.lr"
    np.testing.assert_allclose(sum(everywhere.values()), 1)
    assert all(a >= b for a, b in pairwise(everywhere.values()))
    for name, trials in pictures.branches(some):
        top = list(pictures.importances(some, trials))
        if name == "loss: CosFaceLoss":
            assert set(top[:2]) == {"optimizer.lr", "loss.CosFaceLoss.scale"}
        else:
            assert top[0] == "optimizer.lr" and "loss.ArcFaceLoss.margin" in top
    assert everywhere == pictures.importances(some, some.ranked())
    bars = pictures.importance(some, everywhere, "all").axes[0]
    np.testing.assert_allclose([bar.get_width() for bar in bars.patches], list(everywhere.values()))
    assert next(t.get_text() for t in bars.get_yticklabels()) == "lr"


def test_importance_is_the_share_of_the_variance_where_effects_add_up():
    """A choice and a range whose variances are 0.69 and 0.31 of the sum, and noise."""
    rng = np.random.default_rng(0)
    dimensions = [Dimension("choice", "choice", choices=("a", "b")), Dimension("range", "float", 1, 100, log=True)]
    dimensions.append(Dimension("nothing", "float", 0, 1))
    trials = []
    for i in range(80):
        params = {d.name: draw(d, rng) for d in dimensions}
        score = 0.05 * (params["choice"] == "a") + 0.0577 * math.log(params["range"], 100)
        trials.append(Trial(str(i), i, "finished", params, [{"epoch": 1, "oscr": score}]))
    shares = pictures.importances(Sweep(trials, dimensions, "oscr", 80), trials)
    np.testing.assert_allclose([shares[d.name] for d in dimensions], [0.69, 0.31, 0], atol=0.06)


def test_importance_is_silent_where_it_would_say_nothing(capfd):
    some = sweep(20, failed=())
    before = optuna.logging.get_verbosity()
    assert pictures.importances(some, some.trials[:8]) and not pictures.importances(some, some.trials[:7])
    running = [replace(t, status="running") for t in some.trials[:5]] + some.trials[5:12]
    assert not pictures.importances(some, running)
    equal = [replace(t, history=[{"epoch": 1, "oscr": 0.5}]) for t in some.trials]
    assert not pictures.importances(some, equal)
    one = replace(some, dimensions=[d for d in DIMENSIONS if d.name == "optimizer.lr"])
    assert not pictures.importances(one, some.trials)
    same = [replace(t, params=t.params | {"optimizer.lr": 0.01}) for t in some.trials]
    assert "optimizer.lr" not in pictures.importances(some, same)
    assert optuna.logging.get_verbosity() == before and capfd.readouterr().err == ""


def test_why_not():
    some = sweep(10, failed=())
    equal = replace(some, trials=[replace(t, history=[{"epoch": 1, "oscr": 0.5}]) for t in some.trials])
    assert "do not differ enough" in parts._why_not(equal)
    one = replace(some, dimensions=DIMENSIONS[-1:])
    assert "only one parameter" in parts._why_not(one)
