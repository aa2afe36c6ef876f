"""The rule for the names of classes."""

import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osml_plugin.errors import OsmlError
from osml_plugin.names import (
    canonical,
    check_apart,
    class_name,
    class_names,
    is_unknown_label,
    item_labels,
    look,
    shown,
)

ZWNJ, ZWJ = "\u200c", "\u200d"
TAKEN = {
    "Persian": f"می{ZWNJ}خواهم",
    "Persian behind Latin letters": f"DVD{ZWNJ}ها",
    "Hindi": f"क्{ZWJ}ष",
    "Bengali, explicit virama": f"ক্{ZWNJ}ষ",
    "Bengali, before the virama": f"র{ZWJ}্য",
    "Sinhala": f"ශ්{ZWJ}රී",
    "Malayalam, at the end": f"അവന്{ZWJ}",
    "Mongolian": "ᠮᠣᠩᠭᠣᠯ\u180b",
    "family": f"👨{ZWJ}👩{ZWJ}👧{ZWJ}👦",
    "skin tone": f"👩🏽{ZWJ}💻",
    "rainbow flag": f"🏳\ufe0f{ZWJ}🌈",
    "heart": "❤\ufe0f",
    "key": "1\ufe0f\u20e3",
    "information": "ℹ\ufe0f",
    "England": "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "emoji of a later Unicode": f"\U0001fae8\ufe0f{ZWJ}\U0001faea",
    "ideograph in a variant": "葛\U000e0100城",
    "ideographic space": "猫\u3000犬",
    "no-break space": "merle\u00a0noir",
    "Vietnamese": "Tiếng Việt",
    "presentation forms": "ﻛﺘﺎﺏ",
    "dotless i": "ı",
    "device": "CON",
    "address": "50% a?b#c&d=e+f",
    "path": "birds/robin",
    "dots": "...",
    "empty cell": "NA",
    "longest": "x" * 500,
    "quotes": 'it\'s "so" \\ <b>',
}
REFUSED = {
    "empty": "",
    "blank": " ",
    "blank before": " k",
    "blank behind": "k ",
    "ideographic space behind": "k\u3000",
    "braille's blank": "\u2800k",
    "control": "a\x00b",
    "line": "a\nb",
    "separator": "a\u2028b",
    "half a character": "a\ud800",
    "not decoded": "K\ufffdfer",
    "noncharacter": "a\uffff",
    "place": ".",
    "place above": "..",
    "too long": "x" * 501,
    "zero-width space": "a\u200bb",
    "soft hyphen": "a\u00adb",
    "word joiner": "a\u2060b",
    "byte order mark": "\ufeffa",
    "override": "a\u202eb",
    "mark of direction": "שלום\u200f",
    "grapheme joiner": "a\u034fb",
    "Hangul filler": "a\u3164",
    "joiner in Latin": f"a{ZWJ}b",
    "joiner at the start": f"{ZWNJ}ب",
    "joiner at the end": f"ب{ZWNJ}",
    "joiner at a blank": f"ب {ZWNJ}ب",
    "joiner alone": ZWJ,
    "joiners": f"ب{ZWNJ}{ZWNJ}ب",
    "joiner behind one emoji": f"👩{ZWJ}",
    "selector behind a letter": "a\ufe0f",
    "selector alone": "\ufe0f",
    "selectors": "❤\ufe0f\ufe0f",
    "tag without a flag": "a\U000e0067",
    "label": "-1",
    "word": "unknown",
    "word in capitals": "UNKNOWN",
    "word with a capital": "Unknown",
}
NO_TEXT = [5, 0, True, None, float("nan"), 1.5, b"k", ["k"], np.int64(3)]
TEXTS = st.one_of(
    st.text(max_size=8),
    st.text(
        st.sampled_from(f"aäa\u0308 \u3000ب{ZWNJ}{ZWJ}क्❤\ufe0f👩💻\u200b1\u20e3\ud800한\u1112\u1161\u11ab"), max_size=8
    ),
)


@pytest.mark.parametrize("name", TAKEN.values(), ids=TAKEN)
def test_a_name_that_a_script_needs_is_taken(name):
    assert class_name(name) == unicodedata.normalize("NFC", name)
    assert class_name(unicodedata.normalize("NFD", name)) == class_name(name)


@pytest.mark.parametrize("name", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_a_name_is_refused_in_one_printable_line(name):
    with pytest.raises(OsmlError) as error:
        class_name(name)
    assert str(error.value).isprintable() and len(str(error.value)) < 250


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
def test_what_is_no_text_is_refused(value):
    for rule in (class_name, lambda name: class_names(["a", name]), lambda name: item_labels([name])):
        with pytest.raises(OsmlError, match="the name of a class is text"):
            rule(value)


@pytest.mark.parametrize(
    "one, other",
    [
        ("Käfer", "Ka\u0308fer"),
        ("ổ", "o\u0302\u0309"),
        ("ệ", "e\u0302\u0323"),  # the marks in another order
        ("한", "\u1112\u1161\u11ab"),
        ("Å", "\u212b"),  # the sign of the ångström
        ("豈", "\uf900"),  # a compatibility ideograph
        ("क़", "\u0958"),
    ],
)
def test_two_forms_of_one_name_are_one(one, other):
    assert class_name(one) == class_name(other)
    assert class_names([one, other, one]) == (class_name(one),) * 3


@pytest.mark.parametrize(
    "one, other",
    [
        ("❤", "❤\ufe0f"),
        ("کار\u200cها", "کارها"),
        ("a b", "a\u00a0b"),
        ("a b", "a  b"),
        ("猫\u3000犬", "猫 犬"),
        ("葛", "葛\U000e0100"),
    ],
)
def test_two_names_that_look_alike_do_not_stand_together(one, other):
    for rule in (class_names, item_labels):
        with pytest.raises(OsmlError, match="look alike") as error:
            rule([one, "k", other])
        assert str(error.value).isprintable() and shown(class_name(one)) != shown(class_name(other))
    with pytest.raises(OsmlError, match="look alike"):
        check_apart(["m", one], ["k", other])
    check_apart([one], [one, other])  # one that is there may go on
    check_apart([one], ["k"])


def test_letters_that_resemble_one_another_are_others():
    assert len(set(class_names(["a", "а", "ﬁ", "fi", "ı", "i", "I", "Ａ", "A", "1", "１", "²"]))) == 12


def test_labels_of_items_may_be_of_unknown_classes():
    assert item_labels(["-1", "unknown", "UNKNOWN", "a"]) == ("-1", "unknown", "UNKNOWN", "a")
    assert [is_unknown_label(n) for n in ("-1", "Unknown", "1", "unknown 2")] == [True, True, False, False]


def test_names_come_back_as_plain_text():
    assert type(class_name(np.array(["otter"])[0])) is str


@given(TEXTS)
def test_the_rule_is_idempotent_and_raises_nothing_else(text):
    try:
        name = class_name(text)
    except OsmlError as error:
        assert len(str(error).splitlines()) == 1
        str(error).encode()
        with pytest.raises(OsmlError):
            class_name(canonical(text))
        return
    assert class_name(name) == name == canonical(text)
    assert look(look(name)) == look(name) and look(name)
    name.encode()


@given(TEXTS, TEXTS)
def test_names_of_one_look_are_one_or_refused(one, other):
    try:
        names = class_names([one, other])
    except OsmlError:
        return
    assert (look(names[0]) == look(names[1])) == (names[0] == names[1])
