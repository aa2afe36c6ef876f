"""What the losses with one weight vector a class have in common."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.losses.mixins import WeightRegularizerMixin
from pytorch_metric_learning.utils import common_functions as c_f
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from torch import Tensor, nn

from .. import UNKNOWN
from ..errors import OsmlError


class ClassificationLoss(WeightRegularizerMixin, BaseMetricLossFunction):
    """A loss with the weights `W` `(embedding_size, num_classes)`, one column a class.

    A subclass writes `get_logits(embeddings) -> (N, C)` and `_known_losses(embeddings, labels) -> {sub-loss: (N,)}`;
    one that can use items of no class also `_unknown_losses(embeddings) -> (N,)`, which joins the sub-loss "loss".
    The base owns the rest: labels, the miner's weights, empty batches, precision, devices.

    Items labelled `UNKNOWN` are negatives for every class where `takes_unknown` is set, and are left out elsewhere.
    Half-precision embeddings and autocast are computed in float32, in which the items' losses come; `W` keeps its type.

    Args:
        num_classes: C; labels are 0..C-1, or `UNKNOWN`.
        embedding_size: D.
        kwargs: PML's own: distance, reducer, embedding_regularizer, weight_regularizer, their weights, collect_stats.

    Raises:
        OsmlError: in use, for a label that is no class's number.
    """

    takes_unknown: ClassVar[bool] = False

    def __init__(self, num_classes: int, embedding_size: int, **kwargs):
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.W = nn.Parameter(torch.empty(embedding_size, num_classes))
        self.weight_init_func(self.W)
        self.add_to_recordable_attributes(list_of_names=["num_classes"], is_stat=False)

    def get_logits(self, embeddings: Tensor) -> Tensor:
        """Logits `(N, C)` of embeddings `(N, D)`."""
        raise NotImplementedError

    def _known_losses(self, embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _unknown_losses(self, embeddings: Tensor) -> Tensor:
        raise NotImplementedError

    def compute_loss(
        self, embeddings: Tensor, labels: Tensor, indices_tuple: Any, ref_emb: Tensor, ref_labels: Tensor
    ) -> dict[str, dict[str, Any]]:
        c_f.labels_required(labels)
        c_f.ref_not_supported(embeddings, labels, ref_emb, ref_labels)
        labels = self._checked(labels.long())
        self.to(embeddings.device)
        # Half precision would round small steps of the weights away, and squared distances overflow in it.
        dtype = torch.promote_types(embeddings.dtype, torch.float32)
        known, unknown = torch.where(labels != UNKNOWN)[0], torch.where(labels == UNKNOWN)[0]
        weights = lmu.convert_to_weights(indices_tuple, labels, dtype=dtype)
        weights[unknown] = 1  # miners choose among classes, and these items have none
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(dtype)
            losses = self._known_losses(embeddings[known], labels[known])
            rows = dict.fromkeys(losses, known)
            if self.takes_unknown:
                losses["loss"] = torch.cat([losses["loss"], self._unknown_losses(embeddings[unknown])])
                rows["loss"] = torch.cat([known, unknown])
        loss_dict = {
            name: {"losses": of * weights[rows[name]], "indices": rows[name], "reduction_type": "element"}
            if len(of)
            else self.zero_loss()
            for name, of in losses.items()
        }
        self.add_weight_regularization_to_loss_dict(loss_dict, self.W.t())
        return loss_dict

    def _checked(self, labels: Tensor) -> Tensor:
        # Some of torch's functions skip a number that is no class's, or wrap it round.
        if len(wrong := labels[(labels < UNKNOWN) | (labels >= self.num_classes)]):
            raise OsmlError(
                f"{type(self).__name__} takes labels from 0 to {self.num_classes - 1}, and {UNKNOWN} for items of no "
                f"class; got {wrong[0].item()}: number the classes from 0, or raise num_classes"
            )
        return labels
