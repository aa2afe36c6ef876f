"""Nearest references, Euclidean: exact up to a size and on a GPU; beyond it only those in the nearest cells."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from functools import cached_property

import faiss
import numpy as np
import torch
from faiss.contrib.ivf_tools import add_preassigned
from torch import Tensor
from tqdm import tqdm

EXACT_UP_TO = 100_000
"""References up to which the CPU compares with all of them."""

REBUILT_AFTER = 20_000
"""Once more than so many have been added, the cells are made anew; until then all of these are compared."""

RECALL = 0.995
"""The share of the true nearest references that the cells searched must hold, on trial queries."""

TRIED = (10, 100, 1000)
"""For how many nearest references that is tried; in between it is interpolated."""

MAX_GATHERED = 2**25
"""Numbers gathered at once for the distances: 128 MiB."""


class NeighborIndex:
    """An index over references `(R, D)` float32; a cache, never the truth. It is made when it is first searched.

    It never changes; `extended`, `moved` and `without` answer with another one that shares what was costly to make.

    Candidates come from faiss (or a blocked matrix product on a GPU); their distances are computed again
    directly, because ‖x‖² − 2x·y + ‖y‖² loses what matters most, small distances.

    Args:
        labels: `(R,)` class of each reference. Where there are many, they are cut along the classes into cells, in
            seconds; without labels a graph (HNSW) is made, in minutes.
    """

    def __init__(self, references: Tensor, labels: Tensor | None = None, *, exact_up_to: int | None = None):
        self.references = references.contiguous()
        self.present = torch.ones(len(references), dtype=torch.bool, device=references.device)
        """`(R,)` which references are searched."""
        self._labels = labels
        self._exact_up_to = EXACT_UP_TO if exact_up_to is None else exact_up_to
        self._n_present = len(references)
        self._room: Room | None = None

    @staticmethod
    def of_copy(references: Tensor, labels: Tensor) -> NeighborIndex:
        """The index over a copy of references, which can be extended without another."""
        room = Room(references)
        index = NeighborIndex(room.references, labels)
        index._room = room
        return index

    def extended(self, more: Tensor, labels: Tensor) -> NeighborIndex:
        """The index over these references and more `(M, D)` after them, of all of which `labels` are; what it takes is
        the time to write the more."""
        room, n = self._room, len(self.references)
        references = room.extended(n, more) if room else None
        if references is None:
            room = Room(self.references, len(more))
            references = room.extended(n, more)
        index = NeighborIndex(references, labels, exact_up_to=self._exact_up_to)
        index._room = room
        index.present[:n] = self.present
        index._n_present = self._n_present + len(more)
        if self._made and self._parts[0] is not None:
            cells, row_of, outside = self._parts
            new = torch.arange(n, len(references))
            index._share(cells, row_of, torch.cat([outside, new]))
        return index

    def moved(self, references: Tensor, labels: Tensor, rows: Tensor) -> NeighborIndex:
        """The index over other references, most of them the same: row r of this one is `rows[r]` there, −1 if gone."""
        index = NeighborIndex(references, labels, exact_up_to=self._exact_up_to)
        if self._made and self._parts[0] is not None:
            cells, row_of, outside = self._parts
            row_of, outside = torch.where(row_of >= 0, rows[row_of], -1), rows[outside]
            new = torch.ones_like(index.present)
            new[rows[rows >= 0]] = False
            index._share(cells, row_of, torch.cat([outside[outside >= 0], new.nonzero()[:, 0]]))
        return index

    def without(self, left_out: Tensor) -> NeighborIndex:
        """The index that never finds some of the references (bool `(R,)`); the others keep their rows."""
        index = NeighborIndex(self.references, self._labels, exact_up_to=self._exact_up_to)
        index._room = self._room
        index.present = self.present & ~left_out
        index._n_present = int(index.present.sum())
        if self._made and self._parts[0] is not None:
            cells, row_of, outside = self._parts
            row_of = torch.where((row_of < 0) | left_out[row_of], -1, row_of)
            index._share(cells, row_of, outside[~left_out[outside]])
        return index

    @property
    def _made(self) -> bool:
        return "_parts" in self.__dict__

    @property
    def _exact(self) -> bool:
        return self.references.is_cuda or self._n_present <= self._exact_up_to

    def _share(self, cells: Cells | Flat, row_of: Tensor, outside: Tensor) -> None:
        """Use cells that were made of nearly the same references; all of them, where they are compared one by one."""
        same_kind = isinstance(cells, Flat) == self._exact and (not self._exact or bool((row_of >= 0).all()))
        if same_kind and len(outside) <= REBUILT_AFTER and 2 * (self._n_present - len(outside)) >= len(row_of):
            self.__dict__["_parts"] = cells, row_of, outside

    @cached_property
    def _parts(self) -> tuple[Cells | Flat | None, Tensor, Tensor]:
        """The cells, the row of each reference that they were made of (−1: not searched), and the rows outside them."""
        rows = self.present.nonzero()[:, 0]
        if self._exact and not self.references.is_cuda:
            return Flat(_rows_of(self.references, rows)), rows, rows[:0]
        if self.references.is_cuda or self._labels is None:
            return None, rows[:0], rows
        return Cells(_rows_of(self.references, rows), self._labels[rows]), rows, rows[:0]

    @cached_property
    def _outside(self) -> tuple[Tensor, faiss.Index | None]:
        """The references outside the cells, and the index over them."""
        references = _rows_of(self.references, self._parts[2])
        if references.is_cuda:
            return references, None
        width = references.shape[1]
        if len(references) <= self._exact_up_to:
            index = faiss.IndexFlatL2(width)
        else:
            index = faiss.IndexHNSWFlat(width, 32)
            index.hnsw.efConstruction = 80
        index.add(references.numpy())
        return references, index

    @cached_property
    def _all(self) -> tuple[Tensor, Tensor]:
        """The rows of all references that are searched, and these in double precision."""
        rows = self.present.nonzero()[:, 0]
        return rows, _rows_of(self.references, rows).double()

    @cached_property
    def _searched(self) -> tuple[int, faiss.IDSelector | None]:
        """How many references in the cells are searched, and which, where not all are."""
        searched = (self._parts[1] >= 0).numpy()
        if searched.all():
            return len(searched), None
        return int(searched.sum()), faiss.IDSelectorBitmap(np.packbits(searched, bitorder="little"))

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The `min(k, R)` nearest references of each query `(N, D)`: distances and rows `(N, k)`, nearest first."""
        cells, row_of, outside = self._parts
        k = min(k, self._n_present)
        if self._exact and 32 * k > self._n_present and not queries.is_cuda:
            distances, found = self._search_all(queries, k)
            return distances, self._all[0][found]
        candidates = []
        if len(outside):
            candidates.append(outside[self._search_outside(queries, min(k, len(outside)))])
        if cells is not None:
            among, which = self._searched
            # More than are asked for, because the cells hold their references rounded; and as if more were wanted where
            # some are left out, because they are in the nearest cells too.
            wanted = k * len(row_of) // max(among, 1)
            asked = min(k if self._exact else 2 * k + 8, among)
            candidates.append(row_of[cells.search(queries, wanted, asked, which)])
        candidates = torch.cat(candidates, dim=1) if len(candidates) > 1 else candidates[0]
        distances, order = _distances(queries, self.references, candidates).sort(dim=1, stable=True)
        return distances[:, :k], candidates.gather(1, order[:, :k])

    def _search_outside(self, queries: Tensor, k: int) -> Tensor:
        references, index = self._outside
        if index is None:
            return torch.cdist(queries, references).topk(k, largest=False).indices
        if isinstance(index, faiss.IndexHNSW):
            index.hnsw.efSearch = max(64, 2 * k)
        return torch.from_numpy(index.search(queries.contiguous().numpy(), k)[1])

    def _search_all(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The same where a good part of all references is wanted: distances to all of them in double precision, which
        loses nothing that single precision shows but where it is almost zero; these few are computed directly."""
        references = self._all[1]
        squares = references.pow(2).sum(1)
        found, indices = [], []
        for q in queries.split(max(1, MAX_GATHERED // (2 * max(1, len(references))))):
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


class Room:
    """Memory for references with some to spare, so that more can be written behind them without a copy of them all.

    Whoever holds the first n goes on seeing just these; only one can extend them, anyone else needs another room.
    """

    def __init__(self, references: Tensor, more: int = 0):
        self._used = len(references)
        size = self._used + more
        # On the CPU the system hands out no memory for what is not written to.
        size = size if references.is_cuda else size * 3 // 2 + 64
        self._memory = references.new_empty(size, references.shape[1])
        self.references = self._memory[: self._used]
        self.references.copy_(references)
        self._lock = threading.Lock()

    def extended(self, n: int, more: Tensor) -> Tensor | None:
        """The first n references and more `(M, D)` after them; None if the place is taken or too small."""
        with self._lock:
            if n != self._used or n + len(more) > len(self._memory):
                return None
            self._used += len(more)
        self._memory[n : self._used].copy_(more)
        return self._memory[: n + len(more)]


class Flat:
    """References `(R, D)` that are compared one by one."""

    def __init__(self, references: Tensor):
        self._index = faiss.IndexFlatL2(references.shape[1])
        self._index.add(references.numpy())

    def search(self, queries: Tensor, wanted: int, k: int, which: None) -> Tensor:
        return torch.from_numpy(self._index.search(queries.contiguous().numpy(), k)[1])


class Cells:
    """References `(R, D)` in about 4 √R cells of near ones, held in 8 bits a number (faiss: IVF, scalar quantizer).

    A cell is a class or, where one is large, a part of it by k-means; where classes are many and small, they are
    made by k-means alone. How many cells a search visits is found by trial: as many as hold `RECALL` of the true
    nearest references of items like the references, and of items between two of them, as unknown ones are.
    """

    def __init__(self, references: Tensor, labels: Tensor):
        x = references.numpy()
        n_cells = round(4 * math.sqrt(len(x)))
        cell_of, centres = np.empty(len(x), dtype=np.int64), []
        sizes = labels.unique(return_counts=True)[1]
        groups = [np.arange(len(x))]
        if len(sizes) <= 4 * n_cells:
            groups = np.split(labels.argsort().numpy(), sizes.cumsum(0)[:-1].numpy())
        with tqdm(total=len(x), desc="indexing references", delay=2, leave=False) as bar:
            for group in groups:
                for rows, centre in _divided(x, group, round(n_cells * len(group) / len(x))):
                    cell_of[rows] = len(centres)
                    centres.append(centre)
                    bar.update(len(rows))
        self._centres = np.stack(centres)
        self._coarse = faiss.IndexFlatL2(x.shape[1])
        self._coarse.add(self._centres)
        self._index = faiss.IndexIVFScalarQuantizer(
            self._coarse, x.shape[1], len(centres), faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_L2, False
        )
        # A few far references must not make the steps coarse for all others.
        self._index.sq.rangestat = faiss.ScalarQuantizer.RS_quantiles
        self._index.sq.rangestat_arg = 1e-3
        draw = np.random.default_rng(0)
        self._index.train(x[draw.integers(len(x), size=20_000)])
        add_preassigned(self._index, x, cell_of)
        self._trials = self._needed(references, cell_of, draw)

    def _needed(self, references: Tensor, cell_of: np.ndarray, draw: np.random.Generator) -> tuple[list, list]:
        """For some k, how many of the nearest cells hold `RECALL` of the k nearest references of trial queries."""
        some = torch.from_numpy(draw.integers(len(references), size=(2, 48)))
        queries = torch.cat([references[some[0]], (references[some[0]] + references[some[1]]) / 2])
        order = self._coarse.search(queries.numpy(), len(self._centres))[1]
        place = np.empty_like(order)
        np.put_along_axis(place, order, np.arange(len(self._centres))[None].repeat(len(order), axis=0), axis=1)
        sizes = [k for k in TRIED if k < len(references)]
        nearest = _nearest(queries, references, sizes[-1] + 1).numpy()
        # A reference is not its own neighbour: it goes last, and the last is left out.
        itself = nearest[:48] == some[0].numpy()[:, None]
        nearest[:48] = np.take_along_axis(nearest[:48], np.argsort(itself, axis=1, kind="stable"), axis=1)
        places = np.take_along_axis(place, cell_of[nearest], axis=1)
        needed = [np.quantile(places[:, :k].reshape(2, -1), RECALL, axis=1, method="higher").max() + 1 for k in sizes]
        return sizes, needed

    def _n_visited(self, k: int) -> int:
        sizes, needed = self._trials
        return math.ceil(np.interp(k, sizes, needed) * max(1, k / sizes[-1]))

    def search(self, queries: Tensor, wanted: int, k: int, which: faiss.IDSelector | None) -> Tensor:
        """The positions `(N, k)` of the nearest references among `which`, of which there must be k: of as many as are
        wanted `RECALL` are there."""
        queries, n_cells = queries.contiguous().numpy(), len(self._centres)
        visited = self._n_visited(wanted)
        found, short = np.full((len(queries), k), -1), np.arange(len(queries))
        while len(short):
            params = faiss.SearchParametersIVF(nprobe=min(visited, n_cells), sel=which)
            some, distances, rows = queries[short], np.empty((len(short), k), "f4"), np.empty((len(short), k), "i8")
            # Not `search`, which takes no parameters once something has imported faiss.contrib.torch_utils.
            pointer = faiss.swig_ptr
            self._index.search_c(len(some), pointer(some), k, pointer(distances), pointer(rows), params)
            found[short] = rows
            short = short[rows[:, -1] < 0] if visited < n_cells else short[:0]
            visited *= 4
        return torch.from_numpy(found)


def _divided(x: np.ndarray, rows: np.ndarray, n: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cut rows of `x` into about n cells: the rows and the centre of each. Many are made in two steps, because the time
    of k-means grows with their number."""
    part = x[rows]
    if n <= 1 or len(rows) <= 1:
        yield rows, part.mean(axis=0)
        return
    k = min(n if n <= 256 else round(math.sqrt(n)), len(rows))
    kmeans = faiss.Kmeans(x.shape[1], k, niter=6, max_points_per_centroid=64, min_points_per_centroid=1, seed=0)
    kmeans.train(part)
    nearest = kmeans.index.search(part, 1)[1][:, 0]
    members = np.split(nearest.argsort(kind="stable"), np.cumsum(np.bincount(nearest, minlength=k))[:-1])
    for of_one, centre in zip(members, kmeans.centroids, strict=True):
        if k == n and len(of_one):
            yield rows[of_one], centre
        elif len(of_one):
            yield from _divided(x, rows[of_one], round(n * len(of_one) / len(rows)))


def _nearest(queries: Tensor, references: Tensor, k: int) -> Tensor:
    """The rows `(N, k)` of the nearest references, compared with all; nearest first."""
    values, indices = [], []
    for start in range(0, len(references), 2**16):
        block = references[start : start + 2**16]
        value, index = torch.addmm(block.square().sum(dim=1), queries, block.T, alpha=-2).topk(
            min(k, len(block)), largest=False
        )
        values.append(value)
        indices.append(index + start)
    best = torch.cat(values, dim=1).topk(k, largest=False).indices
    return torch.cat(indices, dim=1).gather(1, best)


def _distances(queries: Tensor, references: Tensor, rows: Tensor) -> Tensor:
    """Distances `(N, K)` of each query to its own references, `rows` `(N, K)`, computed directly."""
    if references.is_cuda:
        size = max(1, MAX_GATHERED // (max(rows.shape[1], 1) * queries.shape[1]))
        parts = zip(queries.split(size), rows.split(size), strict=True)
        return torch.cat([(q[:, None, :] - references[r]).norm(dim=2) for q, r in parts])
    found = np.empty(rows.shape, "f4")
    arrays = [queries.contiguous().numpy(), references.numpy(), rows.contiguous().numpy()]
    faiss.fvec_L2sqr_by_idx(*map(faiss.swig_ptr, [found, *arrays]), queries.shape[1], *rows.shape)
    return torch.from_numpy(np.sqrt(found, out=found))


def _rows_of(references: Tensor, rows: Tensor) -> Tensor:
    """These rows; the references themselves, not a copy, where it is all of them."""
    return references if len(rows) == len(references) else references[rows]
