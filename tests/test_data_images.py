from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torchvision.transforms import v2

from osml_plugin import UNKNOWN, OsmlError
from osml_plugin.data import (
    ImageDataset,
    augmentation,
    inspect_images,
    load_images,
    normalisation,
    read_image,
    to_float,
)
from osml_plugin.data.images import FORMATS

DIGITS = (load_digits().images * 15).astype(np.uint8)
FLOWER = Image.fromarray(load_sample_image("flower.jpg"))  # 640 x 427


@pytest.fixture
def digit_files(tmp_path) -> list[Path]:
    for i, digit in enumerate(DIGITS[:40]):
        Image.fromarray(digit).save(tmp_path / f"{i:02d}.png")
    return sorted(tmp_path.glob("*.png"))


def saved(image: Image.Image, **options) -> io.BytesIO:
    file = io.BytesIO()
    image.save(file, **options)
    file.seek(0)
    return file


# --- decoding --------------------------------------------------------------------------------------------


def test_lossless_images_come_back_exactly(tmp_path):
    pixels = np.asarray(FLOWER)
    for suffix in ("png", "bmp", "tif", "ppm"):
        FLOWER.save(tmp_path / f"a.{suffix}")
        image = read_image(tmp_path / f"a.{suffix}", 3, None)
        assert image.dtype == torch.uint8 and image.is_contiguous()
        np.testing.assert_array_equal(image.permute(1, 2, 0), pixels)
        assert read_image(tmp_path / f"a.{suffix}", 1, None).shape == (1, 427, 640)
    webp = read_image(saved(FLOWER, format="WEBP", lossless=True), 3, None)
    np.testing.assert_array_equal(webp.permute(1, 2, 0), pixels)
    np.testing.assert_array_equal(read_image(saved(Image.fromarray(DIGITS[0]), format="PNG"), 1, 8)[0], DIGITS[0])


def test_modes():
    grey = Image.fromarray(DIGITS[3])
    for image, options in (
        (grey.convert("1"), {"format": "PNG"}),
        (grey.convert("LA"), {"format": "PNG"}),
        (grey.convert("RGBA"), {"format": "PNG"}),
        (grey.convert("P"), {"format": "PNG"}),
        (grey, {"format": "GIF"}),
        (FLOWER.convert("CMYK"), {"format": "JPEG"}),
        (FLOWER.convert("CMYK"), {"format": "TIFF"}),
    ):
        for channels, mode in ((1, "L"), (3, "RGB")):
            image_read = read_image(saved(image, **options), channels, None)
            if options["format"] != "JPEG":
                expected = np.asarray(image.convert(mode)).reshape(*image.size[::-1], channels)
                np.testing.assert_array_equal(image_read.permute(1, 2, 0), expected)
            assert image_read.shape == (channels, *image.size[::-1])
    first, second = Image.fromarray(DIGITS[0]), Image.fromarray(DIGITS[1])
    animation = saved(first, format="GIF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_image(animation, 1, None)[0], DIGITS[0])


@pytest.mark.parametrize("suffix", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(suffix):
    deep = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    image = read_image(saved(Image.fromarray(deep), format=suffix), 1, None)
    np.testing.assert_array_equal(image[0], deep // 256)
    assert read_image(saved(Image.fromarray(deep), format=suffix), 3, 32).shape == (3, 32, 32)
    for wide in (deep.astype(np.int32), deep.astype(np.float32)):
        with pytest.raises(OsmlError, match="32-bit pixels"):
            read_image(saved(Image.fromarray(wide), format="TIFF"), 1, None)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG", "TIFF"])
def test_orientation_is_applied(suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    turned = FLOWER.transpose(Image.Transpose.ROTATE_270)
    for size, shape in ((None, (3, 640, 427)), (50, (3, 50, 50))):
        image = read_image(saved(FLOWER, format=suffix, exif=exif), 3, size)
        expected = read_image(saved(turned, format="PNG"), 3, size)
        assert image.shape == shape and (image.int() - expected.int()).abs().float().mean() < 5


def test_resizing_against_torchvision():
    slow = v2.Compose([v2.Resize(40, antialias=True), v2.CenterCrop(40)])
    # Sides of which both the crop and the resized image fall on whole pixels.
    for width, height in ((600, 400), (400, 400), (200, 400), (40, 80), (30, 20)):
        picture = FLOWER.crop((0, 0, width, height))
        fast = read_image(saved(picture, format="PNG"), 3, 40).numpy().astype(int)
        expected = np.asarray(slow(picture)).transpose(2, 0, 1)
        assert fast.shape == expected.shape
        # At the rim torchvision also sees the pixels that it then crops away.
        assert np.abs(fast - expected)[:, 2:-2, 2:-2].max() <= 1
    picture = FLOWER.crop((0, 0, 40, 40))  # of the right size: untouched
    np.testing.assert_array_equal(
        read_image(saved(picture, format="PNG"), 3, 40), np.asarray(picture).transpose(2, 0, 1)
    )


def test_quick_jpeg_is_close_to_full_decoding():
    file = saved(FLOWER, format="JPEG", quality=95)
    quick = read_image(file, 3, 64)
    full = read_image(saved(Image.open(file), format="PNG"), 3, 64)
    assert (quick.int() - full.int()).abs().float().mean() < 1.5


def test_extreme_shapes():
    assert read_image(saved(Image.new("L", (1, 1), 7), format="PNG"), 1, 28).unique().tolist() == [7]
    assert read_image(saved(Image.new("RGB", (3000, 1), (9, 9, 9)), format="PNG"), 3, 28).unique().tolist() == [9]


def damaged(tmp_path) -> dict[str, bytes]:
    png, jpeg = saved(FLOWER, format="PNG").getvalue(), saved(FLOWER, format="JPEG").getvalue()
    return {
        "cut.png": png[: len(png) // 2],
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "empty.png": b"",
        "text.jpg": b"this is no image",
        "head.gif": b"GIF89a",
        "icon.png": saved(FLOWER.resize((32, 32)), format="ICO").getvalue(),
        "page.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }


def test_damaged_images_are_named_with_the_reason(tmp_path):
    for name, content in damaged(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        for size in (None, 28):
            with pytest.raises(OsmlError, match=f"cannot read the image '.*{name}': .") as error:
                read_image(tmp_path / name, 3, size)
            assert "\n" not in str(error.value)
    with pytest.raises(OsmlError, match=r"absent\.png': No such file"):
        read_image(tmp_path / "absent.png", 3, None)
    with pytest.raises(OsmlError, match="no JPEG, PNG, WEBP, BMP, GIF, TIFF, PPM or AVIF image"):
        read_image(io.BytesIO(b"this is no image"), 3, None)


def test_too_many_pixels(monkeypatch):
    file = saved(Image.new("1", (400, 300)), format="PNG")
    assert read_image(file, 1, 8).shape == (1, 8, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 119_999)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(OsmlError, match="400 x 300 pixels are more"):
        read_image(file, 1, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)  # above twice the limit Pillow refuses by itself
    with pytest.raises(OsmlError, match="pixels"):
        read_image(file, 1, 8)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(file, 1, 8).shape == (1, 8, 8)


# --- many images -----------------------------------------------------------------------------------------


def test_survey_of_good_images(tmp_path, digit_files):
    survey = inspect_images(digit_files)
    assert survey.good.tolist() == list(range(40)) and survey.bad == []
    assert (survey.size, survey.channels) == (8, 1)

    Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 900).save(tmp_path / "deep.png")
    Image.fromarray(DIGITS[0]).convert("LA").resize((30, 20)).save(tmp_path / "alpha.png")
    survey = inspect_images(sorted(tmp_path.glob("*.png")))
    assert (survey.size, survey.channels) == (8, 1)
    FLOWER.save(tmp_path / "flower.jpg")
    survey = inspect_images([*digit_files, tmp_path / "flower.jpg"])
    assert (survey.size, survey.channels) == (8, 3)
    survey = inspect_images([tmp_path / "flower.jpg", tmp_path / "flower.jpg", digit_files[0]])
    assert (survey.size, survey.channels) == (224, 3)


def test_survey_of_damaged_images(tmp_path, digit_files):
    bad = [tmp_path / name for name in damaged(tmp_path)]
    for path, content in zip(bad, damaged(tmp_path).values(), strict=True):
        path.write_bytes(content)
    paths = [bad[0], *digit_files, *bad[1:]]
    survey = inspect_images(paths, skip_bad=True)
    assert survey.good.tolist() == list(range(1, 41)) and [path for path, _ in survey.bad] == bad
    assert all(reason for _, reason in survey.bad) and (survey.size, survey.channels) == (8, 1)
    # The survey and the reader refuse the same files.
    for i, path in enumerate(paths):
        if i in survey.good:
            read_image(path, 1, 8)
        else:
            with pytest.raises(OsmlError):
                read_image(path, 1, 8)
    with pytest.raises(OsmlError) as error:
        inspect_images(paths)
    message = str(error.value)
    assert message.startswith(f"{len(bad)} of 47 images cannot be read: '{bad[0]}' (") and "\n" not in message
    assert message.endswith("and 4 more; remove them or pass --skip-bad") and str(bad[2]) in message
    with pytest.raises(OsmlError, match="7 of 7 images cannot be read"):
        inspect_images(bad, skip_bad=True)
    with pytest.raises(OsmlError, match="there are no images"):
        inspect_images([])


def test_loaded_images_are_the_images(digit_files):
    images = load_images(digit_files, 1, 8, progress=False)
    np.testing.assert_array_equal(images[:, 0], DIGITS[:40])
    assert images.dtype == torch.uint8
    larger = load_images(digit_files, 3, 20)
    for image, path in zip(larger, digit_files, strict=True):
        assert torch.equal(image, read_image(path, 3, 20))
    digit_files[7].write_bytes(b"gone")
    with pytest.raises(OsmlError, match=r"07\.png"):
        load_images(digit_files, 1, 8)


def test_dataset_in_memory_and_from_disk_are_the_same(digit_files):
    labels = np.arange(40, dtype=np.int32) % 4
    transform = to_float([0.3], [0.4])
    cached = ImageDataset(digit_files, labels, channels=1, size=8, transform=transform, cache_bytes=40 * 64)
    direct = ImageDataset(digit_files, labels, channels=1, size=8, transform=transform, cache_bytes=40 * 64 - 1)
    assert cached.images.shape == (40, 1, 8, 8) and direct.images is None and len(cached) == len(direct) == 40
    assert cached.labels == direct.labels == labels.tolist()
    for i in range(40):
        (a, y), (b, z) = cached[i], direct[i]
        assert torch.equal(a, b) and a.dtype == torch.float32 and y == z == i % 4 and type(y) is int
        np.testing.assert_allclose(a[0], (DIGITS[i] / 255 - 0.3) / 0.4, rtol=1e-5, atol=1e-6)
    plain = ImageDataset(digit_files, None, channels=1, size=8)
    np.testing.assert_allclose(plain[5][0][0], DIGITS[5] / 255, rtol=1e-6)
    assert plain[5][1] == UNKNOWN
    with pytest.raises(OsmlError, match="3 labels for 40 images"):
        ImageDataset(digit_files, [0, 1, 2], channels=1, size=8)


def test_dataset_in_a_loader_with_workers(digit_files):
    transform = torch.nn.Sequential(augmentation("auto", 8), to_float([0.5], [0.5]))
    data = ImageDataset(digit_files, range(40), channels=1, size=8, transform=transform)
    batches = list(torch.utils.data.DataLoader(data, batch_size=16, num_workers=1))
    assert torch.cat([y for _, y in batches]).tolist() == list(range(40))
    assert torch.cat([x for x, _ in batches]).shape == (40, 1, 8, 8)
    assert len(pickle.loads(pickle.dumps(data))) == 40


# --- transforms ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_to_float_against_torchvision(dtype):
    images = torch.randint(0, 256, (5, 3, 9, 7), dtype=torch.uint8)
    images = v2.functional.to_dtype(images, dtype, scale=True)
    mean, std = [0.1, 0.5, 0.9], [0.2, 0.3, 1e-3]
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])(images)
    before = images.clone()
    for got, want in ((to_float(mean, std)(images), expected), (to_float(mean, std)(images[0]), expected[0])):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-4)  # one part in 255 over 1e-3 is 4
    assert torch.equal(images, before)


def test_normalisation():
    images = torch.randint(0, 256, (7, 3, 5, 4), dtype=torch.uint8)
    images[:, 1] = 77
    mean, std = normalisation(images)
    pixels = images.numpy() / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(std, np.maximum(pixels.std(axis=(0, 2, 3)), 1e-3), rtol=1e-9)
    assert std[1] == 1e-3


def test_automatic_augmentation_of_small_images_shifts_and_never_mirrors():
    torch.manual_seed(0)
    image = torch.zeros(1, 16, 16, dtype=torch.uint8)
    image[0, 5:9, 6] = 255  # a stroke with a foot on the right
    image[0, 8, 6:9] = 255
    shift = augmentation("auto", 16)
    seen = set()
    for _ in range(300):
        moved = shift(image)
        rows, columns = np.nonzero(moved[0].numpy())
        dy, dx = rows.min() - 5, columns.min() - 6
        assert torch.equal(moved, torch.roll(image, (int(dy), int(dx)), (1, 2)))
        seen.add((dy, dx))
    assert seen == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}


def test_automatic_augmentation_of_large_images_and_none():
    image = torch.from_numpy(np.array(FLOWER.resize((96, 96)))).permute(2, 0, 1).contiguous()
    change = augmentation("auto", 96)
    first, second = change(image), change(image)
    assert first.shape == second.shape == (3, 96, 96) and not torch.equal(first, second)
    assert augmentation("auto", 96)(image[:1]).shape == (1, 96, 96)
    assert torch.equal(augmentation("none", 96)(image), image)


def test_augmentation_from_a_list():
    image = torch.randint(0, 256, (3, 12, 12), dtype=torch.uint8)
    flip = augmentation([{"name": "RandomHorizontalFlip", "p": 1.0}, {"name": "RandomVerticalFlip", "p": 1.0}], 12)
    assert torch.equal(flip(image), image.flip(1, 2))
    assert torch.equal(augmentation([], 12)(image), image)
    state = torch.get_rng_state()
    augmentation([{"name": "RandomRotation", "degrees": [-10, 10]}], 12)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("atuo", "unknown augmentation 'atuo': did you mean 'auto'"),
        ([{"name": "RandomHorizontalFlipp"}], "did you mean 'RandomHorizontalFlip'"),
        (
            [{"name": "RandomHorizontalFlip", "prob": 1}],
            "unknown argument of augmentation 'RandomHorizontalFlip' 'prob'",
        ),
        ([{"name": "RandomHorizontalFlip", "p": 7}], "'RandomHorizontalFlip' does not take"),
        ([{"name": "RandomCrop"}], "'RandomCrop' does not take .* 'size'"),
        ([{"name": "functional"}], "unknown augmentation 'functional'"),
        ([{"p": 1}], "an augmentation is"),
        (["RandomHorizontalFlip"], "an augmentation is"),
        ([{"name": []}], "an augmentation is"),
        ([{"name": "RandomCrop", "size": 9}], r"makes \(3, 9, 9\) of an image \(3, 12, 12\)"),
        ([{"name": "RandomCrop", "size": 32}], "fails on an image"),
        ([{"name": "MixUp", "num_classes": 3}], "fails on an image"),
    ],
)
def test_bad_augmentations(spec, message):
    with pytest.raises(OsmlError, match=message) as error:
        augmentation(spec, 12)
    assert "\n" not in str(error.value)


def test_formats_are_those_of_pillow():
    Image.init()
    assert set(FORMATS) <= set(Image.OPEN)
