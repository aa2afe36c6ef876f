"""Sets of embeddings with unknown classes in them: digits, clothes (Fashion-MNIST), and characters of typefaces.

A draw cuts the classes of a set into known, pseudo-unknown and unknown ones, and trains a small network with ArcFace on
55 % of the known items (12,000 at most). What is left of them and the pseudo-unknown classes are the references; one in
ten of the former is handed in among the unknown ones, as wrongly rejected.
"""

from __future__ import annotations

import gzip
import unicodedata
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from pytorch_metric_learning.losses import ArcFaceLoss
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm import tqdm

WIDTH = 64
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's dataset-fashion-mnist lies."""
FACTS = (0, 1, 3, 5, 7, 8)
"""The known classes of Fashion-MNIST whose figures are to be beaten (k-means told the number: ACC 0.63)."""
SETS = ("digits", "clothes", "characters")
SMALLEST = 1 / 8
"""The share that is left of the smallest class in `uneven`."""


@dataclass(frozen=True)
class Draw:
    """One cut of a set. Embeddings are unit rows."""

    items: np.ndarray
    """`(N, D)` what is to be grouped: all items of unknown classes, and some wrongly rejected known ones."""
    classes: np.ndarray
    """`(N,)` their true classes; used for nothing but figures."""
    is_old: np.ndarray
    """`(N,)` bool: of a known class."""
    references: np.ndarray
    """`(M, D)` items of known and pseudo-unknown classes that training did not see."""
    reference_classes: np.ndarray
    in_gallery: np.ndarray
    """`(M,)` bool: of a known class, not of a pseudo-unknown one."""
    train: np.ndarray
    """`(T, D)` the items that the network was trained on."""
    train_classes: np.ndarray

    @property
    def n_unknown(self) -> int:
        return len(np.unique(self.classes[~self.is_old]))


def draw(name: str, number: int, cache_in: Path | None = None) -> Draw:
    """Draw `number` of a set: of `SETS`, or 'facts', the fixed cut of Fashion-MNIST (1: with a pseudo-unknown one)."""
    file = cache_in / f"{name}-{number}.npz" if cache_in else None
    if file and file.exists():
        with np.load(file) as parts:
            return Draw(**parts)
    images, labels, epochs = {"digits": digits, "characters": characters}.get(name, clothes)()
    rng = np.random.default_rng(number)
    torch.manual_seed(number)
    order = rng.permutation(labels.max() + 1)
    if name == "facts":
        known, pseudo = (FACTS[:-1], FACTS[-1:]) if number % 2 else (FACTS, ())
        unknown = sorted(set(range(10)) - set(FACTS))
    else:
        # digits: 5 known, 1 pseudo-unknown, 4 unknown; clothes: 4 or 5, 2 or 1, 4; characters: 80, 16, 64 (48, 32, …)
        n_unknown = {"digits": 4, "clothes": 3 + number % 3, "characters": (64, 50, 80)[number % 3]}[name]
        n_pseudo = {"digits": 1, "clothes": 1 + number % 2, "characters": 16}[name]
        unknown, pseudo, known = np.split(order, [n_unknown, n_unknown + n_pseudo])
    of_known = rng.permutation(np.flatnonzero(np.isin(labels, known)))
    train, held_out = np.split(of_known, [int(0.55 * len(of_known))])
    rejected, held_out = np.split(held_out, [len(held_out) // 10])
    references = np.concatenate([held_out, np.flatnonzero(np.isin(labels, pseudo))])
    items = np.concatenate([np.flatnonzero(np.isin(labels, unknown)), rejected])
    embeddings = embed(images, train[:12_000], labels, epochs).numpy()
    result = Draw(
        items=embeddings[items],
        classes=labels[items],
        is_old=np.isin(labels[items], known),
        references=embeddings[references],
        reference_classes=labels[references],
        in_gallery=np.isin(labels[references], known),
        train=embeddings[train],
        train_classes=labels[train],
    )
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        np.savez(file, **vars(result))
    return result


def uneven(d: Draw, seed: int) -> Draw:
    """The draw with unknown classes of uneven sizes: from all items of one to an eighth of another, in even ratios."""
    rng = np.random.default_rng(seed)
    classes = rng.permutation(np.unique(d.classes[~d.is_old]))
    share = dict(zip(classes, np.geomspace(1, SMALLEST, len(classes)), strict=True))
    kept = rng.random(len(d.items)) < np.where(d.is_old, 1, [share.get(c, 1) for c in d.classes])
    return replace(d, items=d.items[kept], classes=d.classes[kept], is_old=d.is_old[kept])


def digits() -> tuple[Tensor, np.ndarray, int]:
    """1,797 images `(N, 1, S, S)`, their classes, and epochs to train for."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images.reshape(-1, 1, 8, 8) / 16, dtype=torch.float32), labels, 25


@cache
def clothes() -> tuple[Tensor, np.ndarray, int]:
    """60,000 images of Fashion-MNIST."""
    images, labels = (_read_idx(FASHION_MNIST / f"train-{name}-ubyte.gz") for name in ("images-idx3", "labels-idx1"))
    return torch.tensor(images[:, None] / 255, dtype=torch.float32), labels.astype(np.int64), 5


@cache
def characters(n_classes: int = 160, a_class: int = 60) -> tuple[Tensor, np.ndarray, int]:
    """Letters and signs `(n_classes · a_class, 1, 28, 28)` in typefaces that ship with matplotlib, bent a little."""
    import matplotlib
    from fontTools.ttLib import TTFont

    rng = np.random.default_rng(0)
    files = sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("*.ttf"))
    fonts = [
        (set(TTFont(file).getBestCmap()), ImageFont.truetype(str(file), 40))
        for file in files
        if file.name.startswith(("DejaVuS", "STIXGeneral")) and "Display" not in file.name
    ]
    letters = [chr(c) for c in range(0x30, 0x2300) if sum(c in has for has, _ in fonts) >= 14]
    # Letters with accents are left out, as are those that differ from another in size or name only.
    letters = [c for c in letters if unicodedata.category(c) in ("Lu", "Ll", "Nd", "Sm", "Sc", "So")]
    letters = [c for c in letters if len(unicodedata.normalize("NFKD", c)) == 1]
    plain: list[str] = []
    seen: list[np.ndarray] = []
    for c in letters:
        image = _glyph(c, fonts[3][1] if ord(c) in fonts[3][0] else fonts[0][1])
        if all(np.abs(image - other).mean() > 0.07 for other in seen):
            plain.append(c)
            seen.append(image)
    chosen = rng.permutation(len(plain))[:n_classes]
    images, labels = [], []
    for label, c in enumerate(tqdm([plain[i] for i in chosen], desc="characters", leave=False)):
        having = [font for has, font in fonts if ord(c) in has]
        for i in range(a_class):
            images.append(_glyph(c, having[i % len(having)], rng))
            labels.append(label)
    return torch.tensor(np.array(images)[:, None], dtype=torch.float32), np.array(labels), 12


def _glyph(c: str, font: ImageFont.FreeTypeFont, rng: np.random.Generator | None = None) -> np.ndarray:
    """A character `(28, 28)` in [0, 1], as large as fits; with `rng` turned, sheared, squeezed, blotted."""
    image = Image.new("L", (96, 96))
    ImageDraw.Draw(image).text((48, 48), c, fill=255, font=font, anchor="mm")
    image = image.crop(image.getbbox())
    side = max(image.size)
    square = Image.new("L", (side, side))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    size, turn, shear = 22, 0.0, 0.0
    if rng is not None:
        size, turn, shear = int(rng.integers(18, 25)), rng.normal(0, 7), rng.normal(0, 0.12)
    canvas = Image.new("L", (28, 28))
    place = (28 - size) // 2
    canvas.paste(square.resize((size, size), Image.Resampling.BILINEAR), (place, place))
    canvas = canvas.rotate(turn, Image.Resampling.BILINEAR)
    canvas = canvas.transform(
        (28, 28), Image.Transform.AFFINE, (1, shear, -14 * shear, 0, 1, 0), Image.Resampling.BILINEAR
    )
    pixels = np.asarray(canvas, dtype=np.float32) / 255
    return pixels if rng is None else np.clip(pixels + rng.normal(0, 0.1, pixels.shape), 0, 1).astype(np.float32)


def embed(images: Tensor, train: np.ndarray, labels: np.ndarray, epochs: int) -> Tensor:
    """Embeddings `(N, WIDTH)` of all images by a network trained on those of `train`."""
    side = images.shape[-1] // 4
    layers = [
        layer
        for i, o in ((1, 24), (24, 48))
        for layer in (nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2))
    ]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(48 * side * side, WIDTH))
    classes, targets = np.unique(labels[train], return_inverse=True)
    loss = ArcFaceLoss(len(classes), WIDTH, scale=32)
    optimizer = torch.optim.AdamW(
        [{"params": model.parameters(), "lr": 1e-3}, {"params": loss.parameters(), "lr": 1e-2}]
    )
    data = torch.utils.data.TensorDataset(images[train], torch.from_numpy(targets))
    for _ in tqdm(range(epochs), desc="training", leave=False):
        for batch, target in torch.utils.data.DataLoader(data, 128, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            loss(model(batch), target).backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return torch.cat([normalize(model(batch)) for batch in images.split(2000)])


def _read_idx(path: Path) -> np.ndarray:
    with gzip.open(path) as file:
        data = file.read()
    shape = np.frombuffer(data, ">i4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
