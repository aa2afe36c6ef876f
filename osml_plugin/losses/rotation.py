"""Rotation as a second task: by which quarter turn was the image turned?"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class RotationTask(nn.Module):
    """A head on the trunk's features that tells four rotations apart (Gidaris et al. 2018, arXiv 1803.07728), as Park
    et al. (arXiv 2209.11436) train beside m-OvR. It sits before the embedder, so that embeddings need not know of it.

    Args:
        width: F of the trunk's features `(N, F)`.
    """

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, 4)

    @staticmethod
    def turned(images: Tensor) -> tuple[Tensor, Tensor]:
        """Square images `(N, C, S, S)`, each turned by a random number of quarters, and that number `(N,)`, 0 to 3."""
        quarters = torch.randint(4, (len(images),), device=images.device)
        turned = torch.empty_like(images)
        for quarter in range(4):
            turned[quarters == quarter] = images[quarters == quarter].rot90(quarter, (2, 3))
        return turned, quarters

    def forward(self, features: Tensor, quarters: Tensor) -> Tensor:
        """Mean cross-entropy of the features `(N, F)` of turned images."""
        return cross_entropy(self.head(features), quarters)
