"""What is taken from folders, what is left out and told, and what is passed over."""

from __future__ import annotations

import io
import os
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from osml_plugin import OsmlError
from osml_plugin.bulk_tables import open_source
from osml_plugin.data import open_items, read_image

DRAW = np.random.default_rng(5)


def picture(path: Path, kind: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(DRAW.integers(0, 256, (8, 8)).astype(np.uint8)).save(path, kind)
    return path


def names(items, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in items.paths]


def bulk_names(root: Path) -> list[str]:
    return [
        Path(path).relative_to(root).as_posix()
        for part in open_source(root, []).parts
        for path in part.table["path"].to_pylist()
    ]


@pytest.fixture
def root(tmp_path) -> Path:
    for name in ("a/0.png", "a/1.png", "b/0.png"):
        picture(tmp_path / "photos" / name)
    return tmp_path / "photos"


def test_more_names_of_the_formats_that_are_read(root):
    kinds = {
        ".jfif": "JPEG",
        ".JPE": "JPEG",
        ".jif": "JPEG",
        ".avif": "AVIF",
        ".apng": "PNG",
        ".dib": "BMP",
        ".pnm": "PPM",
        ".mpo": "JPEG",
    }
    for suffix, kind in kinds.items():
        file = picture(root / "b" / f"more{suffix}", kind)
        assert read_image(file, 1, 8).shape == (1, 8, 8)
    assert len(open_items(root)) == 3 + len(kinds) == len(bulk_names(root))


def test_what_is_left_out_is_counted_and_told(root, caplog):
    for i in range(20):
        (root / "a" / f"IMG_{i}.HEIC").write_bytes(b"no reader")
    assert names(open_items(root), root) == ["a/0.png", "a/1.png", "b/0.png"]
    assert caplog.messages == [
        "20 of 22 files of class 'a' were left out: 20 .HEIC (pictures that cannot be read here: convert them to JPEG or PNG)"
    ]
    (root / "b" / "notes.txt").write_text("")
    (root / "b" / "README").write_text("")
    (root / "index.csv").write_text("")  # beside the class folders: about the data, no item
    for take in (lambda: open_items(root), lambda: open_items(root, labelled=False)):
        caplog.clear()
        take()
        assert len(caplog.messages) == 1
        assert f"22 files in '{root}', most of them of class 'a' (20 of 22) were left out: 20 .HEIC, 1" in caplog.text
    caplog.clear()
    assert len(bulk_names(root)) == 3
    assert "23 files in" in caplog.text and "20 .HEIC" in caplog.text
    caplog.clear()
    with pytest.raises(OsmlError, match="20 other files: 20 .HEIC .*convert them to JPEG or PNG"):
        for file in (root / "a").glob("*.png"):
            file.unlink()
        open_items(root)
    with pytest.raises(OsmlError, match=r"IMG_0.HEIC' is a picture that cannot be read here: convert it"):
        open_items(root / "a" / "IMG_0.HEIC", labelled=False)


def test_pictures_beside_class_folders_are_told(root, caplog):
    (root / "forgotten.heic").write_bytes(b"")
    open_items(root)
    assert "1 .heic" in caplog.text


def test_thumbnails_and_bins_are_passed_over(root, caplog):
    for place in (
        "@eaDir/0.png",
        "a/@eaDir/0.png/SYNOFILE_THUMB_M.png",
        "a/.thumbnails/0.png",
        "__MACOSX/x.png",
        "#recycle/a/0.png",
        "a/@Recycle/0.png",
        "a/._0.png",
    ):
        picture(root / place)
    for place in ("a/Thumbs.db", "a/.DS_Store", "b/desktop.ini", "Thumbs.db"):
        (root / place).write_bytes(b"x")
    expected = ["a/0.png", "a/1.png", "b/0.png"]
    assert (
        names(open_items(root), root) == expected == names(open_items(root, labelled=False), root) == bulk_names(root)
    )
    assert open_items(root).class_names() == ["a", "b"] and caplog.messages == []


def test_linked_folders_are_followed_once_and_rings_are_cut(root, tmp_path):
    outside = tmp_path / "outside"
    for i in range(3):
        picture(outside / "deep" / f"{i}.png")
    (root / "a" / "linked").symlink_to(outside)
    (root / "a" / "again").symlink_to(outside / "deep")  # the same files by another way
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "self").symlink_to(".")
    (outside / "ring").symlink_to(root / "a")
    (outside / "deep" / "home").symlink_to(outside)
    (root / "c").symlink_to(outside)  # a class that is a link
    (root / "loop").symlink_to(root)  # which would be a class of all items
    (root / "home").symlink_to("..")
    items = open_items(root)
    assert items.labels == ("a",) * 5 + ("b",) + ("c",) * 5
    assert len({os.path.realpath(path) for path in items.paths[:5]}) == 5
    assert len(bulk_names(root)) == 6
    shutil.rmtree(outside)
    (root / "c").unlink()
    assert len(open_items(root)) == 3  # links that lead nowhere


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: socket.socket(socket.AF_UNIX).bind(path)], ids=["pipe", "socket"]
)
def test_pipes_and_sockets_do_not_hang(root, make, caplog, monkeypatch):
    monkeypatch.chdir(root / "a")  # the name of a socket is short
    make("odd.png")
    assert len(open_items(root)) == 3 == len(open_items(root, labelled=False)) == len(bulk_names(root))
    assert caplog.text.count("1 pipe or device") == 3
    with pytest.raises(OsmlError, match=r"odd\.png' is no regular file"):
        open_items(root / "a" / "odd.png", labelled=False)
    with pytest.raises(OsmlError, match=r"odd\.png': no regular file"):
        read_image(root / "a" / "odd.png", 1, None)
    (root / "m.csv").write_text("path,label\na/odd.png,a\n")
    with pytest.raises(OsmlError, match=r"m\.csv' names 1 of 1 files that are not there"):
        open_items(root / "m.csv")


def test_an_inbox_may_hold_pictures_and_folders(root, caplog):
    picture(root / "loose.png")
    (root / "empty").mkdir()
    picture(root / " odd name " / "x.png")
    with pytest.raises(OsmlError, match="holds both class folders and images such as 'loose.png'"):
        open_items(root)
    inbox = open_items(root, labelled=False)
    assert names(inbox, root) == [" odd name /x.png", "a/0.png", "a/1.png", "b/0.png", "loose.png"]
    assert inbox.labels is None and sorted(bulk_names(root)) == names(inbox, root)
    (root / "loose.png").unlink()
    shutil.rmtree(root / " odd name ")
    assert open_items(root, labelled=False).labels == ("a", "a", "b")  # and an empty folder, which is no class
    with pytest.raises(OsmlError, match="class folder .*empty' holds no images"):
        open_items(root)
    for folder in ("a", "b"):
        shutil.rmtree(root / folder)
    with pytest.raises(OsmlError, match="photos' holds no images"):
        open_items(root, labelled=False)


def test_odd_names(root):
    for name in ("ä ö.png", "a\nb.png", "-rf.png", "[x]*?.png", "%s.png", "café.png", ".png", "x.png.PNG"):
        picture(root / "b" / name, "PNG")
    assert len(open_items(root)) == 3 + 7  # '.png' is hidden
    assert [read_image(path, 1, 8).shape for path in open_items(root).paths] == [(1, 8, 8)] * 10
    assert isinstance(read_image(io.BytesIO((root / "b" / "-rf.png").read_bytes()), 1, 8).sum().item(), int)
