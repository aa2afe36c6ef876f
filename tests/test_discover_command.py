from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import sphere_classes
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.sparse import csr_matrix
from test_report import Parsed

from osml_plugin import OpenSetRecognizer, OsmlError, commands
from osml_plugin.data import write_embeddings
from osml_plugin.discovery.methods import names as method_names
from osml_plugin.discovery.tree import Tree
from osml_plugin.report import discovery as report
from osml_plugin.report import pictures

KNOWN = 3
"""Of the classes below, those that the recogniser knows."""


@pytest.fixture(scope="module")
def spheres():
    embeddings, labels, _ = sphere_classes(7, 40, spread=0.08, seed=1)
    return embeddings.numpy(), labels.numpy()


@pytest.fixture(autouse=True)
def quick_map(request, monkeypatch):
    """The first two dimensions in place of t-SNE, but for the test that looks at the whole."""
    if request.node.name != "test_images_end_to_end":
        monkeypatch.setattr(pictures, "_plane", lambda embeddings, seed: embeddings[:, :2])


@pytest.fixture(scope="module")
def bundle(spheres, tmp_path_factory) -> Path:
    """A recogniser of embeddings."""
    embeddings, labels = spheres
    known = np.flatnonzero((labels < KNOWN) & (np.arange(len(labels)) % 40 < 20))
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    OpenSetRecognizer("knn", alpha=0.1).fit(embeddings[known], labels[known]).save(folder)
    return folder


def photographs(folder: Path, classes: list[int]) -> list[Path]:
    """An image of each item, `folder/<class>/<number of its class>.png`: the same file names in each sub-folder."""
    paths, count = [], Counter()
    for label in classes:
        path = folder / str(label) / f"{count[label]}.png"
        count[label] += 1
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 5), (40 * label, 10 * (count[label] % 25), 99)).save(path)
        paths.append(path)
    return paths


@pytest.fixture
def inbox(spheres, tmp_path) -> Path:
    """Embeddings of twenty items of three unknown classes each, and the files that they came from."""
    embeddings, labels = spheres
    chosen = np.flatnonzero((labels >= KNOWN) & (labels < KNOWN + 3) & (np.arange(len(labels)) % 40 < 20))
    (tmp_path / "inbox").mkdir()
    file = tmp_path / "inbox" / "inbox.npz"
    paths = photographs(tmp_path / "inbox", labels[chosen].tolist())
    write_embeddings(file, embeddings[chosen], None, paths)
    return file


def files_of(folder: Path) -> dict[str, bytes | str]:
    """Everything below a folder: what a file holds, or where a link leads."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = os.readlink(path)
        elif path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
    return found


def fails(answer: tuple[int, str, str], *parts: str) -> None:
    status, out, err = answer
    (line,) = [line for line in err.splitlines() if line.startswith("osml: error:")]
    assert status == 2 and out == "" and err.splitlines()[-1] == line
    assert all(part in line for part in parts), line


# --- what is written -------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [[], ["--copy"]])
def test_each_file_lies_once_in_the_folder_of_its_group(osml, bundle, inbox, tmp_path, how):
    out = tmp_path / "found"
    status, printed, _ = osml("discover", bundle, inbox, "--n-classes", 3, "--out", out, "--json", *how)
    answer, record = json.loads(printed), json.loads((out / "discovery.json").read_text())
    assert status == 0 and answer == {
        k: v for k, v in record.items() if k not in ("format", "version", "tree", "files", "identities")
    }
    assert sorted(path.name for path in out.iterdir()) == ["discovery.json", "groups", "index.html"]
    assert sorted(path.name for path in (out / "groups").iterdir()) == ["00", "01", "02"]
    for group in answer["groups"]:
        placed = list((out / "groups" / f"{group['group']:02}").iterdir())
        assert {str(path.resolve()) for path in placed} == set(group["members"]) or how
        # All sub-folders have files of the same names, and each class is a group.
        assert sorted(p.read_bytes() for p in placed) == sorted(Path(m).read_bytes() for m in group["members"])
        assert len(placed) == group["size"] == len(group["members"]) == len(group["member_confidence"]) == 20
        assert 0 <= group["confidence"] <= 1 and all(0 <= c <= 1 for c in group["member_confidence"])
        assert set(group["exemplars"]) <= set(group["members"])
    links = [path.is_symlink() for path in out.glob("groups/*/*")]
    assert links == [not how] * 60
    assert record["files"] == {
        str(path.relative_to(out)): record["files"][str(path.relative_to(out))] for path in out.glob("groups/*/*")
    }


def test_names_that_clash_get_numbers(osml, bundle, inbox, tmp_path):
    out = tmp_path / "found"
    assert osml("discover", bundle, inbox, "--n-classes", 1, "--out", out)[0] == 0
    names = {path.name for path in (out / "groups/00").iterdir()}
    assert names == {f"{i}{n}.png" for i in range(20) for n in ("", " (2)", " (3)")}
    sources = {path.resolve() for path in (out / "groups/00").iterdir()}
    assert sources == set(inbox.parent.rglob("*.png"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.sampled_from(["a.png", "A.PNG", "a (2).png", "a (2) (2).png", "b", ".c", "a (3).png"]), max_size=30))
def test_free_names_differ_whatever_the_case(names):
    taken = Counter()
    free = [report._free_name(name, taken) for name in names]
    assert len({name.casefold() for name in free}) == len(names)
    for name, got in zip(names, free, strict=True):
        assert os.path.splitext(got)[1] == os.path.splitext(name)[1] and got.startswith(os.path.splitext(name)[0])
    assert not names or free[0] == names[0]


def test_the_table(osml, bundle, inbox):
    status, printed, _ = osml("discover", bundle, inbox, "--n-classes", 3)
    first, header, *rows = printed.splitlines()
    assert (
        status == 0
        and first.startswith("60 items in 3 groups")
        and header.split()[:3]
        == [
            "group",
            "items",
            "confidence",
        ]
    )
    assert [row.split()[:2] for row in rows] == [[str(g), "20"] for g in range(3)]
    assert all(row.count(".png") == 3 for row in rows)


def test_embeddings_without_images_have_a_record_and_a_page(osml, bundle, spheres, tmp_path):
    embeddings, labels = spheres
    write_embeddings(tmp_path / "e.npz", embeddings[labels >= 5][:16], None)
    status, _, err = osml("discover", bundle, tmp_path / "e.npz", "--out", tmp_path / "found", "--n-classes", 1)
    assert status == 0 and "warning" not in err
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == ["discovery.json", "index.html"]
    record = json.loads((tmp_path / "found/discovery.json").read_text())
    assert record["groups"][0]["members"] == [str(i) for i in range(16)] and record["files"] == {}
    page = Parsed(tmp_path / "found/index.html")
    assert "embeddings without images, so there are no thumbnails" in page.source
    assert len(page.pictures()) == 1  # the map


def test_files_that_are_elsewhere_are_told_and_not_linked(osml, bundle, inbox, tmp_path):
    gone = sorted(inbox.parent.rglob("*.png"))[:2]
    for path in gone:
        path.unlink()
    status, _, err = osml("discover", bundle, inbox, "--n-classes", 3, "--out", tmp_path / "found")
    assert status == 0 and "2 of 60 files are not there" in err
    assert len(list((tmp_path / "found").glob("groups/*/*"))) == 58


def test_a_name_that_is_no_text(osml, bundle, inbox, tmp_path):
    odd = Path(os.fsdecode(os.fsencode(inbox.parent) + b"/caf\xe9.png"))
    named = np.load(inbox)
    sorted(inbox.parent.rglob("*.png"))[0].rename(odd)
    result = commands.discover(bundle, inbox, n_classes=3, progress=False)
    paths = (odd, *result.items.paths[1:])
    object.__setattr__(result.items, "paths", paths)
    assert report.write_discovery(tmp_path / "found", result) == 0 and len(named["paths"]) == 60
    record = json.loads((tmp_path / "found/discovery.json").read_text())
    assert str(odd) in record["files"].values()
    Parsed(tmp_path / "found/index.html")
    report.write_discovery(tmp_path / "found", result, overwrite=True)  # it knows its files again


# --- what is not touched ---------------------------------------------------------------------------------


def test_an_earlier_discovery_is_replaced_only_when_asked(osml, bundle, inbox, tmp_path):
    out = tmp_path / "found"
    (tmp_path / "found").mkdir()  # an empty folder is free
    assert osml("discover", bundle, inbox, "--n-classes", 3, "--out", out)[0] == 0
    before = files_of(out)
    fails(osml("discover", bundle, inbox, "--n-classes", 2, "--out", out), "is not empty", "--overwrite")
    assert files_of(out) == before
    next((out / "groups/02").iterdir()).unlink()  # a person may have thrown some away
    assert osml("discover", bundle, inbox, "--n-classes", 2, "--out", out, "--overwrite")[0] == 0
    assert sorted(path.name for path in (out / "groups").iterdir()) == ["00", "01"]
    assert len(list(out.glob("groups/*/*"))) == 60
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found", "inbox"]


@pytest.mark.parametrize("name", ["notes.txt", "groups/00/mine.png", "groups/otter/1.png", ".hidden", "link"])
def test_what_others_wrote_stays(osml, bundle, inbox, tmp_path, name):
    out = tmp_path / "found"
    assert osml("discover", bundle, inbox, "--n-classes", 2, "--out", out)[0] == 0
    (out / name).parent.mkdir(exist_ok=True)
    if name == "link":
        (out / name).symlink_to(inbox.parent)  # to a folder
    else:
        (out / name).write_text("mine")
    before = files_of(out)
    fails(osml("discover", bundle, inbox, "--out", out, "--overwrite"), f"'{name}'", "which no discovery wrote")
    assert files_of(out) == before


def test_a_discovery_is_not_replaced_by_one_of_a_part_of_it(osml, bundle, inbox, tmp_path):
    out = tmp_path / "found"
    assert osml("discover", bundle, inbox, "--n-classes", 2, "--out", out, "--copy")[0] == 0
    before = files_of(out)
    fails(osml("discover", bundle, out / "groups" / "00", "--out", out, "--overwrite"), "00' is in", "another --out")
    assert files_of(out) == before


@pytest.mark.parametrize(
    "record", [None, "{", "[]", '{"format": "other", "files": {}}', '{"format": "osml-discovery"}']
)
def test_a_folder_without_a_record_of_ours_is_not_ours(osml, bundle, inbox, tmp_path, record):
    out = tmp_path / "found"
    out.mkdir()
    (out / "index.html").write_text("somebody's page")
    if record is not None:
        (out / "discovery.json").write_text(record)
    before = files_of(out)
    fails(osml("discover", bundle, inbox, "--out", out, "--overwrite"), "which no discovery wrote")
    assert files_of(out) == before


def test_bad_input_ends_with_one_line_and_writes_nothing(osml, bundle, inbox, digits_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "shut").mkdir()
    before = files_of(tmp_path)
    run = ["discover", bundle, inbox, "--out"]
    fails(osml(*run, tmp_path / "file"), "is a file")
    fails(osml(*run, tmp_path / "no" / "where"), "no folder", "make it first")
    fails(osml("discover", bundle, inbox.parent, "--out", inbox.parent / "found"), "taken for data the next time")
    fails(osml(*run, tmp_path / "found", "--method", "communitys"), "unknown discovery method", "'communities'")
    fails(osml(*run, tmp_path / "found", "--n-classes", 0), "n_classes is 0")
    fails(osml(*run, tmp_path / "found", "--granularity", "nan"), "granularity")
    fails(osml(*run, tmp_path / "found", "--n-classes", 61), "n_classes is 61")
    fails(osml("discover", bundle, tmp_path / "nothing", "--out", tmp_path / "found"), "no file or folder")
    fails(osml("discover", bundle, digits_folder, "--out", tmp_path / "found"), "takes embeddings")
    for option in ("--copy", "--overwrite"):
        fails(osml("discover", bundle, inbox, option), option, "--out")
    assert files_of(tmp_path) == before and not (tmp_path / "found").exists()


@pytest.mark.parametrize("step", ["link", "page", "rename"])
def test_a_failure_on_the_way_leaves_what_was_there(osml, bundle, inbox, tmp_path, monkeypatch, step):
    out = tmp_path / "found"
    run = ["discover", bundle, inbox, "--n-classes", 2, "--out", out, "--overwrite"]

    def refuse(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    rename = os.rename

    def refuse_the_new(old, new):
        return refuse() if str(old).endswith(".part") else rename(old, new)

    def break_down():
        if step == "link":
            monkeypatch.setattr(os, "symlink", refuse)
        elif step == "page":
            monkeypatch.setattr(report.Page, "write", refuse)
        else:
            monkeypatch.setattr(os, "rename", refuse_the_new)

    with monkeypatch.context() as context:
        monkeypatch = context
        break_down()
        fails(osml(*run), "cannot write", "No space left on device")
        assert [path.name for path in tmp_path.iterdir()] == ["inbox"]
    assert osml(*run)[0] == 0
    before = files_of(tmp_path)
    with pytest.MonkeyPatch.context() as context:
        monkeypatch = context
        break_down()
        fails(osml(*run), "cannot write")
    assert files_of(tmp_path) == before


# --- what is said ----------------------------------------------------------------------------------------


def test_methods(osml, bundle, inbox):
    for method in method_names():
        status, printed, _ = osml("discover", bundle, inbox, "--method", method, "--n-classes", 3, "--json")
        assert status == 0 and json.loads(printed)["n_classes"] == 3


def test_all_or_the_rejected(osml, bundle, spheres, tmp_path):
    embeddings, labels = spheres
    chosen = np.flatnonzero((np.arange(len(labels)) % 40 >= 36) | (labels >= KNOWN))
    write_embeddings(tmp_path / "mixed.npz", embeddings[chosen], labels[chosen].tolist())
    rejected, everything = (
        json.loads(osml("discover", bundle, tmp_path / "mixed.npz", "--json", *more)[1]) for more in ([], ["--all"])
    )
    assert everything["n_items"] == 172 and everything["n_recognised"] == 0
    assert rejected["n_items"] + rejected["n_recognised"] == 172 and 160 <= rejected["n_items"] < 172
    for answer in (rejected, everything):
        listed = sum((group["members"] for group in answer["groups"]), answer["left_out"])
        assert sorted(map(int, listed)) == sorted(set(map(int, listed))) and len(listed) == answer["n_items"]
        assert answer["metrics"]["n_classes_found"] == answer["n_classes"] == len(answer["groups"])
    # Known items that were handed in too are left out, and the class that they are among is said.
    assert everything["left_out"] == [str(i) for i in range(12)]
    assert everything["left_out_known_class"] == [str(label) for label in labels[chosen][:12]]


def test_the_nearest_known_class_of_a_group(bundle, inbox):
    recognizer = OpenSetRecognizer.load(bundle)
    result = commands.discover(recognizer, inbox, n_classes=3, progress=False)
    items = np.load(inbox)["embeddings"]
    for group in result.to_dict()["groups"]:
        votes = Counter()
        for path in group["members"]:
            row = [str(p) for p in result.items.paths].index(path)
            votes[recognizer.predict(items[row : row + 1]).nearest[0]] += 1
        assert votes[group["nearest_known"]] == max(votes.values())
        assert group["nearest_known_share"] == max(votes.values()) / group["size"]


def test_only_known_items_propose_no_class(osml, bundle, spheres, tmp_path):
    embeddings, labels = spheres
    chosen = np.flatnonzero((labels < KNOWN) & (np.arange(len(labels)) % 40 >= 20))
    write_embeddings(tmp_path / "known.npz", embeddings[chosen], None, photographs(tmp_path / "photos", [0] * 60))
    out = tmp_path / "found"
    status, printed, _ = osml("discover", bundle, tmp_path / "known.npz", "--all", "--out", out)
    assert status == 0 and "60 items in 0 groups" in printed and "60 left out" in printed
    assert "nothing is proposed: " in printed
    assert len(list((out / "left_out").iterdir())) == 60 and not (out / "groups").exists()
    page = Parsed(out / "index.html")
    assert "No new class is proposed: " in page.source and "60 items in no group" in page.texts
    # A few of the known ones lie apart by chance; each of the others is said to be among its own class.
    among = [int(text.split()[0]) for text in page.texts if re.fullmatch(r"\d+ items among items of \d", text)]
    assert len(among) == 3 and 54 <= sum(among) <= 60


# --- the page --------------------------------------------------------------------------------------------


def test_the_page_shows_every_group(osml, bundle, inbox, tmp_path):
    out = tmp_path / "found"
    assert osml("discover", bundle, inbox, "--n-classes", 2, "--out", out)[0] == 0
    page, record = Parsed(out / "index.html"), json.loads((out / "discovery.json").read_text())
    for group in record["groups"]:
        assert f"Group {group['group']}" in page.texts
        (said,) = [text for text in page.texts if text.startswith(f"{group['size']} items,")]
        assert f"confidence {group['confidence']:.2f}" in said and group["nearest_known"] in said
        for path in group["exemplars"]:
            assert "/".join(Path(path).parts[-2:]) in page.source
    # One of each at a glance, the map and the tree, nine exemplars and up to six more of each.
    assert len(page.pictures()) == 2 + 2 + sum(9 + min(6, group["size"] - 9) for group in record["groups"])
    assert page.texts.count("Least sure") == sum(group["size"] > 9 for group in record["groups"])


def test_the_least_sure_are_those(bundle, inbox, tmp_path):
    result = commands.discover(bundle, inbox, n_classes=1, progress=False)
    report.write_discovery(tmp_path / "found", result)
    page = Parsed(tmp_path / "found/index.html")
    others = [i for i in range(60) if i not in set(result.groups.exemplars[0].tolist())]
    least = sorted(result.groups.confidence[i] for i in others)[:6]
    said = [float(text.split()[0]) for text in page.texts[page.texts.index("Least sure") :] if " sure\n" in text]
    assert said == [pytest.approx(value, abs=0.005) for value in least]


def test_of_many_groups_the_smaller_ones_are_a_table(bundle, inbox, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "SHOWN_GROUPS", 2)
    monkeypatch.setattr(report, "GLANCE", 3)
    result = commands.discover(bundle, inbox, n_classes=6, progress=False)
    page = report.make_page(result)
    page.write(tmp_path / "page.html")
    parsed = Parsed(tmp_path / "page.html")
    headings = [text for text in parsed.texts if text.startswith("Group ") and "\n" not in text]
    assert headings == ["Group 0", "Group 1"]
    assert "The 3 largest of 6 groups." in parsed.source
    rows = parsed.texts[parsed.texts.index("Smaller groups") :]
    assert [text for text in rows if text in {"2", "3", "4", "5"}][:1] == ["2"]
    assert len([attributes for attributes in parsed.all("th") if attributes.get("scope") == "row"]) >= 4


def test_the_same_discovery_makes_the_same_page(bundle, inbox, tmp_path):
    pages = []
    for name in ("a", "b"):
        report.write_discovery(tmp_path / name, commands.discover(bundle, inbox, n_classes=3, progress=False))
        pages.append(files_of(tmp_path / name))
    assert pages[0] == pages[1]


def test_images_end_to_end(osml, digits_folder, tmp_path):
    """With a trained network, from a folder with class folders, onto a page with the map by t-SNE."""
    split = {"known": list("01234"), "pseudo_unknown": ["5"], "unknown": list("6789")}
    (tmp_path / "split.json").write_text(json.dumps(split))
    quick = ["--set", "training.epochs=3", "--set", "model.trunk.name=small_cnn", "--set", "training.batch_size=32"]
    data = shutil.copytree(digits_folder, tmp_path / "data")
    train = ["train", "--data", data, "--split", tmp_path / "split.json", "--out", tmp_path / "bundle", *quick]
    assert osml(*train)[0] == 0
    out = tmp_path / "found"
    status, printed, err = osml("discover", tmp_path / "bundle", data, "--out", out, "--copy")
    assert status == 0 and str(out / "index.html") in printed and "page: " in err
    record = json.loads((out / "discovery.json").read_text())
    assert len(record["files"]) == record["n_items"] == len([p for p in out.rglob("*.png") if not p.is_symlink()])
    page = Parsed(out / "index.html")
    assert "Against the labels of the data" in page.texts and "Map of the embedding" in page.texts
    # A group's folder is what `osml enroll` takes.
    status, printed, _ = osml("enroll", tmp_path / "bundle", "--name", "new", out / "groups/00", "--json")
    assert status == 0 and json.loads(printed)["n_examples"] == record["groups"][0]["size"]


def test_the_granularity_can_be_given(osml, bundle, inbox):
    coarse, fine = (
        json.loads(osml("discover", bundle, inbox, "--granularity", value, "--json")[1]) for value in (0.01, 20)
    )
    assert coarse["n_classes"] < fine["n_classes"] and coarse["granularity_source"] == "given granularity"


# --- the tree --------------------------------------------------------------------------------------------


def text_of(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_tree_shows_every_group_once(bundle, inbox, monkeypatch):
    result = commands.discover(bundle, inbox, n_classes=6, progress=False)
    sizes = np.bincount(result.groups.labels)
    assert sorted(text_of(pictures.group_tree(result.groups.tree, result.ids))) == [
        f"{g}: {n:,} items" for g, n in enumerate(sizes)
    ]
    assert pictures.group_tree(commands.discover(bundle, inbox, n_classes=1, progress=False).groups.tree, [0]) is None
    monkeypatch.setattr(pictures, "TREE_BRANCHES", 3)
    folded = [
        text.removesuffix(" items").split(": ") for text in text_of(pictures.group_tree(result.groups.tree, result.ids))
    ]
    assert len(folded) == 3
    listed = [group for names, _ in folded if "groups" not in names for group in names.split(", ")]
    n_hidden = sum(int(names.split()[0]) for names, _ in folded if "groups" in names)
    assert len(listed) == len(set(listed)) == 6 - n_hidden
    assert sum(int(n) for _, n in folded) == 60


def test_write_discovery_checks_again(bundle, inbox, tmp_path):
    result = commands.discover(bundle, inbox, n_classes=2, progress=False)
    (tmp_path / "found").mkdir()
    (tmp_path / "found/mine.txt").write_text("came meanwhile")
    with pytest.raises(OsmlError, match="is not empty"):
        report.write_discovery(tmp_path / "found", result)
    assert files_of(tmp_path / "found") == {"mine.txt": b"came meanwhile"}


# --- what a person said, and the run before ------------------------------------------------------------------


def test_groups_keep_their_number_from_run_to_run(osml, bundle, spheres, tmp_path):
    embeddings, labels = spheres
    (tmp_path / "inbox").mkdir()
    file = tmp_path / "inbox" / "inbox.npz"

    def write(classes: dict[int, int]) -> None:
        """So many items of each class."""
        chosen = [i for c, n in classes.items() for i in np.flatnonzero(labels == c)[:n]]
        paths = photographs(tmp_path / "inbox", labels[chosen].tolist())
        write_embeddings(file, embeddings[chosen], None, paths)

    def class_of(answer: dict) -> dict[int, set[str]]:
        return {group["group"]: {Path(m).parent.name for m in group["members"]} for group in answer["groups"]}

    write({3: 20, 4: 24})
    first, second = tmp_path / "first", tmp_path / "second"
    before = json.loads(osml("discover", bundle, file, "--n-classes", 2, "--out", first, "--json")[1])
    assert class_of(before) == {0: {"4"}, 1: {"3"}} and before["changes"] == []
    write({3: 30, 4: 20, 5: 40})  # the order by size is another
    run = ["discover", bundle, file, "--n-classes", 3, "--previous", first, "--out", second]
    after = json.loads(osml(*run, "--json")[1])
    assert class_of(after) == {0: {"4"}, 1: {"3"}, 2: {"5"}} and after["changes"] == ["2 is new"]
    assert sorted(path.name for path in (second / "groups").iterdir()) == ["00", "01", "02"]
    assert {path.resolve().parent.name for path in (second / "groups/01").iterdir()} == {"3"}
    printed = osml(*run, "--overwrite")[1]
    assert "since the last run: 2 is new" in printed


def test_links_between_files(osml, bundle, inbox, tmp_path):
    """Two classes are joined, one is cut, by naming files."""
    (tmp_path / "must.csv").write_text("3/0.png,4/0.png\n")
    (tmp_path / "cannot.csv").write_text(f"5/0.png, {inbox.parent / '5' / '1.png'}\n\n")
    run = ["discover", bundle, inbox, "--json", "--must-link", tmp_path / "must.csv"]
    answer = json.loads(osml(*run, "--cannot-link", tmp_path / "cannot.csv")[1])
    group_of = {str(Path(m).relative_to(inbox.parent)): g["group"] for g in answer["groups"] for m in g["members"]}
    assert group_of["3/0.png"] == group_of["4/0.png"]
    assert group_of["5/0.png"] != group_of["5/1.png"]


def test_links_of_items_that_are_not_grouped_are_refused(osml, bundle, spheres, tmp_path):
    embeddings, labels = spheres
    chosen = np.flatnonzero((np.arange(len(labels)) % 40 >= 36) | (labels >= KNOWN))
    write_embeddings(tmp_path / "mixed.npz", embeddings[chosen], None)
    answer = json.loads(osml("discover", bundle, tmp_path / "mixed.npz", "--json")[1])
    grouped = sum((group["members"] for group in answer["groups"]), answer["left_out"])
    recognised = min(set(range(12)) - set(map(int, grouped)))
    (tmp_path / "links.csv").write_text(f"{recognised},100\n")
    run = ["discover", bundle, tmp_path / "mixed.npz", "--must-link", tmp_path / "links.csv"]
    fails(osml(*run), f"'{recognised}'", "recognised as known", "--all")
    assert osml(*run, "--all")[0] == 0


def test_places_of_files_are_those_in_the_source(bundle, spheres, tmp_path):
    """A file that is there twice is told apart by its place, in whatever form it is named."""
    embeddings, labels = spheres
    chosen = np.flatnonzero((np.arange(len(labels)) % 40 >= 36) | (labels >= KNOWN))
    paths = photographs(tmp_path / "photos", labels[chosen].tolist())
    paths[-1] = paths[-2]
    write_embeddings(tmp_path / "mixed.npz", embeddings[chosen], None, paths)
    result = commands.discover(bundle, tmp_path / "mixed.npz", progress=False)
    assert result.names[-2:] == (f"{paths[-1]}#{len(chosen) - 2}", f"{paths[-1]}#{len(chosen) - 1}")
    assert result.short_names == [str(Path(name).relative_to(tmp_path)) for name in result.names]
    links = [result.names[-2:], result.short_names[-3:-1]]
    assert commands.discover(bundle, tmp_path / "mixed.npz", must_link=links, progress=False).groups.n_classes


def test_bad_links_and_runs_are_refused_in_one_line(osml, bundle, inbox, tmp_path):
    run = ["discover", bundle, inbox]
    links = tmp_path / "links.csv"
    fails(osml(*run, "--must-link", links), "cannot read the links")
    links.write_text("3/0.png\n")
    fails(osml(*run, "--must-link", links), "line 1", "1 fields")
    links.write_text("3/0.png,3/1.png\n\n3/0.png\n")
    fails(osml(*run, "--must-link", links), "line 3", "1 fields")
    links.write_text("3/0.png,3/0.png\n", encoding="utf-8-sig")  # as spreadsheets save it
    fails(osml(*run, "--cannot-link", links), "with itself")
    links.write_text("3/0.png,nobody.png\n")
    fails(osml(*run, "--cannot-link", links), "'nobody.png'", "60 items")
    links.write_text("3/0.png,3/0.png\n")
    fails(osml(*run, "--cannot-link", links), "with itself")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "bundle.json").write_text("{}")
    fails(osml("discover", tmp_path / "damaged", inbox, "--cannot-link", links), "with itself")  # before any work
    fails(osml(*run, "--previous", tmp_path), "no earlier discovery")
    (tmp_path / "discovery.json").write_text("{}")
    fails(osml(*run, "--previous", tmp_path), "no earlier discovery")


def test_a_tree_of_groups_without_links_has_a_width():
    together = np.kron(np.eye(3), np.ones((3, 3)) - np.eye(3))
    tree = Tree.of(csr_matrix(together), np.eye(9, dtype=np.float32), np.arange(9), np.arange(9) // 3)
    assert (tree.heights[tree.parent[[0, 1, 2]]] == 1).all()
    coarse, fine = pictures.group_tree(tree, [4, 5, 6]).axes[0].get_xlim()
    assert coarse > 1 > fine
