"""Conformal rejection with a rate for each class."""

from __future__ import annotations

import numpy as np

from .cells import Cell, cells_of
from .conformal import Conformal


class ClassConformal(Conformal, name="class_conformal"):
    """τ_c = the conformal τ of the calibration scores whose nearest class is c (Mondrian conformal, Vovk et al. 2005).

    Of known items whose **nearest** class is c at most α is rejected, for each c: a class whose items lie wider apart
    is not rejected more often than another. Classes with fewer than 1/α − 1 items are pooled with one another, and the
    promise to them is one over the pool; where even the pool is too small, it is that over all items. (Which
    classes are pooled depends on the calibration items: the promise is exact for a pool that was fixed before.)

    A class needs a few hundred items to keep its rate closely: with 19 at α = 0.05 the true rate may be 15 %, and τ is
    the largest score. With fewer, `conformal` rejects more of the unknown at the same overall rate.
    """

    by_class = True

    def _fit(self, known: np.ndarray, unknown: np.ndarray, classes: np.ndarray | None) -> None:
        present = np.unique(classes).tolist()
        cells, pooled = cells_of(known, classes, present, self.alpha, floor=known, bound=False)
        pool = cells[pooled[0]] if pooled else None
        self._calibration = known
        self._groups = [len(cell.scores) for c, cell in cells.items() if c not in pooled]
        if pool is not None:
            self._groups.append(len(pool.scores) if pool.floor is None else len(known))
        # A class that is nobody's nearest is one of the small ones.
        self._take(pool or Cell(known), cells, pooled)
