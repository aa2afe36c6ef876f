"""The searched space of a sweep: a training configuration in which domains stand for values."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from numbers import Integral, Real
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from osml_plugin import detectors, optimizers, pml, thresholds, trunks
from osml_plugin.config import Config, make_config
from osml_plugin.errors import OsmlError, unknown_name
from osml_plugin.selection import candidates

from .default_spaces import default_space, loss_space
from .results import Dimension, Value

if TYPE_CHECKING:
    import optuna

_DOMAINS = ("choice", "uniform", "loguniform", "int", "logint")
_PARTS = ("loss", "miner", "sampler", "optimizer", "loss_optimizer", "detector", "threshold", "model.trunk")
_INNER = ("detector", "threshold")
_NOT_SEARCHED = {"seed": ("seed",), "alpha": ("alpha",), "data.fractions": ("data", "fractions")}
# What a checkpoint still fits when it changes.
_MOVABLE = ("loss", "miner", "optimizer", "loss_optimizer")
_EXAMPLE = "loss.margin: {uniform: [5, 45]}"
_POINTS = 9
"""What stands for a continuous domain where all of it is enumerated."""


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; whole ones, or evenly spread on a log scale."""

    low: float
    high: float
    whole: bool
    log: bool

    @property
    def to_try(self) -> tuple[Value, ...]:
        """What must build: the ends, and a broken number between them where whole ones were not asked for."""
        return (self.low, self.high) if self.whole else (self.low, self.high, self.low + 0.38 * (self.high - self.low))

    def holds(self, value: Any) -> bool:
        number = isinstance(value, Integral if self.whole else Real) and not isinstance(value, bool)
        return number and self.low <= value <= self.high

    def points(self) -> list[float]:
        spread = (np.geomspace if self.log else np.linspace)(self.low, self.high, _POINTS)
        return sorted({self._within(x) for x in spread.tolist()})

    def sample(self, rng: Random) -> float:
        if self.whole and not self.log:
            return rng.randint(self.low, self.high)
        if self.log:
            return self._within(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return self._within(rng.uniform(self.low, self.high))

    def step(self, value: float, rng: Random) -> float:
        """A step up or down; a whole number takes at least one to the next."""
        up, share = rng.random() < 0.5, 0.2 * (self.high - self.low)
        moved = value * (1.25 if up else 0.8) if self.log else value + (share if up else -share)
        return self._within((math.ceil if up else math.floor)(moved) if self.whole else moved)

    def _within(self, value: float) -> float:
        return min(max(round(value) if self.whole else value, self.low), self.high)


@dataclass(frozen=True)
class Choice:
    """Options by label; an option may hold domains itself."""

    options: dict[Value, Any]

    @property
    def to_try(self) -> tuple[Value, ...]:
        return tuple(self.options)

    def holds(self, value: Any) -> bool:
        return value in self.options


# A configuration with domains in it is nested dictionaries of plain values, ranges and choices.
Node = Any


class Space:
    """What a sweep searches.

    A *domain* is a mapping with the one key `choice: [option, …]`, `uniform: [low, high]`, `loguniform`, `int` or
    `logint`. It may stand for any value of the training configuration, for a whole part, and inside of an option of a
    choice, where it is conditional. A parameter is named by its path; below a choice the label of the option is a step
    of the path: `{"loss": "ArcFaceLoss", "loss.ArcFaceLoss.margin": 20.0}`.

    Args:
        values: plain nested values, as YAML gives them; None = the default space of the loss of `base`.
        base: the configuration that holds where the space says nothing.
        levels: 2 = `detector` and `threshold` are no dimensions, but enumerated as `inner_detectors` and
            `inner_thresholds`; 1 = they are dimensions like any other.

    Raises:
        OsmlError: for a parameter that does not exist, a malformed domain, a bound or an option that the configuration
            or the part refuses, nothing to search, and what is not the space's to say (seed, alpha, data.fractions).
    """

    dimensions: list[Dimension]
    """Of the outer search."""
    movable: list[str]
    """Parameters that `explore` may change: numbers of the loss, the miner and the optimizers that change the shape of
    no weights."""

    def __init__(self, values: Mapping[str, Any] | None, base: Config, *, levels: int = 2):
        values = _nested(default_space(base) if values is None else values)
        _refuse_the_sweeps_own(values)
        self._base = base.model_dump()
        tree = self._base | {key: _parse(value, self._base.get(key), key) for key, value in values.items()}
        self._inner = {key: tree[key] for key in _INNER if key in values and levels == 2}
        self._tree: dict[str, Node] = tree | {key: self._base[key] for key in self._inner}
        self._domains = {name: domain for name, domain, _ in _walk(self._tree)}
        self.dimensions = [_dimension(name, domain) for name, domain in self._domains.items()]
        self.movable = _check(tree, base)
        if not self.dimensions:
            only = " but detector and threshold, which every trial goes through by itself" if self._inner else ""
            raise OsmlError(f"space: there is nothing to search{only}: add a domain, such as {_EXAMPLE}")

    @property
    def inner_detectors(self) -> list[tuple[str, dict[str, Any]]] | None:
        """With two levels, every detector and combination of its parameters; None = the space names none."""
        if "detector" not in self._inner:
            return None
        found = [(part.pop("name"), part) for part in _all(self._inner["detector"])]
        return [each for name, args in found for each in (candidates() if name == "auto" else [(name, args)])]

    @property
    def inner_thresholds(self) -> list[tuple[str, dict[str, Any]]] | None:
        """With two levels, every threshold and combination of its parameters; None = the space names none."""
        if "threshold" not in self._inner:
            return None
        return [(part.pop("name"), part) for part in _all(self._inner["threshold"])]

    def suggest(self, trial: optuna.trial.Trial) -> None:
        """Draw the parameters of a trial, define-by-run: what the drawn options exclude is not asked for."""

        def draw(name: str, domain: Range | Choice) -> Value:
            if isinstance(domain, Choice):
                return trial.suggest_categorical(name, list(domain.options))
            suggest = trial.suggest_int if domain.whole else trial.suggest_float
            return suggest(name, domain.low, domain.high, log=domain.log)

        _fill(self._tree, draw)

    def config(self, params: Mapping[str, Value]) -> Config:
        """The training configuration of a trial.

        Raises:
            OsmlError: for a parameter that is unknown, missing, outside its domain, or excluded by the others.
        """
        used = set()

        def draw(name: str, domain: Range | Choice) -> Value:
            if name not in params:
                raise OsmlError(f"parameter '{name}' of the space is missing: expected {_described(domain)}")
            if not domain.holds(params[name]):
                raise OsmlError(f"parameter '{name}' = {params[name]!r} is outside the space: {_described(domain)}")
            used.add(name)
            return params[name]

        values = _fill(self._tree, draw)
        for name in params:
            if name not in self._domains:
                raise unknown_name("parameter of the space", name, self._domains)
            if name not in used:
                raise OsmlError(f"parameter '{name}' belongs to an option that was not chosen: leave it out")
        return make_config(values)

    def explore(self, params: Mapping[str, Value], rng: Random) -> dict[str, Value]:
        """The step of population-based training: each movable parameter × 0.8 or × 1.25 (log), ± 20 % of its range
        (linear), within its bounds; or, with probability 0.25, drawn anew. The others stay."""
        moved = dict(params)
        for name in self.movable:
            if name in moved:
                domain = self._domains[name]
                moved[name] = domain.sample(rng) if rng.random() < 0.25 else domain.step(moved[name], rng)
        return moved

    def defaults(self) -> dict[str, Value] | None:
        """The parameters that give the base configuration; None where it does not lie in the space."""
        found: dict[str, Value] = {}
        return found if _locate(self._tree, self._base, "", "", found) else None


# --- from plain values to a tree


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`optimizer.lr: …` as `optimizer: {lr: …}`."""
    if not isinstance(values, Mapping):
        raise OsmlError(f"space: expected keys and values, such as {_EXAMPLE}; got {values!r}")
    found: dict[str, Any] = {}
    for key in sorted(values, key=lambda key: str(key).count(".")):
        below, (*path, last) = found, str(key).split(".")
        for step in path:
            if not isinstance(below.get(step, {}), Mapping):
                raise OsmlError(f"space: '{key}' cannot be searched beside '{step}: {below[step]}': nest it")
            below[step] = below = dict(below.get(step, {}))
        if last in below:
            raise OsmlError(f"space: '{key}' is there twice")
        below[last] = values[key]
    return found


def _refuse_the_sweeps_own(values: Mapping[str, Any]) -> None:
    for key, path in _NOT_SEARCHED.items():
        inner: Any = values
        for step in path:
            inner = inner.get(step) if isinstance(inner, Mapping) else None
        if inner is not None:
            raise OsmlError(f"space: '{key}' cannot be searched, trials could not be compared: set it under 'config'")


def _parse(value: Any, base: Any, key: str) -> Node:
    """`value` as a tree; what a mapping without a name leaves out is taken from `base`."""
    if isinstance(value, str) and key in _PARTS:
        value = {"name": value} | (loss_space(value) if key == "loss" else {})
    if isinstance(value, list | tuple):
        _refuse_domains_in(value, key)
    if not isinstance(value, Mapping):
        return value
    domain = _domain_of(value, base, key)
    if domain == "choice":
        return _choice(value["choice"], base, key)
    if domain is not None:
        return _range(domain, value[domain], key)
    if key in _PARTS and base is None and "name" not in value:
        raise OsmlError(f"space: the configuration has no {key} whose arguments could be searched: add its name")
    if isinstance(value.get("name"), Mapping):
        raise OsmlError(f"space: the name of '{key}' cannot be a domain: write {key}: {{choice: [{{name: …}}, …]}}")
    kept = dict(base) if isinstance(base, Mapping) and "name" not in value else {}
    return kept | {k: _parse(v, kept.get(k), f"{key}.{k}") for k, v in value.items()}


def _domain_of(value: Mapping[str, Any], base: Any, key: str) -> str | None:
    for name in _DOMAINS:
        if name in value and len(value) > 1:
            other = next(k for k in value if k != name)
            raise OsmlError(f"space: '{key}' has '{other}' beside '{name}': a domain has one key, such as {_EXAMPLE}")
        if name in value:
            return name
    if len(value) == 1 and not (isinstance(base, Mapping) and set(value) <= set(base)):
        [(name, content)] = value.items()
        bounds_of_a_value = isinstance(content, list | tuple) and "." in key and key not in _PARTS
        if bounds_of_a_value or get_close_matches(str(name), _DOMAINS, cutoff=0.7):
            raise unknown_name(f"domain of '{key}'", name, _DOMAINS)
    return None


def _choice(options: Any, base: Any, key: str) -> Choice:
    if not isinstance(options, list | tuple) or not options:
        raise OsmlError(f"space: '{key}' has choice: {options!r}; expected a list of options")
    found: dict[Value, Node] = {}
    seen: Counter[Value] = Counter()
    for option in options:
        node = _parse(option, base, key)
        label = _label(node, option, key)
        seen[label] += 1
        if seen[label] > 1 and not isinstance(node, dict):
            raise OsmlError(f"space: '{key}' has the option {option!r} twice")
        found[label if seen[label] == 1 else f"{label}#{seen[label]}"] = node
    return Choice(found)


def _label(node: Node, option: Any, key: str) -> Value:
    if isinstance(node, dict) and isinstance(node.get("name"), str):
        return node["name"]
    if isinstance(node, list | tuple):
        return json.dumps(node, default=str)
    if node is None or isinstance(node, str | int) or (isinstance(node, float) and math.isfinite(node)):
        return node
    raise OsmlError(f"space: an option of '{key}' is {option!r}; expected a value, a list, or a part with a name")


def _range(domain: str, bounds: Any, key: str) -> Range:
    whole, log = domain.endswith("int"), domain.startswith("log")
    kind = Integral if whole else Real
    right = isinstance(bounds, list | tuple) and len(bounds) == 2
    right = right and all(isinstance(b, kind) and not isinstance(b, bool) and math.isfinite(b) for b in bounds)
    if not right or bounds[0] >= bounds[1] or (log and bounds[0] <= 0):
        numbers = f"{'whole ' if whole else ''}numbers{' above 0' if log else ''}"
        raise OsmlError(f"space: '{key}' has {domain}: {bounds!r}; expected two {numbers}, [low, high] with low < high")
    low, high = (int(b) if whole else float(b) for b in bounds)
    return Range(low, high, whole, log)


def _refuse_domains_in(value: Any, key: str) -> None:
    if isinstance(value, Mapping) and any(name in value for name in _DOMAINS):
        raise OsmlError(f"space: '{key}' has a domain inside a list: offer whole lists as the options of a choice")
    if isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            _refuse_domains_in(each, key)


# --- what there is in a tree


def _walk(node: Node, name: str = "", under: tuple[tuple[str, Value], ...] = ()) -> Iterator[tuple]:
    """Every domain below: its flat name, the domain, and the choices that it depends on."""
    if isinstance(node, Range | Choice):
        yield name, node, under
    if isinstance(node, Choice):
        for label, option in node.options.items():
            yield from _walk(option, f"{name}.{label}", (*under, (name, label)))
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _walk(value, f"{name}.{key}" if name else key, under)


def _fill(node: Node, draw: Callable[[str, Range | Choice], Value], name: str = "") -> Any:
    """The plain values of the tree where `draw(name, domain)` says what each domain is: a number, or a label."""
    if isinstance(node, Range):
        return draw(name, node)
    if isinstance(node, Choice):
        label = draw(name, node)
        return _fill(node.options[label], draw, f"{name}.{label}")
    if isinstance(node, dict):
        return {key: _fill(value, draw, f"{name}.{key}" if name else key) for key, value in node.items()}
    return node


def _all(node: Node) -> list[Any]:
    """The plain values of every combination, with points for what is continuous."""
    if isinstance(node, Range):
        return node.points()
    if isinstance(node, Choice):
        return [value for option in node.options.values() for value in _all(option)]
    if isinstance(node, dict):
        return [dict(zip(node, values, strict=True)) for values in product(*map(_all, node.values()))]
    return [node]


def _locate(node: Node, value: Any, key: str, name: str, found: dict[str, Value]) -> bool:
    """Whether the tree can give `value`; `found` gets the parameters that do.

    `key` is the place in the configuration, `name` that of the parameter.
    """
    if isinstance(node, Choice):
        for label, option in node.options.items():
            below: dict[str, Value] = {}
            if _locate(option, value, key, f"{name}.{label}", below):
                found.update({name: label}, **below)
                return True
        return False
    if isinstance(node, Range):
        if node.holds(value):
            found[name] = value if node.whole else float(value)
        return name in found
    if not isinstance(node, dict) or not isinstance(value, dict):
        return node == value
    if key in _PARTS and node["name"] == value["name"]:
        defaults = _argument_defaults(key, node["name"])
        node, value = defaults | node, defaults | value
    path, own = (f"{key}." if key else ""), (f"{name}." if name else "")
    return node.keys() == value.keys() and all(_locate(node[k], value[k], path + k, own + k, found) for k in node)


def _argument_defaults(key: str, name: str) -> dict[str, Any]:
    if key in ("loss", "miner", "sampler"):
        parameters = pml.settable(key, name)
    elif key in ("optimizer", "loss_optimizer"):
        parameters = inspect.signature(getattr(torch.optim, name)).parameters
    elif key in _INNER and name != "auto":
        registry = {"detector": detectors.registry, "threshold": thresholds.registry}[key]
        parameters = inspect.signature(registry.get(name)).parameters
    else:
        parameters = {}
    return {k: p.default for k, p in parameters.items() if p.default is not p.empty}


def _dimension(name: str, domain: Range | Choice) -> Dimension:
    if isinstance(domain, Choice):
        return Dimension(name, "choice", choices=tuple(domain.options))
    return Dimension(name, "int" if domain.whole else "float", low=domain.low, high=domain.high, log=domain.log)


def _described(domain: Range | Choice) -> str:
    if isinstance(domain, Choice):
        return "one of " + ", ".join(map(str, domain.options))
    return f"a {'whole ' if domain.whole else ''}number from {domain.low} to {domain.high}"


# --- whether it can be built


def _check(tree: Node, base: Config) -> list[str]:
    """Build the configuration and its parts for each option and each bound, the other domains at their first; the
    names of the parameters that `Space.movable` describes."""
    _build(tree, base, {})
    movable = []
    for name, domain, under in _walk(tree):
        shapes = []
        for value in domain.to_try:
            loss = _build(tree, base, dict(under) | {name: value}, f"with {name} = {value}: ")
            shapes.append({key: tensor.shape for key, tensor in loss.state_dict().items()})
        if isinstance(domain, Range) and name.partition(".")[0] in _MOVABLE and all(s == shapes[0] for s in shapes):
            movable.append(name)
    return movable


def _build(tree: Node, base: Config, drawn: Mapping[str, Value], where: str = "") -> nn.Module:
    """The loss of the configuration with these parameters; OsmlError if that, or one of its parts, cannot be."""
    try:
        config = make_config(_fill(tree, lambda name, domain: drawn.get(name, domain.to_try[0])))
        for part in (config.optimizer, config.loss_optimizer):
            if part is not None:
                optimizers.build(part.name, part.args, [nn.Parameter(torch.zeros(1, 1))])
        if config.miner is not None:
            pml.build("miner", config.miner.name, config.miner.args)
        trunk = config.model.trunk
        if trunk != base.model.trunk and trunk.name != "auto" and ":" not in trunk.name:
            with torch.device("meta"):  # shapes without memory
                trunks.build(trunk.name, trunk.args, channels=3)
        return pml.build("loss", config.loss.name, config.loss.args, num_classes=4, embedding_size=8)
    except OsmlError as error:
        raise OsmlError(f"space: {where}{error}") from error
