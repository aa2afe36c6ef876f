"""The reference embeddings of all classes known so far."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .copies import new_items
from .errors import OsmlError, unknown_name
from .labels import HIGHEST
from .names import canonical, further_names
from .neighbors import NeighborIndex


class Neighbor(NamedTuple):
    """A reference near an item."""

    name: str
    distance: float


@dataclass(frozen=True)
class Gallery:
    """References `(R, D)` float32, their class ids `(R,)`, and the name of each id.

    Ids are stable: removing a class renumbers no other. A gallery never changes; `add` and `remove` answer with
    a new one, one version on, so that whoever searches the old one is not disturbed.
    """

    embeddings: Tensor
    labels: Tensor
    classes: Mapping[int, str]
    enrolled: Tensor
    """`(R,)` bool: references that were enrolled, on top of those of the training."""
    next_id: int
    """The id of the next new class: never one that was used before, so that nothing is taken for a forgotten class."""
    version: int = 0
    index: NeighborIndex | None = field(default=None, repr=False, compare=False)
    """Searches the references; a new one unless that of these very references is given."""

    def __post_init__(self):
        if self.index is None or self.index.references is not self.embeddings:
            object.__setattr__(self, "embeddings", self.embeddings.contiguous())
            object.__setattr__(self, "index", NeighborIndex(self.embeddings, self.labels))

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def class_names(self) -> list[str]:
        """Names in the order of their ids."""
        return [self.classes[i] for i in sorted(self.classes)]

    def id_of(self, name: str) -> int:
        """The id of a class, in whatever Unicode form it is named; OsmlError names the nearest right one."""
        wanted = canonical(str(name))
        for i, known in self.classes.items():
            if known == wanted:
                return i
        raise unknown_name("class", name, self.classes.values())

    def add(self, name: str, embeddings: Tensor) -> Gallery:
        """With examples `(M, D)` of a class, old or new."""
        return self.add_all({name: embeddings})

    def add_all(self, examples: Mapping[str, Tensor], copy_radius: float = 0.0) -> Gallery:
        """With examples `(M, D)` of several classes, in one step.

        An example within `copy_radius` of a reference of its class, or identical to one but for rounding, is a
        near-copy: it says nothing new and is left out. Examples are taken in their order, so that it makes no
        difference whether they come at once or one by one.

        Raises:
            OsmlError: for a new class of a name that no class may have, or that looks like another's.
        """
        named: dict[str, Tensor] = {}
        for name, new in zip(further_names(examples, self.classes.values()), examples.values(), strict=True):
            named[name] = torch.cat([named[name], new]) if name in named else new
        return self.restored(named, copy_radius)

    def restored(self, examples: Mapping[str, Tensor], copy_radius: float = 0.0) -> Gallery:
        """Add examples of canonical names that were checked when they were stored, by the rule of those days."""
        if not examples:
            return self
        ids, of_class = {name: i for i, name in self.classes.items()}, dict(self.classes)
        grown, labels, added = self, [self.labels], [self.embeddings]
        for name, embeddings in examples.items():
            references = self.embeddings[:0]
            if name in ids:
                references = self.embeddings[self.labels == ids[name]]
            else:
                ids[name] = grown._new_id(name)
                of_class[ids[name]] = name
                grown = replace(grown, classes=of_class, next_id=max(grown.next_id, ids[name] + 1))
            new = new_items(embeddings, references, copy_radius)
            labels.append(self.labels.new_full((len(new),), ids[name]))
            added.append(embeddings[new])
        labels, embeddings = torch.cat(labels), torch.cat(added)
        return replace(
            grown,
            embeddings=embeddings,
            labels=labels,
            index=self.index.moved(embeddings, labels, torch.arange(len(self))),
            enrolled=torch.cat([self.enrolled, torch.ones(len(labels) - len(self), dtype=torch.bool)]),
            version=self.version + 1,
        )

    def _new_id(self, name: str) -> int:
        """A new number among classes named by their ids keeps it, so that integer labels stay what they are."""
        numbers = all(str(i) == n for i, n in self.classes.items())
        if numbers and name.isdecimal() and self.next_id <= int(name) < 2**31:
            return int(name)
        if self.next_id > HIGHEST:
            raise OsmlError(f"class '{name}' gets no number: one class has the last, {HIGHEST}; number them from 0 on")
        return self.next_id

    def remove(self, name: str) -> Gallery:
        """Without a class and all its references."""
        label = self.id_of(name)
        if len(self.classes) == 2:
            raise OsmlError(f"'{name}' is one of the last two classes: a gallery needs at least two")
        classes = {i: n for i, n in self.classes.items() if i != label}
        return replace(self.keep(self.labels != label), classes=classes, version=self.version + 1)

    def keep(self, kept: Tensor) -> Gallery:
        """With these references only, bool `(R,)`; classes and version as they are."""
        embeddings, labels = self.embeddings[kept], self.labels[kept]
        rows = torch.where(kept, kept.cumsum(0) - 1, -1)
        index = self.index.moved(embeddings, labels, rows)
        return replace(self, embeddings=embeddings, labels=labels, enrolled=self.enrolled[kept], index=index)

    def neighbors(self, embeddings: Tensor, k: int) -> list[list[Neighbor]]:
        """The k nearest references of each item `(N, D)`, nearest first."""
        distances, indices = self.index.search(embeddings, k)
        names = [[self.classes[i] for i in row] for row in self.labels[indices].tolist()]
        return [
            [Neighbor(n, d) for n, d in zip(*row, strict=True)] for row in zip(names, distances.tolist(), strict=True)
        ]

    def folds(self, n: int) -> Tensor:
        """The part `(R,)` in 0..n-1 of each enrolled example; −1 for references that stay in all of them.

        Each class is dealt out in turn, copies of one example together, so that whatever part is taken out, examples of
        its classes remain, and none of them is a copy of one that is scored.
        """
        fold = torch.full((len(self),), -1)
        for label in self.labels[self.enrolled].unique():
            of_class = (self.labels == label).nonzero()[:, 0]
            copy = self.embeddings[of_class].unique(dim=0, return_inverse=True)[1]
            # Numbered as they come, not as they sort: neighbours in a sorted order are alike.
            first = torch.full((int(copy.max()) + 1,), len(copy)).scatter_reduce(
                0, copy, torch.arange(len(copy)), "amin"
            )
            distinct = first.argsort().argsort()[copy]
            if len(first) > 1:
                enrolled = self.enrolled[of_class]
                fold[of_class[enrolled]] = distinct[enrolled] % min(n, len(first))
        return fold
