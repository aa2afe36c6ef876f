"""Transparency and 16-bit samples: what becomes of them, and that it is the same wherever an image comes in."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import deep_png, deep_ppm, deep_tiff
from PIL import Image, ImageDraw

from osml_plugin import OsmlError
from osml_plugin.data import Rendering, read_image
from osml_plugin.data.images import convert_image
from osml_plugin.data.pixels import deep_samples, is_deep, parse_color

DRAW = np.random.default_rng(3)
SAMPLES = DRAW.integers(0, 65536, (7, 9, 4)).astype(np.uint16)
GROUNDS = [(255, 255, 255), (0, 0, 0), (10, 200, 30)]


def shape(ink: tuple[int, int, int], beneath: tuple[int, int, int]) -> Image.Image:
    """A triangle of a color on nothing, beneath which lies another color."""
    image = Image.new("RGBA", (24, 24), (*beneath, 0))
    ImageDraw.Draw(image).polygon([(4, 20), (20, 20), (12, 3)], fill=(*ink, 255))
    return image


def files_of_one_look() -> dict[str, bytes]:
    """A black triangle on nothing, in every form that transparency takes in a file."""
    black = shape((0, 0, 0), (0, 0, 0))
    opaque = np.asarray(black)[:, :, 3]
    deep = np.zeros((24, 24, 4), np.uint16)
    deep[:, :, 3] = opaque.astype(np.uint16) * 257
    keyed = np.where(opaque > 0, 0, 77).astype(np.uint8)
    palette = Image.fromarray(np.where(opaque > 0, 0, 1).astype(np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 0, 255, 0])
    forms = {
        "black.png": (black, {}),
        "white.png": (shape((0, 0, 0), (255, 255, 255)), {}),
        "green.png": (shape((0, 0, 0), (0, 255, 0)), {}),
        "lossless.webp": (shape((0, 0, 0), (0, 255, 0)), {"lossless": True, "exact": True}),
        "grey.png": (black.convert("LA"), {}),
        "palette.png": (palette, {"transparency": 1}),
        "palette-of-bytes.png": (palette, {"transparency": b"\xff\x00"}),
        "palette.gif": (palette, {"transparency": 1}),
        "key.png": (Image.fromarray(keyed), {"transparency": 77}),
        "key-of-colors.png": (Image.fromarray(np.dstack([keyed] * 3)), {"transparency": (77, 77, 77)}),
        "alpha.tif": (black, {}),
    }
    files = {}
    for name, (image, options) in forms.items():
        file = io.BytesIO()
        image.save(file, {"tif": "TIFF"}.get(name[-3:], Path(name).suffix[1:].upper()), **options)
        files[name] = file.getvalue()
    files["deep.png"] = deep_png(deep)
    files["deep-grey.png"] = deep_png(deep[:, :, 2:])
    files["deep-key.png"] = deep_png(keyed.astype(np.uint16)[:, :, None] * 100, (7700,))
    files["deep-key-of-colors.png"] = deep_png(np.dstack([keyed] * 3).astype(np.uint16) * 100, (7700,) * 3)
    files["deep.tif"] = deep_tiff(deep, "<", packed=True)
    return files


FILES = files_of_one_look()


@pytest.mark.parametrize("name", FILES)
def test_transparency_is_composed_on_the_ground_in_every_form(name):
    opaque = np.asarray(shape((0, 0, 0), (0, 0, 0)))[:, :, 3:] > 0
    for ground in GROUNDS:
        for bit_depth in (8, 12, 16):  # alpha of 16 bits is scaled as the colors are, and opaque stays opaque
            image = read_image(io.BytesIO(FILES[name]), 3, None, Rendering(ground, bit_depth))
            np.testing.assert_array_equal(image.permute(1, 2, 0), np.where(opaque, 0, np.array(ground)))
    grey = read_image(io.BytesIO(FILES[name]), 1, None)
    np.testing.assert_array_equal(grey[0], np.where(opaque[:, :, 0], 0, 255))


def test_the_cases_are_of_one_look(tmp_path):
    """Ink stays what it is; what lies under transparent pixels is never seen."""
    for ink in ((0, 0, 0), (200, 30, 30)):
        shown = [read_image(saved(shape(ink, beneath)), 3, 24) for beneath in ((0, 0, 0), (255, 255, 255), ink)]
        assert all(torch.equal(image, shown[0]) for image in shown)
        assert {tuple(p) for p in shown[0].flatten(1).T.tolist()} == {ink, (255, 255, 255)}


def saved(image: Image.Image) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    return file


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.tuples(*[st.integers(0, 255)] * 3))
def test_composition_against_its_formula(seed, ground):
    pixels = np.random.default_rng(seed).integers(0, 256, (5, 6, 4)).astype(np.uint8)
    alpha = pixels[:, :, 3:] / 255
    expected = alpha * pixels[:, :, :3] + (1 - alpha) * np.array(ground)
    for image in (pixels, Image.fromarray(pixels)):
        made = convert_image(image, 3, None, Rendering(ground)).permute(1, 2, 0).numpy()
        assert np.abs(made - expected).max() <= 1
    assert (
        np.abs(
            read_image(saved(Image.fromarray(pixels)), 3, None, Rendering(ground)).numpy() - made.transpose(2, 0, 1)
        ).max()
        == 0
    )


def test_without_a_ground_transparency_is_dropped():
    """As bundles of before were trained."""
    for name, content in FILES.items():
        if name.startswith("deep"):
            continue
        with Image.open(io.BytesIO(content)) as image:
            expected = np.asarray(image.convert("RGB"))
        made = read_image(io.BytesIO(content), 3, None, Rendering(None)).permute(1, 2, 0)
        np.testing.assert_array_equal(made, expected)


@pytest.mark.parametrize("n_channels", [1, 2, 3, 4])
def test_all_sixteen_bits_of_a_png_are_read(n_channels, tmp_path):
    samples = SAMPLES[:, :, :n_channels]
    content = deep_png(samples)
    (tmp_path / "deep.png").write_bytes(content)
    for file in (tmp_path / "deep.png", io.BytesIO(content)):
        with Image.open(file) as image:
            assert is_deep(image)
            np.testing.assert_array_equal(deep_samples(image), samples)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("n_channels", [3, 4])
def test_all_sixteen_bits_of_a_tiff_are_read(n_channels, order, packed):
    samples = SAMPLES[:, :, :n_channels]
    with Image.open(io.BytesIO(deep_tiff(samples, order, packed))) as image:
        assert is_deep(image)
        np.testing.assert_array_equal(deep_samples(image), samples)


def test_all_sixteen_bits_of_a_ppm_are_read():
    for highest in (65535, 4095):
        samples = SAMPLES[:, :, :3] % np.uint16(highest)
        with Image.open(io.BytesIO(deep_ppm(samples, highest))) as image:
            expected = (samples * (65535 / highest)).round()
            np.testing.assert_array_equal(deep_samples(image), expected)


@pytest.mark.parametrize("bit_depth", range(8, 17))
def test_scaling_by_bits(bit_depth):
    """The upper 8 of the bits that are filled; what is brighter is white."""
    samples = SAMPLES[:, :, :3].astype(int)
    expected = np.minimum(samples // 2 ** (bit_depth - 8), 255)
    rendering = Rendering(bit_depth=bit_depth)
    for file in (deep_png(SAMPLES[:, :, :3]), deep_tiff(SAMPLES[:, :, :3], "<", True), deep_ppm(SAMPLES[:, :, :3])):
        np.testing.assert_array_equal(read_image(io.BytesIO(file), 3, None, rendering).permute(1, 2, 0), expected)
    grey = read_image(io.BytesIO(deep_png(SAMPLES[:, :, :1])), 1, None, rendering)
    np.testing.assert_array_equal(grey[0], expected[:, :, 0])
    array = SAMPLES[:, :, :3].copy()
    np.testing.assert_array_equal(convert_image(array, 3, None, rendering).permute(1, 2, 0), expected)
    np.testing.assert_array_equal(array, SAMPLES[:, :, :3])
    np.testing.assert_array_equal(convert_image(Image.fromarray(SAMPLES[:, :, 0]), 1, None, rendering), grey)


def test_eight_bits_in_sixteen_are_the_eight_bits():
    values = (SAMPLES >> 8).astype(np.uint16)
    for n_channels in (1, 3):
        pixels = values[:, :, :n_channels]
        made = read_image(io.BytesIO(deep_png(pixels)), n_channels, None, Rendering(bit_depth=8))
        np.testing.assert_array_equal(made.permute(1, 2, 0), pixels)


def test_deep_images_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(SAMPLES[:, :, 0]).save(file, "PNG", exif=exif)
    expected = np.rot90(SAMPLES[:, :, 0] >> 8, -1)
    np.testing.assert_array_equal(read_image(file, 1, None)[0], expected)


def test_colors():
    assert [parse_color(c) for c in ("white", "#f00", "rgb(1, 2, 3)", [4, 5, 6])] == [
        (255, 255, 255),
        (255, 0, 0),
        (1, 2, 3),
        (4, 5, 6),
    ]
    for wrong in ("wite", "#12345678", [1, 2], [1, 2, 256], [1.5, 2, 3], ["1", "2", "3"], ""):
        with pytest.raises(OsmlError, match="is no color: expected"):
            parse_color(wrong)
