"""Names of registered models, and their addresses."""

from __future__ import annotations

import re
import unicodedata

from .errors import OsmlError

_SPECIAL = set("/:@%?#;\\'\"`")
"""What an address or a query of MLflow takes for something else."""
_LONGEST = 200
_REGISTERED = re.compile(r"models:/([^/]+?)(?:@([^/@]+)|/(\d+))")


def model_name(name: str) -> str:
    """The name of a registered model, in Unicode's composed form (NFC).

    Raises:
        OsmlError: for a name that `models:/NAME@alias` cannot carry: it could be registered, and never be read.
    """
    name = unicodedata.normalize("NFC", name)
    odd = sorted(c for c in set(name) if c in _SPECIAL or unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp"))
    if odd:
        problem = f"{odd[0]!r} has another meaning in models:/NAME@alias"
    elif not name.strip():
        problem = "it is empty"
    elif name != name.strip() or set(name) == {"."} or set(name) == {".", " "}:
        problem = "blanks at its ends and dots alone are no name"
    elif len(name) > _LONGEST:
        problem = f"it has {len(name)} characters, and {_LONGEST} are possible"
    else:
        return name
    raise OsmlError(
        f"{name[:60]!r} cannot name a registered model: {problem}; expected letters, digits, '-', '_' and '.', such as "
        "birds-2"
    )


def registered(uri: str) -> tuple[str, str | None, str | None] | None:
    """Name, alias and version in `models:/NAME@alias` or `models:/NAME/7`; None for an address of another kind.

    Raises:
        OsmlError: for a name that no registered model can have.
    """
    named = _REGISTERED.fullmatch(uri)
    return named and (model_name(named[1]), named[2], named[3])
