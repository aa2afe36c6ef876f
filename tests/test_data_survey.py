"""What is found in images before anything is trained, and what a user is told of it."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from image_files import deep_png
from PIL import Image, PngImagePlugin

from osml_plugin import OsmlError
from osml_plugin.data import Items, Rendering, check_pictures, inspect_images, read_image, tell_shared_files

DRAW = np.random.default_rng(7)


def deep(path: Path, highest: int, n_channels: int = 1) -> Path:
    samples = DRAW.integers(0, highest + 1, (40, 40, n_channels)).astype(np.uint16)
    samples[0, :4] = highest
    path.write_bytes(deep_png(samples))
    return path


def plain(path: Path, pixels: np.ndarray | None = None, **options) -> Path:
    pixels = DRAW.integers(0, 256, (8, 8)).astype(np.uint8) if pixels is None else pixels
    Image.fromarray(pixels).save(path, **options)
    return path


def items_of(paths: list[Path]) -> Items:
    return Items(None, tuple(paths), None, None)


@pytest.mark.parametrize(
    ("highest", "depth"), [(255, 8), (100, 8), (256, 9), (1023, 10), (4095, 12), (10_000, 14), (65535, 16)]
)
@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_bit_depth_is_that_of_the_values(tmp_path, highest, depth, n_channels):
    paths = [deep(tmp_path / f"{i}.png", highest, n_channels) for i in range(3)]
    if n_channels in (2, 4):  # opaque: alpha is no color
        for path in paths:
            samples = DRAW.integers(0, highest + 1, (40, 40, n_channels)).astype(np.uint16)
            samples[0, :4], samples[:, :, -1] = highest, 65535
            path.write_bytes(deep_png(samples))
    paths.append(plain(tmp_path / "of-8-bits.png"))
    survey = inspect_images(paths)
    assert survey.bit_depth == depth and not survey.blank(depth).any()
    assert survey.of(np.array([3])).bit_depth == 16  # no 16-bit file among them
    assert survey.channels == (1 if n_channels < 3 else 3)


def test_bit_depth_is_not_of_the_odd_one_out(tmp_path):
    """A hot pixel in a thousand, or a file in a hundred, does not make all others dark."""
    hot = np.full((40, 40, 1), 200, np.uint16)
    hot[3, 3] = 65535
    (tmp_path / "hot.png").write_bytes(deep_png(hot))
    assert inspect_images([tmp_path / "hot.png"]).bit_depth == 8
    bright = deep(tmp_path / "bright.png", 65535)
    usual = [deep(tmp_path / f"{i}.png", 4095) for i in range(99)]
    assert inspect_images([*usual, bright]).bit_depth == 12
    assert inspect_images([*usual[:98], bright]).bit_depth == 16


def test_images_of_one_color_are_those_whose_pixels_are_alike(tmp_path):
    """Against the slow twin: read the image and look."""
    pixels = np.zeros((16, 16), np.uint8)
    checked = np.indices((64, 64)).sum(0) % 2 * 255  # one color at an eighth of its size
    see_through = np.zeros((16, 16, 4), np.uint8)
    white_ink = np.full((16, 16, 4), 255, np.uint8)
    white_ink[:8, :, 3] = 0
    files = [
        plain(tmp_path / "black.png", pixels),
        plain(tmp_path / "red.jpg", np.full((40, 40, 3), (250, 0, 0), np.uint8), quality=90),
        plain(tmp_path / "checked.jpg", checked.astype(np.uint8), quality=95),
        plain(tmp_path / "see-through.png", see_through),
        plain(tmp_path / "white-ink.png", white_ink),
        plain(tmp_path / "noise.png"),
        plain(tmp_path / "1x1.png", pixels[:1, :1]),
        plain(tmp_path / "palette.gif", pixels),
        deep(tmp_path / "dim.png", 255),  # one color where 16 bits are taken to be filled
        deep(tmp_path / "full.png", 65535, 3),
    ]
    for background in ((255, 255, 255), (0, 0, 0), None):
        survey = inspect_images(files, background=background)
        for bit_depth in (8, 16):
            rendering = Rendering(background, bit_depth)
            images = [read_image(file, 3, None, rendering).flatten(1) for file in files]
            expected = [bool((image == image[:, :1]).all()) for image in images]
            assert survey.blank(bit_depth).tolist() == expected
            for image, color, blank in zip(images, survey.colors_shown(bit_depth), expected, strict=True):
                assert not blank or image[:, 0].tolist() == color.tolist()


def test_images_of_one_color_are_told_and_a_set_of_them_refused(tmp_path, caplog):
    good = [plain(tmp_path / f"good-{i}.png") for i in range(6)]
    black = [plain(tmp_path / f"black-{i}.png", np.zeros((8, 8), np.uint8)) for i in range(7)]
    check_pictures(items_of(good), inspect_images(good), 16)
    assert caplog.messages == []
    some = [*good, *black[:4]]
    check_pictures(items_of(some), inspect_images(some), 16)
    assert caplog.messages[0].startswith(f"4 of 10 images are of one color, such as '{black[0]}', '{black[1]}'")
    most = [*good, *black]
    with pytest.raises(OsmlError, match=r"^7 of 13 images are nothing but the color rgb\(0, 0, 0\), such as .*black-0"):
        check_pictures(items_of(most), inspect_images(most), 16)
    # Samples of paint are of one color each, and not of the same.
    paint = [plain(tmp_path / f"paint-{i}.png", np.full((8, 8), 9 * i, np.uint8)) for i in range(9)]
    check_pictures(items_of(paint), inspect_images(paint), 16)
    assert caplog.messages[-1].startswith("9 of 9 images are of one color")
    # The same set, at the depth that its values fill and at that which they do not.
    dim = [deep(tmp_path / f"dim-{i}.png", 255) for i in range(5)]
    check_pictures(items_of(dim), inspect_images(dim), 8)
    assert len(caplog.messages) == 2
    with pytest.raises(
        OsmlError, match=r"5 of 5 images are nothing but the color .*set data.background .* data.bit_depth"
    ):
        check_pictures(items_of(dim), inspect_images(dim), 16)


def test_files_that_come_out_dark_beside_others_are_told(tmp_path, caplog):
    mixed = [deep(tmp_path / f"{highest}-{i}.png", highest) for highest in (4095, 65535) for i in range(5)]
    survey = inspect_images(mixed)
    assert survey.bit_depth == 16
    check_pictures(items_of(mixed), survey, 16)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("5 of 10 16-bit images, such as '")
    caplog.clear()
    check_pictures(items_of(mixed[5:]), inspect_images(mixed[5:]), 16)
    assert caplog.messages == []


def test_one_file_in_two_classes_is_told(tmp_path, caplog):
    paths = [plain(tmp_path / f"{i}.png") for i in range(4)]
    paths.append(tmp_path / "copy.png")
    paths[4].write_bytes(paths[1].read_bytes())
    tell_shared_files(Items(("a", "a", "b", "b", "a"), tuple(paths), None, None))
    tell_shared_files(items_of(paths))
    assert caplog.messages == []  # a copy within its class is no doubt about it
    tell_shared_files(Items(("a", "a", "b", "b", "b"), tuple(paths), None, None))
    assert caplog.messages == [
        f"1 item lies in more than one class, such as '{paths[1]}' (a) and '{paths[4]}' (b): keep each in one"
    ]


def test_a_ground_that_has_a_color_makes_images_colorful(tmp_path):
    grey = Image.fromarray(DRAW.integers(0, 256, (8, 8)).astype(np.uint8))
    grey.save(tmp_path / "grey.png")
    grey.convert("LA").save(tmp_path / "alpha.png")
    for background, channels in (((255, 255, 255), 1), (None, 1), ((200, 30, 30), 3)):
        assert inspect_images([tmp_path / "alpha.png"], background=background).channels == channels
        assert inspect_images([tmp_path / "grey.png"], background=background).channels == 1


def test_pillow_warns_of_nothing(tmp_path):
    """Its warnings would stand before our lines, and have texts from the files in them."""
    big = io.BytesIO()
    Image.new("1", (9500, 9500)).save(big, "PNG")  # above the limit, below twice of it: a warning
    (tmp_path / "big.png").write_bytes(big.getvalue())
    palette = Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P")
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x80")
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "nonsense")
    plain(tmp_path / "exif.png", pnginfo=text)
    plain(tmp_path / "cut.tif")
    (tmp_path / "cut.tif").write_bytes((tmp_path / "cut.tif").read_bytes()[:120])
    script = "import sys; from pathlib import Path; from osml_plugin.data import inspect_images; s = inspect_images([Path(p) for p in sys.argv[1:]], skip_bad=True); print(len(s.good), len(s.bad))"
    files = [str(tmp_path / name) for name in ("big.png", "palette.png", "exif.png", "cut.tif")]
    done = subprocess.run(
        [sys.executable, "-W", "default::UserWarning:PIL", "-c", script, *files], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("2 2\n", "")
