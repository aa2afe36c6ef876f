"""The extreme value machine: each reference knows how far its class may reach."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from ..errors import OsmlError
from ..neighbors import NeighborIndex
from ..registry import checked_count, checked_number
from .base import Detector
from .weibull import fit_weibull

MAX_PAIRS = 2**24
"""Pairs of items looked at at once: 64 MiB of distances."""

LEAST_DISTANCE = 1e-15
"""Nearer ones count as this far: where the whole tail repeats a reference, its class reaches no farther."""


class EVM(Detector, name="evm"):
    """log(1 − log max_i Ψ_i(x)), Ψ_i(x) = exp(−(‖x_i − x‖ / λ_i)^κ_i) (Rudd et al. 2018).

    Ψ_i is the probability that x belongs to the class of reference x_i; κ_i and λ_i are the Weibull fit to half the
    distances from x_i to the nearest references of other classes. The score rises with 1 − max Ψ, which is
    1 − exp(1 − exp(score)), but does not round to 1 where Ψ is small.

    What is a repetition of a reference of another class leaves no margin, and is left out of that one's fit. One class
    alone has no margin to learn: the score then rises with the distance to the nearest reference.

    Args:
        tail: nearest references of other classes to fit to; fewer where there are not so many.
        cover: a reference is dropped where another one of its class includes it with at least this probability, the
            fewest possible being kept (greedily, as in the paper, which takes 0.5); None keeps all. Memory and time of
            a prediction grow with what is kept.
    """

    tried_by_auto = False
    searches_references = True
    search_space = {"tail": (10, 50)}

    def __init__(self, *, tail: int = 20, cover: float | None = None):
        super().__init__()
        self.tail = checked_count("tail of detector 'evm'", tail)
        self.cover = cover if cover is None else checked_number("cover", cover)
        if cover is not None and not 0 < self.cover < 1:
            raise OsmlError(f"cover must be above 0 and below 1, or None; got {cover!r}")

    def _fit(self, index: NeighborIndex, labels: Tensor, class_weights: Tensor | None) -> None:
        parts = []
        for c in tqdm(range(len(self.class_labels)), desc="margins", delay=2, leave=False):
            of_class = labels == c
            references = index.references[of_class]
            shape, scale = self._margins(references, index.without(of_class))
            kept = torch.arange(len(references), device=labels.device)
            if self.cover is not None:
                kept = covering(references, shape, scale, self.cover)
            parts.append((references[kept], torch.full_like(kept, c), shape[kept], scale[kept]))
        references, classes, shapes, scales = (torch.cat(part) for part in zip(*parts, strict=True))
        # Around their mean, because a product of matrices gives distances between long vectors badly.
        mean = references.mean(dim=0)
        self.register_buffer("mean", mean)
        self.register_buffer("references", references - mean)
        self.register_buffer("reference_classes", classes)
        self.register_buffer("shapes", shapes.float())
        self.register_buffer("log_scales", scales.log().float())

    def _margins(self, references: Tensor, others: NeighborIndex) -> tuple[Tensor, Tensor]:
        """κ and λ of references `(R, D)` of a class."""
        if not others.present.any():
            return torch.ones(2, len(references), dtype=torch.float64, device=references.device).unbind()
        half = torch.cat([others.search(r, self.tail)[0] / 2 for r in references.split(self.chunk_size)])
        counts = half > 1e-6 * half[:, -1:]
        counts[:, -1] = True
        return fit_weibull(half.clamp_min(LEAST_DISTANCE), counts)

    def _score_and_class(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        x = embeddings - self.mean
        blocks = torch.arange(len(self.references), device=x.device).split(max(1, MAX_PAIRS // max(1, len(x))))
        lowest, nearest = [], []
        for rows in blocks:
            value, row = log_exponents(x, self.references[rows], self.shapes[rows], self.log_scales[rows]).min(dim=1)
            lowest.append(value)
            nearest.append(rows[row])
        value, block = torch.stack(lowest, dim=1).min(dim=1)
        row = torch.stack(nearest, dim=1).gather(1, block[:, None])[:, 0]
        return softplus(value), self.reference_classes[row]


def log_exponents(x: Tensor, references: Tensor, shapes: Tensor, log_scales: Tensor) -> Tensor:
    """κ_i (ln ‖x_i − x‖ − ln λ_i) `(N, R)`, the logarithm of −log Ψ_i(x)."""
    squares = x.square().sum(dim=1, keepdim=True) + references.square().sum(dim=1)
    # In place, because this is all the memory that a prediction takes.
    found = squares.addmm_(x, references.T, alpha=-2).clamp_min_(LEAST_DISTANCE**2).log_().mul_(0.5)
    return found.sub_(log_scales).mul_(shapes)


def covering(references: Tensor, shapes: Tensor, scales: Tensor, cover: float) -> Tensor:
    """Rows, rising, of references `(R, D)` of a class such that each of the others is included by one of these with
    probability `cover` or more: greedily the one that includes most of those that none includes yet, and of several
    such the one with the largest scale."""
    x = references - references.mean(dim=0)
    shapes, log_scales = shapes.float(), scales.log().float()
    # −log Ψ ≤ −log cover; a reference includes itself, whatever rounding says.
    limit = float(torch.tensor(cover).log().neg().log())

    def includes(of: Tensor, items: Tensor) -> Tensor:
        """Whether references `of` include `items`, `(I, O)`."""
        return (log_exponents(x[items], x[of], shapes[of], log_scales[of]) <= limit) | (items[:, None] == of)

    everything = torch.arange(len(x), device=x.device)
    step = max(1, MAX_PAIRS // len(x))

    def newly(items: Tensor) -> Tensor:
        """How many of `items` each reference includes."""
        return sum(includes(everything, part).sum(dim=0) for part in items.split(step))

    reach = scales / (2 * scales.amax())  # below 1, the least by which gains differ
    open_, gains, kept = torch.ones_like(everything, dtype=torch.bool), newly(everything), []
    while open_.any():
        best = (gains + reach).argmax()[None]
        covered = everything[open_]
        covered = covered[torch.cat([includes(best, part)[:, 0] for part in covered.split(MAX_PAIRS)])]
        gains -= newly(covered)
        open_[covered] = False
        kept.append(best)
    return torch.cat(kept).sort().values
