"""Exact Euclidean nearest references: faiss on the CPU, torch on a GPU, approximate (HNSW) beyond a size."""

from __future__ import annotations

import faiss
import torch
from torch import Tensor

EXACT_UP_TO = 100_000
"""References beyond which the CPU search is approximate (HNSW), so that it grows sub-linearly."""

MAX_GATHERED = 2**25
"""Numbers gathered at once for the distances: 128 MiB."""


class NeighborIndex:
    """An index over references `(R, D)` float32; a cache, never the truth.

    Candidates come from faiss (or a blocked matrix product on a GPU); their distances are computed again
    directly, because ‖x‖² − 2x·y + ‖y‖² loses what matters most, small distances.
    """

    def __init__(self, references: Tensor, exact_up_to: int = EXACT_UP_TO):
        self.references = references.contiguous()
        self._faiss = None if references.is_cuda else self._build(exact_up_to)

    def _build(self, exact_up_to: int) -> faiss.Index:
        width = self.references.shape[1]
        if len(self.references) <= exact_up_to:
            index = faiss.IndexFlatL2(width)
        else:
            index = faiss.IndexHNSWFlat(width, 32)
            index.hnsw.efConstruction = 80
        index.add(self.references.numpy())
        return index

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `min(k, R)` nearest references of each query `(N, D)`: distances and indices `(N, k)`, nearest first."""
        k = min(k, len(self.references))
        if isinstance(self._faiss, faiss.IndexFlat) and 32 * k > len(self.references):
            return self._search_all(queries, k)
        if self._faiss is None:
            candidates = torch.cdist(queries, self.references).topk(k, largest=False).indices
        else:
            if isinstance(self._faiss, faiss.IndexHNSW):
                self._faiss.hnsw.efSearch = max(64, 2 * k)
            candidates = torch.from_numpy(self._faiss.search(queries.contiguous().numpy(), k)[1])
        rows = max(1, MAX_GATHERED // (max(k, 1) * queries.shape[1]))
        parts = zip(queries.split(rows), candidates.split(rows), strict=True)
        distances = torch.cat([(q[:, None, :] - self.references[c]).norm(dim=2) for q, c in parts])
        distances, order = distances.sort(dim=1, stable=True)
        return distances, candidates.gather(1, order)

    def _search_all(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same where a good part of all references is wanted: distances to all of them in double precision, which
        loses nothing that single precision shows but where it is almost zero; these few are computed directly."""
        references = self.references.double()
        squares = references.pow(2).sum(1)
        found, indices = [], []
        for q in queries.split(max(1, MAX_GATHERED // (2 * len(references)))):
            wide = q.double()
            own = wide.pow(2).sum(1, keepdim=True)
            square, index = torch.addmm(own + squares, wide, references.T, alpha=-2).topk(k, largest=False)
            row, column = (square < 1e-6 * own).nonzero(as_tuple=True)
            if len(row):
                direct = (wide[row] - references[index[row, column]]).pow(2).sum(1)
                square[row, column] = direct
            distances, order = square.clamp_min(0).sqrt().float().sort(dim=1, stable=True)
            found.append(distances)
            indices.append(index.gather(1, order))
        return torch.cat(found), torch.cat(indices)
