"""The rule for the names of classes, and their canonical form, which every door uses.

Canonical is Unicode's composed form (NFC): a Mac writes 'ä' in two characters and others write it in one, and nobody
chose either. Everything else that cannot be seen is refused rather than removed, for a person typed or copied it: a
name is then what it looks like, and no two classes look the same. Marks stay where a script needs them: joiners in
Persian, Hindi, Sinhala and emoji, variation selectors behind emoji and ideographs.

Letters that resemble one another (Latin a and Cyrillic а, ﬁ and fi) are different letters.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable

from . import UNKNOWN
from .errors import OsmlError

LONGEST = 500
"""Characters of a name. In UTF-8 they fit into a row of a PostgreSQL index."""
UNKNOWN_LABELS = (str(UNKNOWN), "unknown")
"""Labels of items of unknown classes, in any case."""

# Default_Ignorable_Code_Point of the Unicode standard, and the anchors of annotations.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f"
    "\ufeff\uffa0\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
_BLANKS = re.compile("[\\s\u2800]+")  # U+2800 is the blank of braille
_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")  # control characters, surrogates, separators of lines and paragraphs
_ZWNJ, _ZWJ = "\u200c", "\u200d"
_JOINING = {"ARABIC", "SYRIAC", "MANDAIC", "MONGOLIAN", "NKO", "PHAGS-PA", "ADLAM", "HANIFI", "KHMER"}
_VARYING = {"CJK", "MONGOLIAN", "PHAGS-PA", "MYANMAR"}
_VARIATION = re.compile("[\u180b-\u180f\ufe00-\ufe0d\U000e0100-\U000e01ef]")
_SYMBOLS_TOO = ("‼", "⁉", "〰", "〽", "ℹ")
_FLAG = re.compile("🏴[\U000e0020-\U000e007e]*$")  # of England, say: letters that cannot be seen, and an end


def canonical(text: str) -> str:
    """The composed form of any text: for names that are read or looked up, and may be older than the rule."""
    return str(unicodedata.normalize("NFC", text))


def class_name(text: str) -> str:
    """The canonical form of what a class may be called.

    Raises:
        OsmlError: for what is no text, is empty, has blanks at its ends, control characters, half characters or marks
            that cannot be seen; for '.', '..' and more than 500 characters; and for '-1' and 'unknown' in any case,
            which are labels of what is unknown.
    """
    name = _label(text)
    if is_unknown_label(name):
        raise OsmlError(f"a class cannot be named {shown(name)}: that is the label of what is unknown; rename it")
    return name


def class_names(texts: Iterable[str]) -> tuple[str, ...]:
    """The canonical form of each; OsmlError as in `class_name`, and for two names that look alike."""
    return _all(texts, class_name)


def item_labels(texts: Iterable[str]) -> tuple[str, ...]:
    """Check labels of items, which may be of unknown classes: '-1', 'unknown'."""
    return _all(texts, _label)


def further_names(texts: Iterable[str], there: Iterable[str]) -> tuple[str, ...]:
    """The canonical form of each name of a class that is `there`, whatever an older release let it be called, or of a
    new one; OsmlError as in `class_names`, and for a new name that looks like one of `there`."""
    there = set(there)
    names = tuple(
        canonical(text) if isinstance(text, str) and canonical(text) in there else class_name(text) for text in texts
    )
    check_apart(class_names(set(names) - there), there)
    return names


def is_unknown_label(name: str) -> bool:
    """True for the labels of items of unknown classes."""
    return name.casefold() in UNKNOWN_LABELS


def check_apart(names: Iterable[str], others: Iterable[str]) -> None:
    """Raise `OsmlError` where one of `names` is none of `others` and looks like one of them. All are canonical."""
    others = set(others)
    of_look = None
    for name in set(names) - others:
        of_look = of_look or {look(other): other for other in others}
        if look(name) in of_look:
            raise _alike(name, of_look[look(name)])


def look(name: str) -> str:
    """A name without its invisible marks and with single spaces for blanks: names of one look cannot be told apart."""
    seen = _BLANKS.sub(" ", name)
    return seen if name.isascii() else canonical(_INVISIBLE.sub("", seen))


def shown(name: str) -> str:
    """A name in quotes for a message of one line: what cannot be seen is escaped, and a long name is cut."""
    short = name if len(name) <= 80 else f"{name[:79]}…"
    escaped = (c if c.isprintable() and not _INVISIBLE.match(c) else c.encode("unicode_escape").decode() for c in short)
    return f"'{''.join(escaped)}'"


def _all(texts: Iterable[str], rule: Callable[[str], str]) -> tuple[str, ...]:
    texts = tuple(texts)
    names = {text: rule(text) for text in dict.fromkeys(t if isinstance(t, str) else rule(t) for t in texts)}
    of_look: dict[str, str] = {}
    for name in names.values():
        if of_look.setdefault(look(name), name) != name:
            raise _alike(name, of_look[look(name)])
    return tuple(names[text] for text in texts)


def _alike(name: str, other: str) -> OsmlError:
    both = f"class names {shown(name)} and {shown(other)}"
    return OsmlError(f"{both} look alike: expected one name for one class; rename the one or the other")


def _label(text: str) -> str:
    if not isinstance(text, str):
        hint = f": write '{text}'" if isinstance(text, int) and not isinstance(text, bool) else ""
        raise OsmlError(f"the name of a class is text; got {shown(repr(text))[1:-1]}{hint}")
    name = canonical(text)
    if problem := _problem(name):
        raise OsmlError(f"class name {shown(name)}: {problem}; rename the class")
    return name


def _problem(name: str) -> str | None:
    if not _BLANKS.sub("", name):
        return "expected some text, since a class needs a name"
    if _BLANKS.match(name[0]) or _BLANKS.match(name[-1]):
        return "expected a name without blanks at its ends"
    if len(name) > LONGEST:
        return f"expected at most {LONGEST} characters, got {len(name)}"
    if name in (".", ".."):
        return "expected a name that is no step of a path"
    if name.isascii() and name.isprintable():
        return None
    for place, c in enumerate(name):
        if _is_no_text(c):
            return f"expected UTF-8 text without control characters, got U+{ord(c):04X}"
        if _INVISIBLE.match(c) and not _is_needed(c, name[:place], name[place + 1 :]):
            mark = f"U+{ord(c):04X} ({unicodedata.name(c, 'unnamed')})"
            return f"expected no marks that cannot be seen, got {mark} as character {place + 1}"
    return None


def _is_no_text(c: str) -> bool:
    """Controls, half characters, separators of lines, the sign of what could not be decoded, and noncharacters."""
    noncharacter = ord(c) & 0xFFFE == 0xFFFE or "\ufdd0" <= c <= "\ufdef"
    return unicodedata.category(c) in _NO_TEXT or c == "\ufffd" or noncharacter


def _is_needed(mark: str, head: str, tail: str) -> bool:
    """True for an invisible mark to which a script, or an emoji, gives a meaning between `head` and `tail`."""
    before, after = head[-1:] or " ", tail[:1] or " "
    if mark in (_ZWNJ, _ZWJ):
        if mark == _ZWJ and _is_emoji(before) and _is_emoji(after):
            return True
        if mark == _ZWJ and not tail:
            return _is_virama(before)  # a Malayalam name may end in a chillu
        if any(_INVISIBLE.match(c) or _BLANKS.match(c) for c in (before, after)):
            return False
        return any(_is_virama(c) or _script(c) in _JOINING for c in (before, after))
    if mark in ("\ufe0e", "\ufe0f"):
        return _is_symbol(before) or before in _SYMBOLS_TOO or after == "\u20e3"
    if "\U000e0020" <= mark <= "\U000e007f":
        return _FLAG.search(head) is not None
    return bool(_VARIATION.match(mark)) and _script(before) in _VARYING


def _is_virama(c: str) -> bool:
    """True for the signs by which Indic scripts join consonants."""
    return unicodedata.combining(c) == 9


def _is_emoji(c: str) -> bool:
    """True for symbols, skin tones, and the selector that makes a symbol colored."""
    return c == "\ufe0f" or _is_symbol(c)


def _is_symbol(c: str) -> bool:
    # The range holds emoji that are newer than this Python.
    return "\U0001f000" <= c <= "\U0001faff" or unicodedata.category(c) in ("So", "Sm")


def _script(c: str) -> str:
    """The first word of a character's Unicode name."""
    return unicodedata.name(c, "").partition(" ")[0]
