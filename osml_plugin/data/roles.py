"""Which classes are known (`Split`), and which item does what (data roles). Nothing here that trains or
chooses sees a test item: `TrainingRoles` has no test, and `test_indices` is a function of its own."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, astuple, dataclass
from difflib import get_close_matches
from hashlib import blake2b
from pathlib import Path

import numpy as np

from .. import UNKNOWN
from ..errors import OsmlError, unknown_name
from ..names import canonical, check_apart, is_unknown_label, shown
from .items import ROLES, Items

TRAIN, CALIBRATION, VALIDATION, TEST = range(4)  # in the order of ROLES and of the fields of Fractions
UNDRAWN = LEFT_OUT = len(ROLES)
UNKNOWN_CLASS = str(UNKNOWN)  # the label of items of unknown classes


@dataclass(frozen=True)
class Split:
    """The classes that a model is given (known), those held out to choose it by (pseudo-unknown), and those
    that only the test may show (unknown). Classes of the data that it does not name take no part. Names are kept in
    their canonical form."""

    known: tuple[str, ...]
    pseudo_unknown: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, names in asdict(self).items():
            object.__setattr__(self, key, tuple(canonical(str(name)) for name in names))

    @classmethod
    def load(cls, path: str | Path) -> Split:
        """Read JSON `{"known": [...], "pseudo_unknown": [...], "unknown": [...]}`; raises `OsmlError`."""
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))
        except OsmlError as error:
            raise OsmlError(f"split '{path}': {error}") from error
        except OSError as error:
            raise OsmlError(f"cannot read the split '{path}': {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise OsmlError(f"the split '{path}' is not JSON: {error}") from error

    @classmethod
    def from_dict(cls, split: Mapping) -> Split:
        """Integers are taken as their decimal string; only `known` is required. Raises `OsmlError`."""
        if not isinstance(split, Mapping):
            raise OsmlError(f"a split is an object with lists of classes, not {type(split).__name__}")
        for key in split:
            if key not in cls.__dataclass_fields__:
                raise unknown_name("key of a split", key, cls.__dataclass_fields__)
        if "known" not in split:
            raise OsmlError("a split needs 'known', a list of class names")
        for key, names in split.items():
            if not isinstance(names, list | tuple) or not all(type(name) in (str, int) for name in names):
                raise OsmlError(f"'{key}' of a split must be a list of class names, not {names!r}")
        return cls(**{key: tuple(str(name) for name in names) for key, names in split.items()})

    def to_dict(self) -> dict[str, list[str]]:
        return {key: list(names) for key, names in asdict(self).items()}

    def check(self, class_names: Collection[str]) -> None:
        """Raise `OsmlError` unless the split fits data with these classes."""
        if len(set(self.known)) < 2:
            raise OsmlError(f"a split needs at least 2 known classes, not {len(set(self.known))}")
        for key in ("known", "pseudo_unknown"):
            if label := next(filter(is_unknown_label, getattr(self, key)), None):
                raise OsmlError(
                    f"the split names class '{label}' in '{key}', but that is the label of items of unknown "
                    "classes; move it to 'unknown'"
                )
        named = [(name, key) for key, names in asdict(self).items() for name in names]
        for name, count in Counter(name for name, _ in named).items():
            if count > 1:
                keys = [key for other, key in named if other == name]
                where = f"twice in '{keys[0]}'" if len(set(keys)) == 1 else f"in '{keys[0]}' and in '{keys[1]}'"
                raise OsmlError(f"the split names class {shown(name)} {where}; a class has one place")
        present = set(class_names)
        absent = [(name, key) for name, key in named if name not in present]
        if absent:
            name, key = absent[0]
            near = get_close_matches(name, sorted(present), n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the data has {len(present)} classes"
            more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
            raise OsmlError(f"class {shown(name)} in '{key}' of the split is not in the data{more}; {hint}")


def draw_split(class_names: Iterable[str], *, n_known: int | None = None, seed: int = 0) -> Split:
    """A random split: `n_known` classes (half of them by default, at least 2) are known; of the others 40 %
    (at least 1 of 2 or more) are pseudo-unknown and the rest unknown. The label '-1' is not drawn: it is
    unknown. The order of `class_names` has no influence. Raises `OsmlError` if `n_known` is below 2 or above the
    number of classes, and for a class 'unknown'."""
    given = set(class_names)
    if word := next(filter(is_unknown_label, sorted(given - {UNKNOWN_CLASS})), None):
        raise OsmlError(
            f"the data hold a class '{word}', but that is the label of what is unknown: rename it, to "
            f"'{UNKNOWN_CLASS}' where its items are of unknown classes; or name the classes in a split"
        )
    names = sorted(given - {UNKNOWN_CLASS})
    if n_known is None:
        n_known = max(2, round(0.5 * len(names)))
    if not 2 <= n_known <= len(names):
        raise OsmlError(f"cannot draw {n_known} known of {len(names)} classes; expected 2 to {len(names)} known")
    others = len(names) - n_known
    n_pseudo = max(round(0.4 * others), 1 if others >= 2 else 0)
    drawn = sorted(names, key=lambda name: _lot(seed, name.encode()))
    cuts = (slice(n_known), slice(n_known, n_known + n_pseudo), slice(n_known + n_pseudo, None))
    known, pseudo_unknown, unknown = (drawn[cut] for cut in cuts)
    unknown = [*unknown, *given & {UNKNOWN_CLASS}]
    return Split(*(tuple(sorted(names)) for names in (known, pseudo_unknown, unknown)))


@dataclass(frozen=True)
class Fractions:
    """How a known class is cut when the source declares no roles; they sum to 1. Where it declares a test,
    the first three are rescaled to sum to 1 over its 'train' items."""

    train: float = 0.55
    calibration: float = 0.15
    validation: float = 0.10
    test: float = 0.20

    def __post_init__(self) -> None:
        shares = astuple(self)
        if min(shares) < 0 or self.train <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise OsmlError(f"fractions {shares}: expected train > 0, none below 0, and a sum of 1")


@dataclass(frozen=True, eq=False)
class TrainingRoles:
    """Sorted item indices of the roles that training and choosing may see: train (known), calibration
    (known), validation (known + pseudo-unknown). There is no test here, on purpose.

    Of a set of near-copies one item calibrates or validates. All of its items may train a network; the one of them in
    `references` stands for the set in the gallery. `copies` are the items of these sets that take no part: nobody may
    test on them either.
    """

    train: np.ndarray
    calibration: np.ndarray
    validation: np.ndarray
    references: np.ndarray
    copies: np.ndarray

    @property
    def used(self) -> np.ndarray:
        """Indices of the items that take part, role by role."""
        return np.concatenate([self.train, self.calibration, self.validation])

    @property
    def seen(self) -> np.ndarray:
        """Sorted indices of the items that no test may use."""
        return np.sort(np.append(self.used, self.copies))


def training_roles(
    items: Items,
    split: Split,
    *,
    sets: np.ndarray | None = None,
    fractions: Fractions = Fractions(),
    seed: int = 0,
) -> TrainingRoles:
    """Deal the items out to the roles that training may see.

    The sets of near-copies of each known class are put in an order drawn from (seed, content), so that file names and
    their order have no influence, and cut by `fractions`. What rounding leaves of one class goes to the next, so that
    each role has the classes in their proportions; 'train' gets at least one item of each class. All items of a set,
    of whatever class, share a role. Pseudo-unknown classes go to validation whole, but for their declared test items.
    Unknown classes, and classes that the split does not name, go nowhere.

    Roles that the source declares: its 'train' items are cut over train, calibration and validation; if it
    declares any 'calibration' or 'validation' item, all its roles are used as they are, but that of a set that is
    declared to have several only the items of the first of train, calibration and validation take part.

    Args:
        sets: `(N,)` near-copies have one number; None = items of identical content.

    Raises `OsmlError` for items without labels, a split that does not fit, and a known class with too few items.
    """
    split.check(set(_labels(items)))
    fingerprints = items.fingerprints()
    sets = np.unique(fingerprints if sets is None else sets, return_inverse=True)[1]
    declared = None if items.roles is None else np.array([ROLES.index(role) for role in items.roles])
    as_declared = declared is not None and bool(np.isin(declared, (CALIBRATION, VALIDATION)).any())
    shares = np.array(astuple(fractions))
    if declared is not None:
        shares[TEST] = 0
    of_class = _indices_by_class(items, declared)
    lots = _lots(fingerprints, sets, seed)
    role_of_set = np.full(sets.max() + 1, UNDRAWN)
    known = sorted(split.known, key=lambda name: _lot(seed, name.encode()))
    for name in split.pseudo_unknown:
        role_of_set[sets[of_class[name]]] = VALIDATION
    carried = np.zeros(len(ROLES))
    for name in known:
        if as_declared:
            np.minimum.at(role_of_set, sets[of_class[name]], declared[of_class[name]])
        else:
            free = np.unique(sets[of_class[name]])
            free = free[role_of_set[free] == UNDRAWN]
            counts, carried = _counts(len(free), shares, carried)
            role_of_set[free[np.argsort(lots[free])]] = np.repeat(range(len(ROLES)), counts)
    role = np.full(len(items), TEST)
    for name in known:
        role[of_class[name]] = role_of_set[sets[of_class[name]]]
    if as_declared:
        role[(role < TEST) & (role != declared)] = LEFT_OUT
    for name in split.pseudo_unknown:
        validates = role_of_set[sets[of_class[name]]] == VALIDATION
        role[of_class[name]] = np.where(validates, VALIDATION, LEFT_OUT)
    _check_classes(items, sets, role, {name: of_class[name] for name in split.known}, as_declared)
    return _one_of_each_set(items, sets, role, fingerprints)


def _check_classes(
    items: Items, sets: np.ndarray, role: np.ndarray, of_class: Mapping[str, np.ndarray], as_declared: bool
) -> None:
    """Raise `OsmlError` for a known class without training items, for one of a single item, and where nothing is left
    to calibrate with."""
    for name, indices in of_class.items():
        enough = CALIBRATION in role[indices] if as_declared else len(np.unique(sets[indices])) > 1
        if not enough or TRAIN not in role[indices]:
            raise _too_few(items, sets, name, indices, as_declared)
    if not any((role[indices] == CALIBRATION).any() for indices in of_class.values()):
        raise _too_few(items, sets, *min(of_class.items(), key=lambda pair: len(pair[1])), as_declared)


def _one_of_each_set(items: Items, sets: np.ndarray, role: np.ndarray, fingerprints: np.ndarray) -> TrainingRoles:
    """Roles in which each set of near-copies counts once a class: by its item of the lowest fingerprint."""
    order = np.argsort(fingerprints, kind="stable")
    classes = np.unique(np.array(items.labels), return_inverse=True)[1]
    pair = (sets * (int(classes.max()) + 1) + classes)[order]
    first = np.zeros(len(items), dtype=bool)
    first[order[np.unique(pair, return_index=True)[1]]] = True
    train, calibration, validation = (role == r for r in (TRAIN, CALIBRATION, VALIDATION))
    copies = ((calibration | validation) & ~first) | (role == LEFT_OUT)
    of_role = (train, calibration & first, validation & first, train & first, copies)
    return TrainingRoles(*map(np.flatnonzero, of_role))


def _lots(fingerprints: np.ndarray, sets: np.ndarray, seed: int) -> np.ndarray:
    """Rank `(S,)` of each set in an order drawn from the seed and the lowest fingerprint of its items."""
    lowest = np.full(sets.max() + 1, np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(lowest, sets, fingerprints)
    drawn = sorted(range(len(lowest)), key=lambda s: _lot(seed, int(lowest[s]).to_bytes(8, "little")))
    ranks = np.empty(len(lowest), dtype=np.int64)
    ranks[drawn] = np.arange(len(lowest))
    return ranks


def test_indices(
    items: Items,
    split_known: Collection[str],
    held_out: Collection[str],
    *,
    seen: Collection[int] | np.ndarray = (),
) -> np.ndarray:
    """Sorted indices of the items to test on: known and unknown classes, never one of `held_out`, the
    pseudo-unknown classes, and where the source declares roles, its 'test' items only. Never an item whose
    fingerprint is in `seen`, the uint64 fingerprints of what the model was trained, calibrated, validated or
    enrolled on: copies of these in a declared test set are left out too.

    Raises `OsmlError` for items without labels, without any class of `split_known`, or with a class that looks like
    one of the split and is spelled otherwise (it would silently count as unknown).
    """
    classes = set(_labels(items))
    check_apart(classes, {*split_known, *held_out})
    if not classes & set(split_known):
        raise OsmlError(
            f"none of the {len(split_known)} known classes, such as '{min(split_known, default='')}', is in the "
            f"data, whose classes are such as '{min(classes)}'; expected the same names as in training"
        )
    held_out = set(held_out)
    to_test = np.array([label not in held_out for label in items.labels])
    if items.roles is not None:
        to_test &= np.array([role == "test" for role in items.roles])
    indices = np.flatnonzero(to_test)
    # Of a large source with roles, only the test files are read.
    return indices[~np.isin(items.select(indices).fingerprints(), np.asarray(seen, dtype=np.uint64))]


test_indices.__test__ = False  # pytest would take it for a test


def _labels(items: Items) -> tuple[str, ...]:
    if not items.labels:
        raise OsmlError("the items have no labels; expected a class name for each")
    return items.labels


def _indices_by_class(items: Items, declared: np.ndarray | None) -> dict[str, np.ndarray]:
    """The items of each class, without those declared as test."""
    indices = defaultdict(list)
    for i, label in enumerate(_labels(items)):
        if declared is None or declared[i] != TEST:
            indices[label].append(i)
    return defaultdict(lambda: np.empty(0, np.int64), {name: np.array(i) for name, i in indices.items()})


def _lot(seed: int, content: bytes) -> bytes:
    return blake2b(content, key=str(seed).encode(), digest_size=8).digest()


def _counts(n: int, shares: np.ndarray, carried: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """n items over the roles, and what rounding still owes to each of them: their shares, rounded down, and the rest
    to those that are owed most; train gets at least 1. `carried` is what earlier classes owe."""
    carried = np.zeros(len(shares)) if carried is None else carried
    quota = np.round(n * shares / shares.sum(), 9)  # equal remainders are to be equal
    counts = np.floor(quota).astype(np.int64)
    owed = np.where(quota > counts, np.round(quota - counts + carried, 9), -np.inf)  # what came out even stays so
    rest = np.argsort(-owed, kind="stable")[: n - counts.sum()]
    counts[rest] += 1
    if counts[TRAIN] == 0 and n:
        counts[np.argmax(counts)] -= 1
        counts[TRAIN] = 1
    return counts, carried + quota - counts


def _too_few(items: Items, sets: np.ndarray, name: str, indices: np.ndarray, as_declared: bool) -> OsmlError:
    if as_declared:
        return OsmlError(
            f"the roles declared for class '{name}' leave it without 'train' or without 'calibration' items; a "
            "known class needs both; declare them, or declare only 'train' and 'test' to have 'train' cut"
        )
    kind = "image" if items.embeddings is None else "embedding"
    n = len(np.unique(sets[indices]))
    others = set(np.array(_labels(items))[np.isin(sets, sets[indices])].tolist()) - {name}
    if n > 1 and others:
        return OsmlError(
            f"the {kind}s of class '{name}' lie in other classes as well, such as '{min(others)}', and too few are "
            "left to train on and to calibrate with; keep each in one class"
        )
    distinct = "distinct " if n < len(indices) else ""
    outside = " outside 'test'" if items.roles is not None else ""
    return OsmlError(
        f"class '{name}' has {n} {distinct}{kind}{'' if n == 1 else 's'}{outside}; a known class needs at least 2: "
        f"one to train on and one to calibrate with; add {kind}s or leave the class out with --split"
    )
