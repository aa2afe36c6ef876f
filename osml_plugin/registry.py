"""Classes found by name: `class KNN(Detector, name="knn")` registers itself, `create("knn", k=5)` makes one."""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, ClassVar, Generic, TypeVar

from .errors import OsmlError, unknown_name

T = TypeVar("T")


def check_arguments(kind: str, name: str, given: Iterable[str], allowed: Iterable[str]) -> None:
    """Raise the error for the first argument of `name` that it does not take."""
    allowed = list(allowed)
    for argument in given:
        if argument not in allowed:
            if not allowed:
                raise OsmlError(f"{kind} '{name}' takes no arguments, but was given '{argument}'")
            raise unknown_name(f"argument of {kind} '{name}'", argument, allowed)


def checked_number(what: str, value: Any) -> float:
    """A finite number, as a float; a bool is none."""
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise OsmlError(f"{what} must be a finite number; got {value!r}")
    return float(value)


def checked_positive(what: str, value: Any) -> float:
    """A finite number above 0, as a float."""
    if checked_number(what, value) <= 0:
        raise OsmlError(f"{what} must be above 0; got {value!r}")
    return float(value)


def checked_not_negative(what: str, value: Any) -> float:
    """A finite number of at least 0, as a float."""
    if checked_number(what, value) < 0:
        raise OsmlError(f"{what} must be at least 0; got {value!r}")
    return float(value)


def checked_count(what: str, value: Any) -> int:
    """A whole number of at least 1; a bool is none."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise OsmlError(f"{what} must be a whole number of at least 1; got {value!r}")
    return int(value)


@contextmanager
def refusing(problem: str, advice: str | None = None) -> Iterator[None]:
    """Whatever the code of others raises inside becomes one line of OsmlError: `problem (its reason): advice`.

    Memory that runs out is no matter of arguments, and stays what it is.
    """
    try:
        yield
    except (OsmlError, MemoryError):
        raise
    except Exception as error:
        torch = sys.modules.get("torch")  # where nothing has imported it, its error cannot have been raised
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise OsmlError(f"{problem} ({reason})" + (f": {advice}" if advice else "")) from error


class Named:
    """A base class whose subclasses enter its `registry` under the name that they are declared with."""

    registry: ClassVar[Registry]
    name: ClassVar[str]

    def __init_subclass__(cls, name: str | None = None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:
            cls.name = name
            cls.registry.add(name, cls)

    @property
    def params(self) -> dict[str, Any]:
        """The keyword-only arguments that make this object again: `create(it.name, **it.params)`. A subclass keeps each
        argument under its own name."""
        return {p: getattr(self, p) for p in self.registry.parameters(self.name)}


class Registry(Generic[T]):
    """Named classes of one kind."""

    def __init__(self, kind: str):
        self.kind = kind
        self._classes: dict[str, type[T]] = {}

    def add(self, name: str, cls: type[T]) -> None:
        if name in self._classes:
            raise RuntimeError(f"two classes for {self.kind} '{name}': {self._classes[name]} and {cls}")
        self._classes[name] = cls

    def names(self) -> list[str]:
        return sorted(self._classes)

    def get(self, name: str) -> type[T]:
        if name not in self._classes:
            raise unknown_name(self.kind, name, self._classes)
        return self._classes[name]

    def parameters(self, name: str) -> list[str]:
        parameters = inspect.signature(self.get(name)).parameters.values()
        return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

    def create(self, name: str, **params) -> T:
        cls = self.get(name)
        check_arguments(self.kind, name, params, self.parameters(name))
        with refusing(f"{self.kind} '{name}' refuses its arguments"):
            return cls(**params)
