from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from dataclasses import asdict, replace
from html.parser import HTMLParser
from importlib import import_module
from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import sphere_classes
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import confusion_matrix, roc_auc_score

from osml_plugin import UNKNOWN
from osml_plugin.discovery import Discovery
from osml_plugin.errors import OsmlError
from osml_plugin.evaluation import evaluate_embeddings
from osml_plugin.recognizer import OpenSetRecognizer
from osml_plugin.report import Page, pictures, write_report
from osml_plugin.report import evaluation as sections

NASTY = '<b>&"'
VOID = {"meta", "img", "link", "br"}


class Parsed(HTMLParser):
    """A page as its reader gets it; refuses tags that do not nest and attributes that fetch."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.texts = [], [], []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data.strip())

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def pictures(self):
        """The type and content of each picture."""
        found = [re.fullmatch(r"data:image/([a-z+]+);base64,(.*)", a["src"]).groups() for a in self.all("img")]
        return [(kind, base64.b64decode(content)) for kind, content in found]


def evaluate(classes, known, *, n=60, width=2, detector="knn", alpha=0.1, seed=0):
    """Blobs of the given class names, the first `known` of which the recognizer knows."""
    draw = np.random.default_rng(seed)
    angle = 2 * np.pi * np.arange(len(classes)) / len(classes)
    centres = np.zeros((len(classes), width))
    centres[:, :2] = np.stack([np.cos(angle), np.sin(angle)], axis=1)

    def items(labels):
        points = centres[labels] + 0.15 * draw.normal(size=(len(labels), width))
        return torch.tensor(points, dtype=torch.float32), [classes[i] for i in labels]

    recognizer = OpenSetRecognizer(detector, alpha=alpha).fit(*items(np.arange(30 * known) % known))
    return evaluate_embeddings(recognizer, *items(draw.integers(0, len(classes), n)))


@pytest.fixture(scope="module")
def plain():
    return evaluate(["ant", "bee", NASTY, "cow", "dog"], 3, n=200)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A real evaluation: six digits known, four not, and the image file of each item tested."""
    data = load_digits()
    names = np.array([f"digit {i}" for i in data.target])
    embeddings = torch.nn.functional.normalize(torch.tensor(data.data, dtype=torch.float32))
    train = np.flatnonzero((data.target < 6) & (np.arange(len(names)) < 700))
    test = np.arange(1500, 1700)
    folder = tmp_path_factory.mktemp("digits")
    paths = [folder / f"{i}.png" for i in test]
    for i, path in zip(test, paths, strict=True):
        Image.fromarray((data.images[i] * 15).astype(np.uint8)).save(path)
    recognizer = OpenSetRecognizer("knn", alpha=0.05).fit(embeddings[train], names[train])
    return evaluate_embeddings(recognizer, embeddings[test], names[test].tolist()), paths


@pytest.fixture(scope="module")
def digits_page(digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "page.html"
    write_report(path, digits[0], paths=digits[1])
    return Parsed(path)


# --- the page of an evaluation ---------------------------------------------------------------------------


def test_it_holds_every_figure_by_name_and_value_and_fetches_nothing(digits, digits_page):
    evaluation, page = digits[0], digits_page
    figures = asdict(evaluation.metrics) | evaluation.discovery.to_dict()
    for name, value in (figures | {"threshold": evaluation.threshold, "alpha": 0.05}).items():
        at = page.texts.index(name)
        following = [text for text in page.texts[at + 1 :] if text]
        shown = "–" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
        assert following[0] == shown
        assert len(following[1]) > 20, "a sentence in plain words"
    assert "Share of known items called unknown; asked for: 0.05. Lower is better." in page.texts

    text = re.sub(r'src="data:image/[^"]*"', "", page.source)
    assert len(text) < 40_000 and not re.search(r"https?:|//|src=|<script|@import|url\(", text)
    parts = {a["id"] for a in page.all("section")}
    links = [a["href"] for a in page.all("a")]
    assert len(parts) == len(links) and {link[1:] for link in links} == parts
    assert all(a["alt"] for a in page.all("img"))
    drawings = [content.decode() for kind, content in page.pictures() if kind == "svg+xml"]
    assert len(drawings) == 7  # histogram, two curves, two maps, two heat maps
    for drawing in drawings:
        assert "<script" not in drawing
        addresses = {a.rpartition("/")[0] for a in re.findall(r"https?://[^\"]*", drawing)}
        assert addresses <= {
            "http://www.w3.org/2000",
            "http://www.w3.org/1999",
            "http://www.w3.org/Graphics/SVG/1.1/DTD",
        }


def test_groups_and_mistakes_show_the_right_images(digits, digits_page):
    (evaluation, paths), page = digits, digits_page
    shown = [np.array(Image.open(io.BytesIO(content)))[:, :, 0] for kind, content in page.pictures() if kind == "png"]

    answer, labels = evaluation.recognition, evaluation.labels
    unknown_items = [i for i in range(len(labels)) if labels[i] == UNKNOWN]
    expected = [unknown_items[j] for exemplars in evaluation.groups.exemplars[:40] for j in exemplars[:9]]
    n_exemplars = len(expected)
    rejected = [i for i in range(len(labels)) if labels[i] != UNKNOWN and answer.names[i] is None]
    accepted = [i for i in range(len(labels)) if labels[i] == UNKNOWN and answer.names[i] is not None]
    confused = [
        i for i in range(len(labels)) if labels[i] != UNKNOWN and answer.names[i] not in (None, evaluation.names[i])
    ]
    assert rejected and accepted
    expected += sorted(rejected, key=lambda i: -answer.scores[i])[:18]
    expected += sorted(accepted, key=lambda i: answer.scores[i])[:18]
    expected += sorted(confused, key=lambda i: answer.scores[i])[:18]
    assert len(shown) == len(expected)
    for pixels, item in zip(shown, expected, strict=True):
        np.testing.assert_array_equal(pixels, np.array(Image.open(paths[item])))
    captions = [a["alt"] for a in page.all("img") if a["src"].startswith("data:image/png")]
    assert captions[:n_exemplars] == [evaluation.names[i] for i in expected[:n_exemplars]]
    first = expected[n_exemplars]
    assert captions[n_exemplars].split("\n")[:2] == [evaluation.names[first], f"nearest: {answer.nearest[first]}"]
    assert {f"{len(rejected)} of {len(labels) - len(unknown_items)} items"} <= {t.split(".")[0] for t in page.texts}


def test_images_in_memory_show_the_same_as_files(digits, digits_page, tmp_path):
    evaluation, paths = digits
    images = np.stack([np.array(Image.open(path)) for path in paths])
    write_report(tmp_path / "arrays.html", evaluation, images=images[:, :, :, None])
    thumbnails = [
        [np.array(Image.open(io.BytesIO(c)).convert("L")).tolist() for kind, c in page.pictures() if kind == "png"]
        for page in (digits_page, Parsed(tmp_path / "arrays.html"))
    ]
    assert thumbnails[0] == thumbnails[1]


def test_without_images_items_go_by_their_numbers(plain, tmp_path):
    write_report(tmp_path / "page.html", plain)
    page = Parsed(tmp_path / "page.html")
    assert all(kind == "svg+xml" for kind, _ in page.pictures())
    unknown = np.flatnonzero(plain.labels == UNKNOWN)
    for exemplars in plain.groups.exemplars[: sections.SHOWN_GROUPS]:
        assert ", ".join(str(i) for i in unknown[exemplars[:9]]) in page.texts
    known_rejected = np.flatnonzero((plain.labels != UNKNOWN) & (plain.recognition.labels == UNKNOWN))
    assert {str(i) for i in known_rejected[:18]} <= set(page.texts)


def test_class_names_are_text_wherever_they_stand(plain, tmp_path):
    evaluation = replace(plain, names=tuple(n.replace("dog", "$d_g$ \udcff") for n in plain.names))
    write_report(tmp_path / "page.html", evaluation, title=f"Of {NASTY}")
    page = Parsed(tmp_path / "page.html")
    assert page.all("b") == []
    assert f"Of {NASTY}" in page.texts and NASTY in page.texts
    drawings = "".join(content.decode() for _, content in page.pictures())
    assert "<b>" not in drawings and "&lt;b&gt;&amp;" in drawings
    assert "$d_g$ ?" in drawings


def test_the_same_evaluation_gives_the_same_page(plain, tmp_path):
    write_report(tmp_path / "one.html", plain)
    write_report(tmp_path / "two.html", plain)
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()


def test_two_thousand_items_stay_small(tmp_path):
    evaluation = evaluate(list("abcdefgh"), 5, n=2000)
    photo = np.random.default_rng(0).integers(0, 256, (300, 200, 3), dtype=np.uint8)  # noise compresses worst
    write_report(tmp_path / "page.html", evaluation, images=[photo] * 2000)
    page = Parsed(tmp_path / "page.html")
    sizes = [Image.open(io.BytesIO(content)).size for kind, content in page.pictures() if kind == "jpeg"]
    assert sizes and set(sizes) == {(64, 96)}
    drawings = [content for kind, content in page.pictures() if kind == "svg+xml"]
    assert len(drawings) + len(sizes) == len(page.pictures())
    assert sum(map(len, drawings)) < 1_000_000
    assert len(page.source) < 3_000_000


@pytest.mark.parametrize(
    "change",
    [
        lambda e: replace(e, threshold=math.inf),
        lambda e: replace(e, recognition=replace(e.recognition, p_values=None)),
        lambda e: replace(
            e,
            recognition=replace(
                e.recognition, scores=np.where(np.arange(len(e.names)) % 3, e.recognition.scores, np.inf)
            ),
        ),
        lambda e: replace(e, recognition=replace(e.recognition, scores=np.full(len(e.names), -np.inf))),
        lambda e: replace(e, recognition=replace(e.recognition, scores=np.zeros(len(e.names)))),
        lambda e: replace(e, embeddings=torch.zeros(len(e.names), 3)),
        lambda e: replace(e, embeddings=e.embeddings[:, :1]),
        lambda e: replace(
            e, groups=replace(e.groups, n_classes=0, labels=np.full_like(e.groups.labels, -1), exemplars=())
        ),
    ],
    ids=["infinite τ", "no p", "infinite scores", "only infinite", "equal scores", "equal items", "1-D", "no groups"],
)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_odd_evaluations_have_a_page(plain, change, tmp_path):
    write_report(tmp_path / "page.html", change(plain))
    assert len(Parsed(tmp_path / "page.html").all("section")) >= 10


@pytest.mark.parametrize("n_classes, n", [(2, 40), (3, 1), (3, 2), (100, 300)])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_no_unknown_items_few_items_and_many_classes(n_classes, n, tmp_path):
    evaluation = evaluate([f"class {i}" for i in range(n_classes)], n_classes if n_classes < 100 else 60, n=n)
    write_report(tmp_path / "page.html", evaluation)
    page = Parsed(tmp_path / "page.html")
    headings = {text for text in page.texts if text in ("Groups found", "ROC and OSCR")}
    assert headings == ({"Groups found", "ROC and OSCR"} if n_classes == 100 else set())
    if n_classes < 100:
        assert page.texts[page.texts.index("auroc") :][:6].count("–") == 1


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_one_known_class_or_only_unknown_items_are_drawn(tmp_path):
    recognizer = OpenSetRecognizer("knn", alpha=0.2).fit(torch.eye(40), ["a", "b"] * 20)
    for names in (["a"] * 6 + ["z"] * 6, ["z"] * 12):
        write_report(tmp_path / "page.html", evaluate_embeddings(recognizer, torch.eye(40)[:12], names))
        assert "Confusion" in Parsed(tmp_path / "page.html").texts


def test_nothing_is_written_when_a_part_fails(plain, tmp_path, monkeypatch):
    (tmp_path / "page.html").write_text("old")

    def fail(evaluation):
        raise RuntimeError("no picture")

    monkeypatch.setattr(pictures, "groups", fail)
    with pytest.raises(RuntimeError, match="no picture"):
        write_report(tmp_path / "page.html", plain)
    assert (tmp_path / "page.html").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_wrong_arguments_are_one_line(plain, tmp_path):
    n = len(plain.names)
    with pytest.raises(OsmlError, match=f"^3 images for an evaluation of {n} items: expected one for each$"):
        write_report(tmp_path / "page.html", plain, paths=["a.png"] * 3)
    with pytest.raises(OsmlError, match=r"^give either the paths of the images or the images themselves, not both$"):
        write_report(tmp_path / "page.html", plain, paths=["a.png"] * n, images=[None] * n)
    with pytest.raises(
        OsmlError, match=r"^cannot write the page '.*': No such file or directory; choose another place$"
    ):
        Page("t", "l").write(tmp_path / "absent" / "page.html")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("module", ["matplotlib", "jinja2"])
def test_a_missing_library_names_the_extra(module, monkeypatch):
    for name in [n for n in sys.modules if n.startswith("osml_plugin.report")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(OsmlError, match=rf"^a report needs {module}: pip install 'osml-plugin\[report\]'$"):
        import_module("osml_plugin.report")


def test_thresholds_by_class_are_shown_by_name(tmp_path):
    embeddings, labels, _ = sphere_classes(n_classes=5, per_class=30)
    known = labels < 3
    recognizer = OpenSetRecognizer("knn", "class_conformal", alpha=0.2).fit(embeddings[known], labels[known])
    recognizer.enroll("late", embeddings[labels == 3][:2])
    evaluation = evaluate_embeddings(recognizer, embeddings, [str(c) for c in labels.tolist()])
    assert evaluation.to_dict()["thresholds"] == recognizer.class_thresholds
    assert recognizer.class_thresholds.keys() == {"0", "1", "2", "late"}
    json.dumps(evaluation.to_dict(), allow_nan=False)
    write_report(tmp_path / "page.html", evaluation)
    page = Parsed(tmp_path / "page.html")
    at = page.texts.index("Thresholds by class")
    for name, tau in recognizer.class_thresholds.items():
        shown = [text for text in page.texts[page.texts.index(name, at) :] if text]
        assert shown[1] == f"{tau:.4f}"
    assert any("not all that lies right of it is called unknown" in text for text in page.texts)

    plain = OpenSetRecognizer(alpha=0.2).fit(embeddings[known], labels[known])
    assert evaluate_embeddings(plain, embeddings, labels.numpy().astype(str)).to_dict()["thresholds"] == {}


def test_every_figure_has_its_sentence(plain):
    figures = {*asdict(plain.metrics), *asdict(plain.discovery), "threshold", "alpha"}
    assert set(sections.MEANING) == figures and set(sections.AT_THRESHOLD) <= figures


# --- pictures --------------------------------------------------------------------------------------------


def test_histogram_bars_are_shares(plain):
    axes = pictures.score_histogram(plain).axes[0]
    scores, unknown = plain.recognition.scores, plain.labels == UNKNOWN
    bars = [patch.get_data() for patch in axes.patches]
    assert len(bars) == 4  # each kind filled and outlined
    for (values, edges, _), of in zip(bars[::2], (~unknown, unknown), strict=True):
        inside = [np.mean((scores[of] >= a) & (scores[of] < b)) for a, b in pairwise(edges[1:-1])]
        np.testing.assert_allclose(values[1:-1], inside)
        np.testing.assert_allclose(values.sum(), 1)
    assert axes.lines[0].get_xdata()[0] == plain.threshold


def test_curves_pass_through_the_operating_point_and_enclose_their_area(plain, monkeypatch):
    unknown = plain.labels == UNKNOWN
    for figure, area in (
        (pictures.roc(plain), roc_auc_score(unknown, plain.recognition.scores)),
        (pictures.oscr(plain), plain.metrics.oscr),
    ):
        lines = figure.axes[0].lines
        curve = max(lines, key=lambda line: len(line.get_xdata())).get_xydata()
        point = next(line for line in lines if line.get_marker() == "o").get_xydata()[0]
        np.testing.assert_allclose(np.trapezoid(curve[:, 1], curve[:, 0]), area)
        assert np.abs(curve - point).sum(axis=1).min() < 1e-12
    monkeypatch.setattr(pictures, "CURVE_POINTS", 20)
    lines = pictures.roc(plain).axes[0].lines
    curve = max(lines, key=lambda line: len(line.get_xdata())).get_xydata()
    assert len(curve) == 20 and curve[0].tolist() == [0, 0] and curve[-1].tolist() == [1, 1]


def test_confusion_is_that_of_scikit_learn(plain):
    figure = pictures.confusion(plain)
    order = sorted(["ant", "bee", NASTY])  # ids follow the sorted names
    rows, columns = [*order, "cow", "dog"], [*order, "unknown"]
    answers = [name or "unknown" for name in plain.recognition.names]
    every = [*rows, "unknown"]
    counts = confusion_matrix(plain.names, answers, labels=every, normalize="true")
    expected = counts[: len(rows), [every.index(c) for c in columns]]
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    assert [t.get_text() for t in axes.get_yticklabels()] == rows
    assert [t.get_text() for t in axes.get_xticklabels()] == columns


def test_groups_against_classes_counts_pairs(plain):
    names = tuple(n for n, label in zip(plain.names, plain.labels, strict=True) if label == UNKNOWN)
    found = np.where(np.array(names) == "cow", 2, 0)
    found[:3], found[3] = 1, -1
    groups = Discovery(
        labels=found,
        n_classes=3,
        confidence=np.ones(len(found)),
        exemplars=tuple(np.flatnonzero(found == g) for g in range(3)),
        n_classes_interval=(2, 4),
        granularity=1.0,
        granularity_source="default",
        group_confidence=np.ones(3),
        known_class=np.full(len(found), None),
        too_few=np.zeros(len(found), dtype=bool),
        lacking=0,
        note="",
        pool=None,
    )
    axes = pictures.groups(replace(plain, groups=groups)).axes[0]
    columns = [t.get_text() for t in axes.get_xticklabels()]
    assert columns[-1] == "none" and sorted(columns[:-1]) == ["0", "1", "2"]
    assert columns.index("2") < columns.index("0"), "groups stand in the order of their classes: cow, dog"
    rows = [t.get_text() for t in axes.get_yticklabels()]
    assert rows == ["cow", "dog"]
    for i, name in enumerate(rows):
        for j, column in enumerate(columns):
            group = -1 if column == "none" else int(column)
            share = sum(n == name and g == group for n, g in zip(names, found, strict=True)) / names.count(name)
            np.testing.assert_allclose(axes.images[0].get_array()[i, j], share)


def test_heat_maps_are_left_out_where_nobody_could_read_them():
    evaluation = evaluate([f"class {i}" for i in range(31)], 20)
    classes = len(set(evaluation.names))
    assert (pictures.confusion(evaluation) is None) == (classes > 30)
    many = evaluate([f"class {i}" for i in range(60)], 10, n=300)
    assert len(set(many.names)) > 50
    assert pictures.confusion(many) is None and pictures.groups(many) is None


def test_maps_colour_by_class_and_by_answer(plain):
    true, answer = pictures.maps(plain)
    for figure, names in ((true, plain.names), (answer, plain.recognition.names)):
        dots, _, crosses, _ = figure.axes[0].collections
        colours = np.concatenate([dots.get_facecolors(), crosses.get_edgecolors()])
        assert len(colours) == len(plain.names)
        counts = sorted(np.unique(colours, axis=0, return_counts=True)[1])
        assert counts == sorted(np.unique([n or "" for n in names], return_counts=True)[1])
    assert {t.get_text() for t in true.axes[0].texts} == set(plain.names)
    assert {t.get_text() for t in answer.axes[0].texts} == {n for n in plain.recognition.names if n}


def test_the_map_keeps_neighbours_together():
    evaluation = evaluate(list("abcd"), 2, n=80, width=12)
    xy = pictures._plane(evaluation.embeddings.numpy(), 0)
    np.testing.assert_array_equal(xy, pictures._plane(evaluation.embeddings.numpy(), 0))
    distance = np.linalg.norm(xy[:, None] - xy[None], axis=2) + np.diag(np.full(80, np.inf))
    names = np.array(evaluation.names)
    assert np.mean(names[distance.argmin(axis=1)] == names) > 0.9


def test_a_map_of_many_items_is_a_seeded_sample(monkeypatch):
    monkeypatch.setattr(pictures, "MAP_ITEMS", 50)
    evaluation = evaluate(list("abcd"), 2, n=120)
    one, again, other = (pictures.maps(evaluation, seed=seed)[0] for seed in (0, 0, 1))
    places = [np.concatenate([c.get_offsets() for c in f.axes[0].collections[::2]]) for f in (one, again, other)]
    assert len(places[0]) == 50
    np.testing.assert_array_equal(places[0], places[1])
    assert not np.array_equal(places[0], places[2])


# --- the page itself -------------------------------------------------------------------------------------


def test_large_figures_become_pixels(tmp_path):
    figure = Figure(figsize=(3, 3))
    draw = np.random.default_rng(0)
    figure.add_subplot().scatter(*draw.normal(size=(2, 10_000)))
    small = Figure(figsize=(2, 2))
    small.set_label("a line")
    small.add_subplot().plot([1, 2])
    page = Page("t", "l")
    page.add_figure("Points", [figure, small], "a note")
    page.write(tmp_path / "page.html")
    parsed = Parsed(tmp_path / "page.html")
    assert [kind for kind, _ in parsed.pictures()] == ["png", "svg+xml"]
    assert [a["alt"] for a in parsed.all("img")] == ["Points", "a line"]
    assert len(parsed.source) < 500_000 and "a note" in parsed.texts


def test_tables_show_numbers_and_dashes(tmp_path):
    page = Page("t", "l")
    rows = [("a", 1, 0.5, "x"), ("b", 20, None, "y"), ("c", 3, math.nan, "z"), ("d", 4, math.inf, "ü")]
    page.add_table("Table", ("name", "n", "share", "word"), rows)
    page.add_table("Empty", ("name", "n"), [])
    page.write(tmp_path / "page.html")
    parsed = Parsed(tmp_path / "page.html")
    cells = [text for text in parsed.texts if text][-17:]
    assert cells[:16] == ["a", "1", "0.5000", "x", "b", "20", "–", "y", "c", "3", "–", "z", "d", "4", "∞", "ü"]
    assert cells[16] == "Empty" and len(parsed.all("table")) == 1
    assert sum(a.get("class") == "number" for a in parsed.all("td")) == 8
    assert sum(a.get("class") == "number" for a in parsed.all("th")) == 2


@pytest.mark.parametrize("shape", [(5, 9), (5, 9, 1), (5, 9, 3), (5, 9, 4), (200, 100, 3)])
def test_thumbnails_of_arrays_and_pil_images(shape, tmp_path):
    pixels = np.full(shape, 7, dtype=np.uint8)
    if shape[-1] == 4:
        pixels[:, :, 3] = 255  # opaque
    image = Image.fromarray(pixels.squeeze())
    page = Page("t", "l")
    page.add_images("Images", [("both", [(pixels, "array"), (image, "PIL")])])
    page.write(tmp_path / "page.html")
    parsed = Parsed(tmp_path / "page.html")
    made = [Image.open(io.BytesIO(content)) for _, content in parsed.pictures()]
    assert {m.size for m in made} == {(48, 96) if shape[0] == 200 else (9, 5)}
    for m in made:
        assert set(np.unique(np.array(m)).tolist()) == {7}
    assert ["crisp" in a.get("class", "") for a in parsed.all("img")] == [shape[0] == 5] * 2


def test_bad_images_are_told(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    page = Page("t", "l")
    page.add_images("Images", [("", [(tmp_path / "broken.png", "one"), (tmp_path / "absent.png", "two")])])
    page.write(tmp_path / "page.html")
    parsed = Parsed(tmp_path / "page.html")
    assert parsed.texts.count("cannot be read") == 2 and parsed.pictures() == []
    assert parsed.all("figure")[0]["title"] == f"{tmp_path.name}/broken.png"
    with pytest.raises(OsmlError, match=r"^an image is uint8 pixels \(H, W\) or .*; got float64 of shape \(4, 4\)$"):
        page.add_images("Images", [("", [(np.zeros((4, 4)), "float")])])
