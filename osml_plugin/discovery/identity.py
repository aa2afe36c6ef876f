"""Groups keep their ids and names from run to run, and new items join them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.sparse import csr_matrix

from ..errors import OsmlError
from .constraints import spread


@dataclass(frozen=True)
class Identities:
    """What one run leaves to the next: the groups' ids, by item, and their names. It never changes."""

    of_item: Mapping[str, int] = field(default_factory=dict)
    """The id of the group of each item, by the item's key (a file's path, say); items in no group are not in it."""
    names: Mapping[int, str] = field(default_factory=dict)
    """The names that a person gave, by id."""
    next_id: int = 0
    """The id of the next new group: never one that was used before."""

    def __post_init__(self):
        for group in [*self.of_item.values(), *self.names, self.next_id]:
            if not isinstance(group, int) or isinstance(group, bool) or not 0 <= group <= self.next_id:
                raise OsmlError(f"ids must be whole numbers from 0 to below next_id {self.next_id}; got {group!r}")
        if self.next_id in self.names or self.next_id in self.of_item.values():
            raise OsmlError(f"id {self.next_id} is in use, so next_id must be higher: give the record as it was saved")

    def named(self, group: int, name: str) -> Identities:
        """The record in which the group has this name."""
        if group not in self.of_item.values():
            raise OsmlError(f"there is no group {group} to be named: choose from {sorted(set(self.of_item.values()))}")
        return replace(self, names={**self.names, int(group): name})

    def to_dict(self) -> dict[str, Any]:
        """For JSON: `items` {key: id}, `names` {id as text: name}, `next_id`."""
        names = {str(group): name for group, name in self.names.items()}
        return {"items": dict(self.of_item), "names": names, "next_id": self.next_id}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Identities:
        """The inverse of `to_dict`.

        Raises:
            OsmlError: A key is missing, or an id is none.
        """
        try:
            names = {int(group): str(name) for group, name in state["names"].items()}
            return cls(dict(state["items"].items()), names, state["next_id"])
        except OsmlError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise OsmlError(
                f"this is no record of groups ({error!r}): it must have items, names and next_id, as to_dict gives them"
            ) from error


@dataclass(frozen=True)
class Update:
    """The groups of a run under their ids, and what became of the old ones."""

    identities: Identities
    """To keep for the next run."""
    ids: np.ndarray
    """`(G,)` int64: the id of each group."""
    splits: Mapping[int, tuple[int, ...]]
    """Old id → the ids, in rising order, of the groups mostly made of its items, where these are not itself."""
    merges: Mapping[int, tuple[int, ...]]
    """Id → the old ids, in rising order, of the groups most of whose items are in it, where these are not itself."""
    new: tuple[int, ...]
    """Ids of groups that come mostly from no old one."""
    gone: tuple[int, ...]
    """Old ids that were not carried over, and are in neither `splits` nor `merges`."""

    def sentences(self) -> list[str]:
        """What happened, a line each: '3 was split into 3 and 17'."""
        lines = [
            f"{old} was split into {_listed(parts)}" if len(parts) > 1 else f"part of {old} became {parts[0]}"
            for old, parts in self.splits.items()
        ]
        for group, olds in self.merges.items():
            others = [old for old in olds if old != group]
            lines.append(f"{_listed(others)} {'was' if len(others) == 1 else 'were'} merged into {group}")
        return lines + [f"{group} is new" for group in self.new] + [f"{old} is gone" for old in self.gone]

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `splits` and `merges` as lists of [id, [ids]]."""
        return {
            "identities": self.identities.to_dict(),
            "ids": self.ids.tolist(),
            "splits": [[old, list(parts)] for old, parts in self.splits.items()],
            "merges": [[group, list(olds)] for group, olds in self.merges.items()],
            "new": list(self.new),
            "gone": list(self.gone),
        }


def identify(previous: Identities, keys: Sequence[str], groups: np.ndarray) -> Update:
    """Give the groups of a new run the ids and names of the old ones that they continue; new ids to the others.

    As in the accuracy of discovery (Vaze et al. 2022, "Generalized Category Discovery"), an old and a new group
    are as much the same as they have items in common, and no id is given twice. But a person reads a name as said of
    the whole group, so the best match is not enough: an id is carried over only if more than half of its items that
    are in some group now are in that group, and no other old group has more items there. Then no small part of a class
    that fell apart keeps its name, nor does a small class rename a large one that swallows it. An old group has at
    most one such heir, so taking for each group the largest of those it is heir to *is* the best assignment
    (Hungarian), in linear time. Of equals the one with a name comes first, then the lower id.

    Args:
        previous: What the last run left; `Identities()` before the first.
        keys: N different item keys, of whatever items there are now.
        groups: `(N,)` integers: the group of each, 0 … G−1, each used; −1: in none.

    Raises:
        OsmlError: A key that is there twice, not as many groups as keys, or a number of a group that is skipped.
    """
    groups = _checked_groups(keys, groups)
    n_groups = int(groups.max(initial=-1)) + 1
    olds = np.array([previous.of_item.get(key, -1) for key in keys], dtype=np.int64)
    old, group, common, most_of_old, most_of_group = _common(olds, groups)

    ids = np.full(n_groups, -1)
    claims = np.flatnonzero(most_of_old)
    largest = np.zeros(n_groups, dtype=np.int64)
    np.maximum.at(largest, group, common)
    claims = claims[common[claims] == largest[group[claims]]]
    unnamed = np.array([int(i) not in previous.names for i in old[claims]], dtype=bool)
    for i in claims[np.lexsort((old[claims], unnamed))][::-1]:  # the first of equals is written last
        ids[group[i]] = old[i]
    fresh = np.flatnonzero(ids < 0)
    ids[fresh] = previous.next_id + np.arange(len(fresh))

    merges: dict[int, list[int]] = {}
    splits: dict[int, list[int]] = {}
    for i in np.flatnonzero(most_of_old):
        merges.setdefault(int(ids[group[i]]), []).append(int(old[i]))
    for i in np.flatnonzero(most_of_group | (old == ids[group])):
        splits.setdefault(int(old[i]), []).append(int(ids[group[i]]))
    merges = {i: tuple(sorted(olds)) for i, olds in sorted(merges.items()) if olds != [i]}
    splits = {i: tuple(sorted(parts)) for i, parts in sorted(splits.items()) if parts != [i]}
    told = {*merges, *(part for parts in splits.values() for part in parts)}
    ended = {*splits, *(i for olds in merges.values() for i in olds), *ids.tolist()}
    inside = np.flatnonzero(groups >= 0)
    return Update(
        identities=Identities(
            {keys[i]: int(ids[groups[i]]) for i in inside},
            {int(i): previous.names[int(i)] for i in np.sort(ids) if int(i) in previous.names},
            previous.next_id + len(fresh),
        ),
        ids=ids,
        splits=splits,
        merges=merges,
        new=tuple(int(i) for i in ids[fresh] if int(i) not in told),
        gone=tuple(sorted(set(previous.of_item.values()) - ended)),
    )


def join(
    previous: Identities, keys: Sequence[str], graph: csr_matrix, of_item: np.ndarray, groups: np.ndarray
) -> Identities:
    """Place new items into the groups that there are, or found new ones; no item that has a group changes it.

    `groups` is any grouping of the old and the new items together, at the granularity of the last run, say. A group
    in which no old one is at home founds a new one. Where one is, its new items join that, and where several are, each
    joins the one whose items are nearest along the graph (see `spread`). An old group is at home where more than half
    of its items are, and in any group more than half of which it is: a few strays do not claim a new class.

    Args:
        previous: What the last run left.
        keys: N different item keys: those of the new items, and of the old ones that are to attract them.
        graph: `(M, M)` symmetric weights of links between nodes.
        of_item: `(N,)` the node of each item; copies share one.
        groups: `(N,)` integers: the group of each item, 0 … G−1, each used; −1: in none, and stays so if it is new.

    Raises:
        OsmlError: As `identify`.
    """
    groups = _checked_groups(keys, groups)
    ids = np.array([previous.of_item.get(key, -1) for key in keys], dtype=np.int64)
    old, group, common, most_of_old, most_of_group = _common(ids, groups)
    home = most_of_old | most_of_group
    n_groups = int(groups.max(initial=-1)) + 1
    found = np.full(n_groups, -1)
    by_size = np.flatnonzero(home)[np.argsort(common[home], kind="stable")]
    found[group[by_size]] = old[by_size]  # the largest is written last

    inside = np.flatnonzero(groups >= 0)
    at_home = csr_matrix((home, (group, old)), shape=(n_groups, previous.next_id + 1))
    seeds = np.where(np.asarray(at_home[groups[inside], ids[inside]]).ravel(), ids[inside], -1)
    nodes = graph.shape[0]
    key, unit = np.unique(groups[inside] * nodes + of_item[inside], return_inverse=True)
    of_unit = np.full(len(key), -1)
    np.maximum.at(of_unit, unit, seeds)
    member = graph[key % nodes][:, key % nodes].tocoo()
    own = key[member.row] // nodes == key[member.col] // nodes
    links = csr_matrix((member.data[own], (member.row[own], member.col[own])), shape=member.shape)
    placed = spread(links, of_unit)[unit]

    new = ids[inside] < 0
    placed = np.where(placed >= 0, placed, found[groups[inside]])
    fresh, number = np.unique(groups[inside][new & (placed < 0)], return_inverse=True)
    placed[new & (placed < 0)] = previous.next_id + number
    of_new = {keys[i]: int(group) for i, group in zip(inside[new], placed[new], strict=True)}
    return Identities({**previous.of_item, **of_new}, previous.names, previous.next_id + len(fresh))


def _checked_groups(keys: Sequence[str], groups: np.ndarray) -> np.ndarray:
    """`groups` as int64 `(N,)`, one for each of the keys."""
    groups = np.asarray(groups)
    if groups.shape != (len(keys),) or (groups.size and groups.dtype.kind not in "iu"):
        raise OsmlError(
            f"{len(keys)} keys need as many groups, integers, but there are {groups.dtype} of shape {groups.shape}"
        )
    if len(set(keys)) < len(keys):
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        raise OsmlError(f"key {twice!r} is there twice: give each item a key of its own")
    groups = groups.astype(np.int64)
    if groups.min(initial=-1) < -1 or not np.isin(np.arange(groups.max(initial=-1) + 1), groups).all():
        raise OsmlError("groups skip a number: they count from 0, each with at least one item, and -1 is none")
    return groups


def _common(olds: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, ...]:
    """Each old id and group with items in common, by id and group: the id, the group, how many, whether they are more
    than half of the id's items that are in some group, and whether they are more than half of the group's items."""
    both = (olds >= 0) & (groups >= 0)
    (old, group), common = np.unique(np.stack([olds, groups])[:, both], axis=1, return_counts=True)
    of_old = np.bincount(olds[both])[old] if both.any() else common
    of_group = np.bincount(groups[groups >= 0])[group] if both.any() else common
    return old, group, common, 2 * common > of_old, 2 * common > of_group


def _listed(ids: Sequence[int]) -> str:
    """'3', '3 and 17', '3, 17 and 18'."""
    *first, last = map(str, ids)
    return f"{', '.join(first)} and {last}" if first else last
