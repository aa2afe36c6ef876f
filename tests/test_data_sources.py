from __future__ import annotations

import builtins
import csv
import json
import os
import shutil
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image
from sklearn.datasets import load_digits

from osml_plugin import OsmlError
from osml_plugin.data import Items, open_items, write_embeddings

DIGITS = load_digits()


def write_digits(root: Path, classes=(0, 1, 2), per_class: int = 4, offset: int = 0) -> Path:
    for c in classes:
        (root / str(c)).mkdir(parents=True, exist_ok=True)
        for i in np.flatnonzero(DIGITS.target == c)[offset : offset + per_class]:
            Image.fromarray((DIGITS.images[i] * 15).astype(np.uint8)).save(root / str(c) / f"{i:04d}.png")
    return root


def one_line(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- folders ---------------------------------------------------------------------------------------------


def test_class_folders(tmp_path):
    root = write_digits(tmp_path / "digits")
    (root / "2").rename(root / "2.png")  # an odd name, but a folder
    (root / "0" / "nested").mkdir()
    shutil.copy(next((root / "0").glob("*.png")), root / "0" / "nested" / "z.PNG")
    (root / "0" / "notes.txt").write_text("no image")
    (root / "0" / ".hidden.png").write_bytes(b"")
    (root / ".cache").mkdir()
    (root / "readme.txt").write_text("ignored")
    items = open_items(root)
    assert items.labels == ("0",) * 5 + ("1",) * 4 + ("2.png",) * 4
    assert [p.relative_to(root).as_posix() for p in items.paths] == sorted(
        p.relative_to(root).as_posix()
        for p in root.rglob("*")
        if p.is_file() and p.suffix.lower() == ".png" and not p.name.startswith(".")
    )
    assert items.roles is None and items.embeddings is None and len(items) == 13
    assert items.class_names() == ["0", "1", "2.png"]
    assert open_items(root, labelled=False).labels == items.labels


def test_train_and_test_folders_declare_roles(tmp_path):
    write_digits(tmp_path / "train", (0, 1), 3)
    write_digits(tmp_path / "test", (0, 2), 2, offset=10)
    items = open_items(tmp_path)
    assert items.labels == ("0",) * 3 + ("1",) * 3 + ("0",) * 2 + ("2",) * 2
    assert items.roles == ("train",) * 6 + ("test",) * 4
    assert all(
        p.relative_to(tmp_path).parts[:2] == (r, c)
        for p, r, c in zip(items.paths, items.roles, items.labels, strict=True)
    )

    write_digits(tmp_path / "val", (0,), 1)
    with pytest.raises(OsmlError, match="images in 'val' beside 'train' and 'test'"):
        open_items(tmp_path)


def test_classes_that_happen_to_be_called_train_and_test(tmp_path):
    write_digits(tmp_path / "a", (0, 1), 2)
    (tmp_path / "a" / "0").rename(tmp_path / "a" / "train")
    (tmp_path / "a" / "1").rename(tmp_path / "a" / "test")
    items = open_items(tmp_path / "a")
    assert items.class_names() == ["test", "train"] and items.roles is None


@pytest.mark.parametrize("parts", [("train", "val"), ("train",), ("test", "other"), ("Train", "Test"), ("validation",)])
def test_parts_that_are_not_train_and_test_are_no_classes(tmp_path, parts):
    for part in parts:
        write_digits(tmp_path / part, (0, 1), 2)
    with pytest.raises(OsmlError, match=r"holds folders in '.*expected DIR/train/<class>/\* and DIR/test/<class>") as e:
        open_items(tmp_path)
    assert all(f"'{part}'" in one_line(e) for part in parts if part != "other")
    inbox = open_items(tmp_path, labelled=False)
    assert len(inbox) == 4 * len(parts) and inbox.labels is None


BAD_NAMES = ("", " cat", "cat ", "a\nb", "a\x00b", "a\u2028b", os.fsdecode(b"\xff"))


@pytest.mark.parametrize("name", BAD_NAMES)
def test_class_names_that_cannot_be_printed_or_typed(tmp_path, name):
    with pytest.raises(OsmlError) as error:
        Items(("a", name), None, ROWS[:2], None)
    assert one_line(error).startswith(f"class name {name!r}: expected")
    one_line(error).encode()
    with pytest.raises(OsmlError, match="class name"):
        write_embeddings(tmp_path / "e.npz", ROWS[:2], ["a", name])
    assert list(tmp_path.iterdir()) == []


def test_bad_class_names_in_every_source(tmp_path):
    for folder in (b" cat", b"\xff"):
        root = write_digits(tmp_path / "digits", (0, 1), 1)
        os.rename(root / "1", os.path.join(os.fsencode(root), folder))
        with pytest.raises(OsmlError, match="class name '( cat|.udcff)'") as error:
            open_items(root)
        one_line(error)
        shutil.rmtree(root)
    np.savez(tmp_path / "e.npz", embeddings=ROWS[:2], labels=["a", ""])
    with pytest.raises(OsmlError, match="class name ''"):
        open_items(tmp_path / "e.npz")


def test_flat_folder_and_single_image(tmp_path):
    root = write_digits(tmp_path, (3,), 5) / "3"
    items = open_items(root, labelled=False)
    assert len(items) == 5 and items.labels is None and items.class_names() == []
    one = open_items(items.paths[2], labelled=False)
    assert one.paths == (items.paths[2],) and one.labels is None
    with pytest.raises(OsmlError, match="holds images but no class folders"):
        open_items(root)
    with pytest.raises(OsmlError, match="is one image without a class"):
        open_items(items.paths[0])


def test_bad_folders(tmp_path):
    with pytest.raises(OsmlError) as error:
        open_items(tmp_path / "nothing")
    assert all(kind in one_line(error) for kind in ("no file or folder", "class folders", ".csv", ".npz"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(OsmlError, match="empty' holds no images"):
        open_items(tmp_path / "empty", labelled=False)
    root = write_digits(tmp_path / "digits", (0, 1))
    (root / "seven").mkdir()
    (root / "seven" / "a.txt").write_text("no image")
    with pytest.raises(OsmlError, match=r"class folder '.*seven' holds no images"):
        open_items(root)
    shutil.rmtree(root / "seven")
    shutil.copy(next((root / "0").glob("*.png")), root / "stray.png")
    with pytest.raises(OsmlError, match=r"both class folders and images such as 'stray\.png'"):
        open_items(root)
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(OsmlError, match=r"from its suffix '\.xlsx'"):
        open_items(tmp_path / "a.xlsx")


# --- manifests -------------------------------------------------------------------------------------------


@pytest.fixture
def manifest(tmp_path) -> pd.DataFrame:
    root = write_digits(tmp_path / "images", (0, 1), 3)
    paths = sorted(root.rglob("*.png"))
    return pd.DataFrame(
        {
            "path": [p.relative_to(tmp_path).as_posix() for p in paths[:-1]] + [str(paths[-1])],
            "label": ["01"] * 3 + ["NA", "null", "1.50"],
            "role": ["train", "calibration", "validation", "test", "train", "test"],
            "width": 8,
        }
    )


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_manifest(tmp_path, manifest, suffix):
    file = tmp_path / f"manifest{suffix}"
    manifest.to_csv(file, index=False) if suffix == ".csv" else manifest.to_parquet(file)
    items = open_items(file)
    assert items.labels == ("01", "01", "01", "NA", "null", "1.50")
    assert items.roles == tuple(manifest["role"])
    assert all(p.is_file() for p in items.paths) and len(items) == 6
    assert [p.name for p in items.paths] == [Path(p).name for p in manifest["path"]]


def test_manifest_without_role_or_label(tmp_path, manifest):
    file = tmp_path / "m.csv"
    manifest[["path", "label"]].to_csv(file, index=False)
    assert open_items(file).roles is None
    manifest[["path"]].to_csv(file, index=False)
    assert open_items(file, labelled=False).labels is None
    with pytest.raises(OsmlError, match="no column 'label'; it has 'path', expected"):
        open_items(file)
    for dtype in ("int8", "float32", "float64", "Float64", "Int64"):
        manifest.assign(label=pd.Series(range(6), dtype=dtype)).to_parquet(tmp_path / "m.parquet")
        assert open_items(tmp_path / "m.parquet").labels == tuple("012345")
    manifest.assign(label=np.arange(6) / 2).to_parquet(tmp_path / "m.parquet")
    assert open_items(tmp_path / "m.parquet").labels == ("0.0", "0.5", "1.0", "1.5", "2.0", "2.5")
    manifest.assign(label=[1.0, np.nan, *range(4)]).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(OsmlError, match="no label in row 2"):
        open_items(tmp_path / "m.parquet")


def test_manifest_with_a_byte_order_mark(tmp_path, manifest):
    manifest.to_csv(tmp_path / "m.csv", index=False, encoding="utf-8-sig", quoting=csv.QUOTE_ALL)
    assert open_items(tmp_path / "m.csv").roles == tuple(manifest["role"])


@pytest.mark.parametrize(
    ("column", "row", "value", "message"),
    [
        ("role", 2, "", "no role in row 3"),
        ("label", 0, "", "no label in row 1"),
        ("role", 4, "Test", "role 'Test' in row 5 of .* one of train, calibration, validation, test"),
        ("path", 1, "gone.png", "names 1 of 6 files that are not there, the first is '.*gone.png'"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_bad_manifest_cells(tmp_path, manifest, suffix, column, row, value, message):
    manifest.loc[row, column] = value or None
    file = tmp_path / f"m{suffix}"
    manifest.to_csv(file, index=False) if suffix == ".csv" else manifest.to_parquet(file)
    with pytest.raises(OsmlError, match=message) as error:
        open_items(file)
    one_line(error)


def test_bad_manifests(tmp_path, manifest, monkeypatch):
    file = tmp_path / "m.csv"
    manifest.rename(columns={"label": "class"}).to_csv(file, index=False)
    with pytest.raises(OsmlError, match="no column 'label'; it has 'path', 'class', 'role', 'width'"):
        open_items(file)
    manifest.rename(columns={"role": "split"}).to_csv(file, index=False)
    with pytest.raises(OsmlError, match="a column 'split' but none 'role'"):
        open_items(file)
    manifest[:0].to_csv(file, index=False)
    with pytest.raises(OsmlError, match="has no rows"):
        open_items(file)
    for content in (b"", b'path,label\n"a', b"path,label\n\xff\xfe,a\n"):
        file.write_bytes(content)
        with pytest.raises(OsmlError, match="cannot read the manifest") as error:
            open_items(file)
        one_line(error)
    (tmp_path / "m.parquet").write_bytes(b"no parquet at all")
    with pytest.raises(OsmlError, match="cannot read the manifest"):
        open_items(tmp_path / "m.parquet")

    real = builtins.__import__

    def without_pandas(name, *args, **kwargs):
        if name == "pandas":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_pandas)
    with pytest.raises(OsmlError, match=r"osml-plugin\[manifest\]"):
        open_items(tmp_path / "m.parquet")
    manifest.to_csv(file, index=False)
    assert len(open_items(file)) == 6  # for CSV it is not needed


TWO = "path,label\na.png,x\nb.png,y\n"


@pytest.mark.parametrize(
    "content",
    [
        TWO,
        TWO.replace("\n", ",\n"),  # a comma at the end of every line,
        TWO.replace("png,x\n", "png,x,\n"),  # or of one
        TWO.replace("label\n", "label,\n").replace("\n", "\n\n"),
        TWO.replace("\n", "\r\n"),
        TWO.replace("\n", "\r"),
        "\ufeff" + TWO,
        '"path","label"\n"a.png","x"\n"b.png","y"',
    ],
)
def test_csv_files_as_other_programs_write_them(tmp_path, content):
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "m.csv").write_bytes(content.encode())
    items = open_items(tmp_path / "m.csv")
    assert items.labels == ("x", "y") and [p.name for p in items.paths] == ["a.png", "b.png"]


@pytest.mark.parametrize("odd", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", " \u3000"])
def test_only_ends_of_lines_end_the_rows_of_a_csv_file(tmp_path, odd):
    """str.splitlines also cuts at these, and file names may hold them."""
    name = f"a{odd}b.png"
    (tmp_path / name).write_bytes(b"")
    for cell in (name, f'"{name}"'):
        (tmp_path / "m.csv").write_text(f"path,label\n{cell},x\n{cell},y\n", encoding="utf-8")
        items = open_items(tmp_path / "m.csv")
        assert items.labels == ("x", "y") and items.paths == (tmp_path / name,) * 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (TWO.replace(",", ";").encode(), "separated by semicolons; save it with commas"),
        (TWO.replace(",", "\t").encode(), "separated by tabs"),
        (TWO.encode("utf-16"), "it is UTF-16; save it as UTF-8"),
        (b"path,label\na.png,x\nb.png,caf\xe9\n", "line 3 is not UTF-8"),
        (TWO.replace("b.png", "b\0.png").encode(), "line 3 holds a NUL"),
        (b"path,label,path\na.png,x,a.png\n", "2 columns 'path'"),
        (b"a.png,x\nb.png,y\n", "no column 'path'; it has 'a.png', 'x', expected .* in its first line"),
        (b"path,label\na.png,x\nb.png\n", "line 3 has 1 cells, but the header 2"),
        (b"path,label\na.png,x, y\n", "line 2 has 3 cells, but the header 2; put a cell with a comma in quotation"),
        (b'path,label\na.png,"x\nb.png,y\n', "a quotation mark is not closed"),
        (b'path,label\na.png,"x" y\n', "write a quotation mark inside a cell twice"),
        (b"path,label\na.png," + b"x" * 200_000 + b"\n", "a cell is longer than 131,072"),
        (b'path,label\na.png,"' + b"x,y\n" * 200_000, "a cell is longer than 131,072"),
        (b"path,label\nimages\\a.png,x\n", r"not there.*written with / in place of \\"),
        (b"path,label\nC:\\images\\a.png,x\n", r"not there.*written with / in place of \\"),
    ],
)
def test_a_csv_file_that_cannot_be_read_gets_its_reason(tmp_path, content, reason):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(OsmlError, match=reason) as error:
        open_items(tmp_path / "m.csv")
    one_line(error)


# --- embeddings ------------------------------------------------------------------------------------------

ROWS = DIGITS.data[:20].astype(np.float32)
NAMES = [f"digit {t}" for t in DIGITS.target[:20]]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_written_embeddings_are_read_back(tmp_path, suffix, monkeypatch):
    file = tmp_path / f"e{suffix}"
    paths = [tmp_path / "images" / f"{i}.png" for i in range(20)]
    roles = ["train"] * 15 + ["test"] * 5
    write_embeddings(file, ROWS, NAMES, paths, roles=roles)
    items = open_items(file)
    np.testing.assert_array_equal(items.embeddings, ROWS)
    assert items.embeddings.dtype == np.float32
    assert items.labels == tuple(NAMES) and items.paths == tuple(paths) and items.roles == tuple(roles)
    assert str(tmp_path) not in file.read_bytes().decode("latin-1")  # moves along with its images

    monkeypatch.chdir(tmp_path)
    write_embeddings(file.name, torch.from_numpy(ROWS).to(torch.bfloat16), DIGITS.target[:20], ["a/b.png"] * 20)
    items = open_items(file.name)
    assert items.labels == tuple(str(t) for t in DIGITS.target[:20])
    assert items.paths[0] == tmp_path / "a" / "b.png" and items.roles is None

    write_embeddings(file, ROWS, None)
    assert open_items(file, labelled=False).labels is None
    with pytest.raises(OsmlError, match="has no 'labels'; it has 'embeddings'"):
        open_items(file)
    assert sorted(p.name for p in tmp_path.iterdir()) == [file.name]


def test_embeddings_files_of_others(tmp_path):
    np.savez(tmp_path / "e.npz", embeddings=ROWS.astype(np.float64), labels=DIGITS.target[:20].astype(np.uint8))
    assert open_items(tmp_path / "e.npz").labels == tuple(str(t) for t in DIGITS.target[:20])
    tensors = {"embeddings": torch.from_numpy(ROWS).half(), "labels": torch.arange(20) % 2}
    safetensors.torch.save_file(tensors, tmp_path / "e.safetensors")
    assert open_items(tmp_path / "e.safetensors").labels == ("0", "1") * 10
    names = {"class_names": json.dumps(["cat", "a longer name"])}
    safetensors.torch.save_file(tensors, tmp_path / "e.safetensors", names)
    items = open_items(tmp_path / "e.safetensors")
    assert items.labels == ("cat", "a longer name") * 10 and items.embeddings.dtype == np.float32


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": ROWS}, "no array 'embeddings'; it has 'features'"),
        ({"embeddings": ROWS[0], "labels": NAMES}, r"shape \(64,\) of float32; expected \(N, D\)"),
        ({"embeddings": ROWS[:0], "labels": []}, r"shape \(0, 64\)"),
        ({"embeddings": ROWS.astype(int), "labels": NAMES}, "of int64; expected"),
        (
            {"embeddings": np.where(ROWS[3] == ROWS, np.nan, ROWS), "labels": NAMES},
            "20 of 20 embeddings in .* hold NaN or infinity",
        ),
        ({"embeddings": ROWS.astype(np.float64) * 1e300, "labels": NAMES}, "beyond 1e.15, the first in row 0"),
        ({"embeddings": ROWS, "labels": NAMES[:7]}, r"'labels' in .* has shape \(7,\); expected \(20,\)"),
        ({"embeddings": ROWS, "labels": DIGITS.target[:20] / 2}, "'labels' in .*: type float64; expected strings"),
        (
            {"embeddings": ROWS, "labels": np.array(NAMES, dtype=object)},
            "cannot read .* as .npz: 'labels' .* never unpickled",
        ),
        ({"embeddings": np.array(ROWS, dtype=object), "labels": NAMES}, "'embeddings' .* never unpickled"),
        ({"embeddings": ROWS, "labels": NAMES, "roles": ["train"] * 19 + ["tset"]}, "role 'tset' in row 20"),
    ],
)
def test_bad_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "e.npz", **arrays)
    with pytest.raises(OsmlError, match=message) as error:
        open_items(tmp_path / "e.npz")
    one_line(error)


def test_what_an_embeddings_file_holds_besides_is_not_read(tmp_path):
    more = {
        "faces": np.array([{"a": 1}, None], dtype=object),
        "masks": np.ones((2, 3), bool),
        "when": np.datetime64("now"),
    }
    np.savez(tmp_path / "e.npz", embeddings=ROWS, labels=NAMES, **more)
    assert open_items(tmp_path / "e.npz").labels == tuple(NAMES)
    tensors = {
        "embeddings": torch.from_numpy(ROWS),
        "labels": torch.arange(20),
        "complex": torch.ones(2, dtype=torch.complex64),
    }
    safetensors.torch.save_file(tensors, tmp_path / "e.safetensors")
    assert open_items(tmp_path / "e.safetensors").labels == tuple(map(str, range(20)))


def test_files_that_are_no_archive_of_arrays(tmp_path):
    np.savez(tmp_path / "e.npz", embeddings=ROWS, labels=NAMES)
    whole = (tmp_path / "e.npz").read_bytes()
    np.save(tmp_path / "one.npy", ROWS)
    for content in (whole[:-30], whole[: len(whole) // 2], (tmp_path / "one.npy").read_bytes(), b"\x80\x04K\x01.", b""):
        (tmp_path / "e.npz").write_bytes(content)
        with pytest.raises(OsmlError, match="as .npz: it is no archive of arrays, or is cut off; write it by") as error:
            open_items(tmp_path / "e.npz")
        one_line(error)
    with pytest.raises(OsmlError, match=r"from its suffix '\.npy'"):
        open_items(tmp_path / "one.npy")
    np.savez(tmp_path / "e.npz", ROWS)
    with pytest.raises(OsmlError, match="it has 'arr_0'; save it under that name"):
        open_items(tmp_path / "e.npz")


def test_bad_embeddings_files(tmp_path):
    for suffix in (".npz", ".safetensors"):
        for content in (b"", b"no such file format", b"PK\x03\x04 broken"):
            (tmp_path / f"e{suffix}").write_bytes(content)
            with pytest.raises(OsmlError, match=f"cannot read .* as {suffix}") as error:
                open_items(tmp_path / f"e{suffix}")
            one_line(error)
    file = tmp_path / "e.safetensors"
    tensors = {"embeddings": torch.from_numpy(ROWS), "labels": torch.arange(20) - 1}
    for metadata, message in (
        ({"class_names": json.dumps(NAMES)}, "no indices into its 20 class_names"),
        ({"roles": "[1"}, "cannot read"),
        ({"roles": '[["train"], ["train", "test"]]'}, "cannot read"),
        ({"roles": '"train"'}, r"'roles' in .* has shape \(\)"),
    ):
        safetensors.torch.save_file(tensors, file, metadata)
        with pytest.raises(OsmlError, match=message):
            open_items(file)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    file = tmp_path / "e.npz"
    write_embeddings(file, ROWS, NAMES)
    before = file.read_bytes()
    for arguments, message in (
        ((file, ROWS, NAMES[:5]), "5 labels for 20 embeddings"),
        ((file, ROWS * np.nan, NAMES), "NaN or infinity"),
        ((file, ROWS, [0.5] * 20), "type float64"),
        ((tmp_path / "e.csv", ROWS, NAMES), "ending in .npz or .safetensors"),
        ((tmp_path / "no" / "e.npz", ROWS, NAMES), "no folder"),
    ):
        with pytest.raises(OsmlError, match=message):
            write_embeddings(*arguments)
    with pytest.raises(OsmlError, match="role 'x' in row 1"):
        write_embeddings(file, ROWS, NAMES, roles=["x"] * 20)

    def full_disk(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full_disk)
        with pytest.raises(OsmlError, match="cannot write embeddings to .*e.npz': no space left"):
            write_embeddings(file, ROWS, None)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["e.npz"]


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_places_that_cannot_be_written(tmp_path, suffix):
    (tmp_path / f"e{suffix}").mkdir()
    for file, reason in ((f"e{suffix}", "Is a directory"), (300 * "e" + suffix, "File name too long")):
        with pytest.raises(OsmlError, match=f"cannot write embeddings to .*{reason}") as error:
            write_embeddings(tmp_path / file, ROWS, NAMES)
        one_line(error)
    assert [p.name for p in tmp_path.iterdir()] == [f"e{suffix}"]


# --- items -----------------------------------------------------------------------------------------------


def test_fingerprints_are_of_the_content_alone(tmp_path):
    items = open_items(write_digits(tmp_path / "a"))
    expected = [int.from_bytes(blake2b(p.read_bytes(), digest_size=8).digest(), "little") for p in items.paths]
    assert items.fingerprints().dtype == np.uint64 and items.fingerprints().tolist() == expected

    rows = Items(None, None, ROWS.astype(">f4"), None)
    expected = [int.from_bytes(blake2b(row.tobytes(), digest_size=8).digest(), "little") for row in ROWS]
    assert rows.fingerprints().tolist() == expected

    moved = write_digits(tmp_path / "b")
    for i, file in enumerate(sorted(moved.rglob("*.png"), reverse=True)):
        file.rename(file.with_name(f"x{i:03d}.png"))
    moved = open_items(moved)
    assert moved.fingerprints().tolist() != items.fingerprints().tolist()  # another order
    assert moved.fingerprint() == items.fingerprint()
    relabelled = Items(tuple(reversed(items.labels)), items.paths, None, None)
    assert len({items.fingerprint(), items.select([0, 1]).fingerprint(), relabelled.fingerprint()}) == 3

    gone = open_items(tmp_path / "a")
    gone.paths[3].unlink()
    with pytest.raises(OsmlError, match=r"cannot read '.*png': No such file"):
        gone.fingerprints()


def test_select():
    items = Items(tuple(NAMES), tuple(Path(f"{i}.png") for i in range(20)), ROWS, ("train",) * 20)
    for indices in ([5, 2, 5], np.array([5, 2, 5])):
        some = items.select(indices)
        assert some.labels == (NAMES[5], NAMES[2], NAMES[5]) and some.paths[1] == Path("2.png")
        np.testing.assert_array_equal(some.embeddings, ROWS[[5, 2, 5]])
    mask = np.arange(20) >= 18
    assert items.select(mask).labels == items.select([18, 19]).labels == tuple(NAMES[18:])
    nothing = items.select([])
    assert len(nothing) == len(nothing.fingerprints()) == 0 and nothing.roles == ()
    assert len(Items(None, (), None, None).fingerprints()) == 0


def test_items_of_unequal_lengths():
    with pytest.raises(OsmlError, match="3 labels for 20 items"):
        Items(("a",) * 3, None, ROWS, None)
    with pytest.raises(OsmlError, match="paths of images or embeddings"):
        Items(None, None, None, None)
