"""The Jacobian norm J(x) = ‖∂f/∂x‖_F of a representation f: exact, estimated, and as a detector.

Park et al., "Understanding Open-Set Recognition by Jacobian Norm of Representation" (arXiv 2209.11436): training draws
the items of a known class together, which makes J small there, and the classes apart, which makes it large between
them; J is so an unknown score of the input itself, higher = more unknown.

f is what the model returns in eval mode, for an embedding of unit norm thus the normalised one: it is what detectors
see, and J is then in radians on the sphere per unit of input. With `before_norm` it is the embedding before, whose J
also grows with the scale of the embedder's weights. x is the network's input, after preprocessing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from tqdm import tqdm

from .checks import check_range
from .detectors import Detector
from .embedding import EmbeddingModel
from .errors import OsmlError
from .registry import checked_count, refusing

CHUNK = {"cpu": 16, "cuda": 256}
"""Rows at once, by kind of device: on a CPU more of them fall out of its cache."""
EMBEDDED = 256
"""Inputs that are embedded at once."""


def jacobian_norm(
    model: nn.Module,
    inputs: Tensor,
    *,
    before_norm: bool = False,
    chunk: int | None = None,
    progress: str | None = None,
) -> Tensor:
    """J of each input, exact: `(N,)` on the inputs' device, float32 (float64 of float64 inputs).

    The rows of the Jacobian (its columns where an input has fewer numbers than the embedding) are vectorised over
    items, and, where there are few of these, over outputs as well: as many copies of an item go forward once, and each
    brings another row back. It needs nothing of the model but a derivative, so that it works for any.

    Args:
        model: maps a batch to embeddings `(N, D)`, each item on its own. It works in eval mode on the inputs' device,
            and is given back as it was: flags, gradients, device.
        inputs: `(N, …)` floating point, finite.
        before_norm: of an `EmbeddingModel`, the embedding before it is brought to unit norm.
        chunk: rows at once; None = `CHUNK` of the device. Memory is what a training step of a batch of this size takes
            without the weights' part, and does not grow with N or D.
        progress: names a progress bar; None = no bar.

    Raises:
        OsmlError: for inputs of another kind, embeddings that are not `(N, D)`, and a model that cannot be
            differentiated.
    """
    inputs, chunk = _checked(inputs, chunk)
    f = _representation(model, before_norm)
    if len(inputs) == 0:
        return inputs.new_zeros(0)
    squares = []
    with _at_rest(model, inputs.device), _bar(inputs, progress) as bar:
        width, n_inputs = _width(f, inputs), inputs[0].numel()
        for x in inputs.split(chunk):
            if n_inputs < width:
                columns = torch.eye(n_inputs).view(-1, 1, *x.shape[1:]).expand(-1, *x.shape)
                squares.append(sum(part.sum(dim=0) for part in _pushed_forward(f, x, columns, chunk)))
            else:
                rows = torch.eye(width)[:, None].expand(-1, len(x), -1)
                squares.append(sum(part.sum(dim=0) for part in _pulled_back(f, x, rows, chunk)))
            bar.update(len(x))
    return torch.cat(squares).sqrt()


def estimate_jacobian_norm(
    model: nn.Module,
    inputs: Tensor,
    n_projections: int = 8,
    seed: int = 0,
    *,
    before_norm: bool = False,
    chunk: int | None = None,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """J of each input from random projections, and its standard error: `(N,)` each; one forward pass and
    `n_projections` backward ones.

    For v uniform on the sphere of radius √D, ‖vᵀ∂f/∂x‖² has the mean J². The P projections of an item are orthogonal:
    without bias for J² too, with less variance than independent ones, and exact at P = D. The variance of their mean is
    estimated, without bias as well, by s²/P · (1 − P/D), s² being their sample variance. The root turns it into the
    standard error of J to first order, and makes J itself too small on average, by about standard_error² / (2 J).

    Args:
        n_projections: P, from 2 to D.
        seed: of the projections, which are drawn anew for each item.
        model, inputs, before_norm, chunk, progress: as for `jacobian_norm`.
    """
    inputs, chunk = _checked(inputs, chunk)
    f = _representation(model, before_norm)
    if len(inputs) == 0:
        return inputs.new_zeros(0), inputs.new_zeros(0)
    draw = np.random.default_rng(seed)  # its numbers do not depend on chunks and devices
    squares, variances = [], []
    with _at_rest(model, inputs.device), _bar(inputs, progress) as bar:
        width = _width(f, inputs)
        n = checked_count("n_projections", n_projections)
        if not 2 <= n <= width:
            raise OsmlError(
                f"n_projections must be from 2 to {width}, the embedding's width; got {n}: the exact norm takes {width}"
            )
        for x in inputs.split(chunk):
            gaussian = torch.from_numpy(draw.standard_normal((len(x), width, n), dtype=np.float32))
            frames = torch.linalg.qr(gaussian)[0].permute(2, 0, 1)  # (P, N, D), orthonormal for each item
            samples = width * torch.cat(list(_pulled_back(f, x, frames, chunk)))
            squares.append(samples.mean(dim=0))
            variances.append(samples.var(dim=0) / n * (1 - n / width))
            bar.update(len(x))
    norms = torch.cat(squares).sqrt()
    # Where nothing depends on the input, nothing is uncertain.
    return norms, torch.cat(variances).sqrt() / (2 * norms).clamp_min(torch.finfo(norms.dtype).tiny)


class JacobianDetector:
    """Scores inputs, not embeddings, by J: higher = more unknown. With a detector of embeddings, by both.

    Alone it needs no fitting. With a detector, J and the detector's score are each brought to mean 0 and standard
    deviation 1 on known inputs, and added.

    Args:
        model: as for `jacobian_norm`.
        detector: a fitted one, of the embeddings that `model` gives.
        n_projections, seed: of the estimate; None = exact.
        before_norm, chunk: as for `jacobian_norm`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        detector: Detector | None = None,
        n_projections: int | None = None,
        seed: int = 0,
        before_norm: bool = False,
        chunk: int | None = None,
    ):
        if detector is not None and not isinstance(detector, Detector):
            raise OsmlError(f"detector must be a fitted Detector, such as that of a recognizer; got {detector!r}")
        self.model, self.detector = model, detector
        self.n_projections, self.seed = n_projections, seed
        self.before_norm, self.chunk = before_norm, chunk
        self._scales: list[tuple[float, float]] | None = None

    def fit(self, inputs: Tensor) -> JacobianDetector:
        """Learn how J and the detector's score spread over known inputs `(N, …)`, N ≥ 2, that neither network nor
        detector was fitted on: those of the data role calibration. Without a detector there is nothing to learn."""
        if self.detector is not None:
            if len(inputs) < 2:
                raise OsmlError(f"a spread needs at least two known inputs; got {len(inputs)}: give more")
            scores = (self._norms(inputs), self._embedding_scores(inputs))
            self._scales = [(float(s.mean()), max(float(s.std()), torch.finfo(s.dtype).tiny)) for s in scores]
        return self

    def score(self, inputs: Tensor) -> Tensor:
        """Unknown scores `(N,)` of inputs `(N, …)`, on their device."""
        if self.detector is None:
            return self._norms(inputs)
        if self._scales is None:
            raise OsmlError("this JacobianDetector is not fitted: call fit(inputs) with known inputs first")
        scores = (self._norms(inputs), self._embedding_scores(inputs))
        return sum((s - mean) / std for s, (mean, std) in zip(scores, self._scales, strict=True))

    def _norms(self, inputs: Tensor) -> Tensor:
        how = {"before_norm": self.before_norm, "chunk": self.chunk}
        if self.n_projections is None:
            return jacobian_norm(self.model, inputs, **how)
        return estimate_jacobian_norm(self.model, inputs, self.n_projections, self.seed, **how)[0]

    def _embedding_scores(self, inputs: Tensor) -> Tensor:
        with _at_rest(self.model, inputs.device), torch.no_grad():
            embeddings = torch.cat([_embeddings(self.model, x) for x in inputs.split(EMBEDDED)])
        return self.detector.score(embeddings)


# --- parts -----------------------------------------------------------------------------------------------


def _pulled_back(f: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, chunk: int) -> Iterator[Tensor]:
    """‖vᵀ∂f/∂x‖² of directions v `(R, N, D)`, in parts `(R', N)` of at most `chunk` vectors."""
    with _differentiated():
        parts = _parts(directions, chunk)
        repeated = x.repeat(len(parts[0]), *[1] * (x.ndim - 1)).requires_grad_()
        out = _embeddings(f, repeated)
        for part in parts:
            v = torch.zeros_like(out)  # the last part may be smaller
            v[: len(part) * len(x)] = part.flatten(0, 1)
            (rows,) = torch.autograd.grad(out, repeated, v, retain_graph=part is not parts[-1])
            yield _squares(rows).view(-1, len(x))[: len(part)]


def _pushed_forward(f: Callable[[Tensor], Tensor], x: Tensor, directions: Tensor, chunk: int) -> Iterator[Tensor]:
    """‖∂f/∂x u‖² of directions u `(R, N, …)`, in parts `(R', N)` of at most `chunk` vectors."""
    with _differentiated():
        for part in _parts(directions, chunk):
            repeated = x.repeat(len(part), *[1] * (x.ndim - 1))
            with forward_ad.dual_level(), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch's own, of how it derives some functions
                dual = forward_ad.make_dual(repeated, part.flatten(0, 1).to(repeated))
                columns = forward_ad.unpack_dual(_embeddings(f, dual)).tangent
            if columns is None:
                raise RuntimeError("its output does not depend on it")
            yield _squares(columns).view(-1, len(x))


def _parts(directions: Tensor, chunk: int) -> tuple[Tensor, ...]:
    """Directions `(R, N, …)` cut along R, as evenly as parts of at most `chunk` vectors allow."""
    most = max(1, chunk // directions.shape[1])
    return directions.tensor_split(-(-len(directions) // most))


def _squares(vectors: Tensor) -> Tensor:
    """The squared norms `(N,)` of `(N, …)`; half precision is too coarse, and too short, to add them up in."""
    vectors = vectors.flatten(1)
    return (vectors if vectors.dtype == torch.float64 else vectors.float()).square().sum(dim=-1)


def _differentiated():
    return refusing(
        "the network cannot be differentiated by its input", "J is of a network whose embeddings are smooth in it"
    )


def _representation(model: nn.Module, before_norm: bool) -> Callable[[Tensor], Tensor]:
    if not before_norm:
        return model
    if not isinstance(model, EmbeddingModel):
        raise OsmlError(
            f"before_norm is for an EmbeddingModel; got {type(model).__name__}: pass a model without its normalisation"
        )
    f = copy(model)
    f.unit_norm = False
    return f


@torch.no_grad()
def _width(f: Callable[[Tensor], Tensor], inputs: Tensor) -> int:
    return _embeddings(f, inputs[:1]).shape[1]


def _embeddings(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    out = f(x)
    if not isinstance(out, Tensor) or out.ndim != 2 or len(out) != len(x):
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise OsmlError(f"the model must return embeddings of shape ({len(x)}, width); got {shape}")
    return out


def _checked(inputs: Tensor, chunk: int | None) -> tuple[Tensor, int]:
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 2:
        what = f"{inputs.dtype} of shape {tuple(inputs.shape)}" if isinstance(inputs, Tensor) else type(inputs).__name__
        raise OsmlError(f"inputs must be a floating-point tensor of shape (items, …); got {what}")
    check_range(inputs, "inputs")
    return inputs.detach(), checked_count("chunk", CHUNK[_kind(inputs)] if chunk is None else chunk)


def _kind(inputs: Tensor) -> str:
    return "cpu" if inputs.device.type == "cpu" else "cuda"


@contextmanager
def _at_rest(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model in eval mode on this device, differentiable by its input only, whatever the mode outside; afterwards as
    it was."""
    training = [module for module in model.modules() if module.training]
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    home = next((p.device for p in chain(model.parameters(), model.buffers())), device)
    try:
        model.to(device).eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        model.to(home)
        for module in training:
            module.training = True
        for parameter in learning:
            parameter.requires_grad_(True)


def _bar(inputs: Tensor, progress: str | None) -> tqdm:
    return tqdm(total=len(inputs), desc=progress, unit="item", disable=progress is None, delay=1, leave=False)
