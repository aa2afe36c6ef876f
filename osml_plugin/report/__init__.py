"""The report of an evaluation: one self-contained HTML page. Needs the extra `osml-plugin[report]`."""

from __future__ import annotations

from ..errors import OsmlError

try:
    from .evaluation import add_evaluation, summary, write_report
    from .page import Page
except ModuleNotFoundError as error:
    library = (error.name or "").partition(".")[0]
    if library not in ("jinja2", "matplotlib"):
        raise
    raise OsmlError(f"a report needs {library}: pip install 'osml-plugin[report]'") from error

__all__ = ["Page", "add_evaluation", "summary", "write_report"]
