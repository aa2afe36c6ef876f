"""The one exception that a user's mistake raises, and the nearest right name for a wrong one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class OsmlError(ValueError):
    """Bad input. The message is one line: what was wrong, what was expected, what to do.

    The command line prints it and exits with status 2; from Python it is a `ValueError`.
    """


def unknown_name(kind: str, name: str, choices: Iterable[str]) -> OsmlError:
    """The error for a name that is none of `choices`: names the nearest right one and lists the others."""
    choices = sorted(choices)
    near = get_close_matches(str(name), choices, n=1, cutoff=0.5) or [
        c for c in choices if c.lower() == str(name).lower()
    ]
    hint = f"did you mean '{near[0]}'? " if near else ""
    return OsmlError(f"unknown {kind} '{name}': {hint}choices: {', '.join(choices)}")
