"""Prototypical networks: each batch is an episode."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from .. import UNKNOWN
from ..registry import checked_count, checked_positive


class PrototypicalLoss(BaseMetricLossFunction):
    """−log softmax(−s · d(f, c))_y over the classes of the batch, where c is the mean of a class's support items, for
    each of the others, the queries (Snell et al. 2017, arXiv 1703.05175, eq. 1 and 2; d = squared Euclidean distance).

    Batches are shuffled already, so the split is by order: of each class the first, third, fifth … are support. A
    class with one item has a prototype and no query. With `ref_emb` and `ref_labels` these are the support, and the
    whole batch is queries. Items labelled `UNKNOWN` are left out. Without a query the loss is 0. Half precision and
    autocast are computed in float32.

    Args:
        n_support: items of each class that are support, the first so many; None = every other one.
        softmax_scale: s > 0; 1 as published. Where the distance is between unit vectors, something like 16.
        kwargs: PML's own: distance, reducer, embedding_regularizer, its weight, collect_stats.
    """

    def __init__(self, n_support: int | None = None, softmax_scale: float = 1.0, **kwargs):
        super().__init__(**kwargs)
        self.n_support = None if n_support is None else checked_count("n_support", n_support)
        self.softmax_scale = checked_positive("softmax_scale of PrototypicalLoss", softmax_scale)
        self.add_to_recordable_attributes(list_of_names=["n_support", "softmax_scale"], is_stat=False)
        self.add_to_recordable_attributes(list_of_names=["num_classes", "num_queries"], is_stat=True)

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, dict[str, Any]]:
        c_f.labels_required(labels)
        apart = ref_emb is not embeddings
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        known = labels != UNKNOWN
        support = ref_labels != UNKNOWN if apart else known & self._is_support(labels)
        classes, support_class = ref_labels[support].unique(return_inverse=True)
        queries = known & torch.isin(labels, classes)
        query = torch.where(queries if apart else queries & ~support)[0]
        if not len(query):
            return self.zero_losses()
        with torch.autocast(embeddings.device.type, enabled=False):
            member = one_hot(support_class, len(classes)).to(dtype)
            prototypes = member.t() @ ref_emb[support].to(dtype) / member.sum(dim=0)[:, None]
            distances = self.distance(embeddings[query].to(dtype), prototypes)
            logits = self.softmax_scale * (distances if self.distance.is_inverted else -distances)
            losses = cross_entropy(logits, torch.searchsorted(classes, labels[query]), reduction="none")
        if self.collect_stats:
            self.num_classes, self.num_queries = len(classes), len(query)
        weights = lmu.convert_to_weights(indices_tuple, labels, dtype=dtype, using_ref=apart)[query]
        return {"loss": {"losses": losses * weights, "indices": query, "reduction_type": "element"}}

    def _is_support(self, labels: Tensor) -> Tensor:
        """`(N,)` bool, by how many of its class come before each item."""
        before = (labels[:, None] == labels).tril(diagonal=-1).sum(dim=1)
        return before % 2 == 0 if self.n_support is None else before < self.n_support

    def get_default_distance(self) -> LpDistance:
        return LpDistance(normalize_embeddings=False, power=2)
