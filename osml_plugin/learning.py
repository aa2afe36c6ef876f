"""A watch over the first epoch of a training, for one that cannot learn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from pytorch_metric_learning.losses import CrossBatchMemory
from torch import Tensor, nn

from . import pml
from .errors import OsmlError


class FirstEpoch:
    """Looks at the batches and steps of the first epoch; `check` then says whether anything was learned.

    The parameters that are watched are those which the loss reaches first: the embedder's, the trunk's where that has
    none, the loss's own where neither has. A step counts if they have a gradient and are others afterwards: weight
    decay moves them without one, and a rate of 0 moves nothing. Looking costs a copy of them until a step has counted,
    which in a sound training is the first.
    """

    def __init__(self, parts: Iterable[nn.Module], loss: nn.Module, batch_size: int):
        free = ([p for p in part.parameters() if p.requires_grad] for part in parts)
        self.parameters: list[Tensor] = next((parameters for parameters in free if parameters), [])
        self.loss_name, self.batch_size = type(loss).__name__, batch_size
        self.compares_items = pml.compares_items(loss)
        self.same_class = self.two_classes = False
        """Whether a batch held two items of one class, and whether one held items of two."""
        self.miner_name: str | None = None
        self.mined = False
        self.gradient = self.moved = False
        self._before: list[Tensor] = []

    def see_batch(self, labels: Tensor, miner: nn.Module | None, mined: Sequence[Tensor] | None) -> None:
        """Take note of a batch's labels, and of the pairs or triplets that a miner chose from it."""
        if not (self.same_class and self.two_classes):
            counts = labels.unique(return_counts=True, dim=0)[1]
            self.same_class |= int(counts.max()) > 1
            self.two_classes |= len(counts) > 1
        if miner is not None and mined is not None:
            self.miner_name = type(miner).__name__
            self.mined |= any(len(indices) > 0 for indices in mined)

    def before_step(self) -> None:
        """To be called when the gradients are there and the optimizers have not used them."""
        if self.moved:
            return
        has_gradient = any(p.grad is not None and bool(p.grad.any()) for p in self.parameters)
        self.gradient |= has_gradient
        self._before = [p.detach().clone() for p in self.parameters] if has_gradient else []

    def after_step(self) -> None:
        """To be called when the optimizers have made their step."""
        pairs = zip(self._before, self.parameters, strict=False)  # none where there was no gradient
        self.moved = self.moved or any(not torch.equal(old, new) for old, new in pairs)
        self._before = []

    def check(self, mean_loss: float) -> None:
        """OsmlError, with the reason and the remedy, where the epoch could teach nothing."""
        if problem := self._problem(mean_loss):
            raise OsmlError(f"nothing was learned in the first epoch: {problem}")

    def _problem(self, mean_loss: float) -> str | None:
        batches = f"no batch of {self.batch_size} items held"
        if self.compares_items and not self.same_class:
            return (
                f"{batches} two items of one class, and loss '{self.loss_name}' compares such items: raise "
                "training.batch_size, or set sampler to MPerClassSampler with m of 2 or more"
            )
        if self.compares_items and not self.two_classes:
            return (
                f"{batches} items of two classes, and loss '{self.loss_name}' compares such items: raise "
                "training.batch_size, or lower sampler.m"
            )
        if self.moved:
            return None
        if self.gradient:
            return "no step changed the network's weights: raise optimizer.lr"
        if self.miner_name is not None and not self.mined:
            return (
                f"miner '{self.miner_name}' found no pair or triplet in any batch: change its arguments, raise "
                "training.batch_size, or leave the miner out"
            )
        if mean_loss == 0:
            return (
                f"loss '{self.loss_name}' was 0 in every batch: none held the pairs or triplets that it compares, or "
                "all of them meet its margins already: raise training.batch_size, change the margins (with a "
                "similarity, pos_margin goes above neg_margin), or set training.epochs to 0"
            )
        return f"loss '{self.loss_name}' gave the network no gradient: look at its arguments, or choose another"


def check_memories(loss: nn.Module, batch_size: int) -> None:
    """OsmlError where a cross-batch memory, in the loss or in one of its parts, has no room for a batch."""
    for part in loss.modules():
        if isinstance(part, CrossBatchMemory) and part.memory_size < batch_size:
            raise OsmlError(
                f"loss 'CrossBatchMemory' remembers {part.memory_size} items, fewer than a batch of {batch_size}: set "
                "its memory_size to several batches, or lower training.batch_size"
            )
