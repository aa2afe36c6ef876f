"""An image as text: base64 in the ways in which clients write it, or one line that names what the text is instead."""

from __future__ import annotations

import binascii
import re

from osml_plugin.errors import OsmlError

MEDIA_TYPES = frozenset(
    ("", "application/octet-stream", "image/*", "image/jpeg", "image/jpg", "image/pjpeg", "image/png", "image/webp")
)
"""Media types of a `data:` URL that are taken; the content decides in the end."""

_SLICE = 2**18  # characters that are worked on at a time: a thread holds the interpreter as long
_BLANKS = b" \t\r\n\f\v"
_STANDARD = bytes.maketrans(b"-_", b"+/")  # the URL-safe letters (RFC 4648, section 5)
_DIGIT = re.compile(rb"[A-Za-z0-9+/]")
_LAST = {2: b"AQgw", 3: b"AEIMQUYcgkosw048"}  # the last digits that leave no bits over
_AS_BASE64 = (b"/9j/", b"iVBORw0KGgo", b"UklGR", b"data:")
_AS_HEX = ("ffd8ff", "89504e47", "52494646")


def decoded(text: str) -> bytes:
    """The bytes that `text` encodes: base64, with the letters `+/` or `-_`, with or without padding, line breaks and a
    `data:` URL around it.

    Raises `OsmlError`, without a subject: "is empty", or "is not base64: " and what it is. Nothing is ever fetched.
    """
    text = text.strip()
    if text[:5].lower() == "data:":
        text = _of_data_url(text)
    if text[:8].lower().startswith(_AS_HEX):
        raise OsmlError("is not base64: it is hexadecimal")
    try:
        letters = _letters(text.encode("ascii"))
        # Decoded in slices, which are of whole fours but for the last.
        slices = (letters[start : start + _SLICE] for start in range(0, len(letters), _SLICE))
        content = b"".join(binascii.a2b_base64(piece, strict_mode=True) for piece in slices)
    except ValueError as error:
        raise OsmlError(f"is not base64: {_kind_of(text) or error}") from None
    if not content:
        raise OsmlError("is empty: expected the bytes of an image file in base64")
    if content.startswith(_AS_BASE64):
        raise OsmlError("is base64 of base64: encode the file once")
    return content


def _of_data_url(text: str) -> str:
    """The base64 in a `data:` URL (RFC 2397)."""
    comma = text.find(",", 0, 1000)
    if comma < 0:
        raise OsmlError("is not base64: it is a data: URL without a comma")
    media_type, *parameters = (part.strip().lower() for part in text[5:comma].split(";"))
    data = text[comma + 1 :]
    if media_type not in MEDIA_TYPES:
        raise OsmlError(f"is a data: URL of {media_type[:50]!a}: expected image/jpeg, image/png or image/webp")
    if "base64" not in parameters:
        raise OsmlError("is not base64: it is a data: URL in percent encoding; write data:image/png;base64,...")
    if "%" in data:  # base64 that went through a form or an address
        for code, letter in (("%2B", "+"), ("%2F", "/"), ("%3D", "=")):
            data = data.replace(code, letter).replace(code.lower(), letter)
    return data.strip()


def _letters(text: bytes) -> bytes:
    """`text` in the standard letters, without blanks and padded to fours."""
    pieces = (text[start : start + _SLICE] for start in range(0, len(text), _SLICE))
    letters = b"".join(piece.translate(_STANDARD, _BLANKS) for piece in pieces).rstrip(b"=")
    if b"=" in letters:
        raise ValueError("padding before the end")
    over = len(letters) % 4
    if over and _DIGIT.fullmatch(letters[-1:]) and letters[-1:] not in _LAST.get(over, b""):
        raise ValueError("it is cut off before its end")
    return letters + b"=" * (-len(letters) % 4)


def _kind_of(text: str) -> str:
    """A name for text that is not base64, where it has one."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        return "it is an address, and nothing is fetched; send the content of the image file"
    if re.match(r"b(['\"]).*\1$", text, re.DOTALL):
        return "it is Python's b'...'; write base64.b64encode(content).decode()"
    if len(text) < 4096 and re.search(r"\.[A-Za-z0-9]{2,5}$|^[A-Za-z]:[\\/]|^(?!/9j/)[~.]{0,2}[\\/]", text):
        return "it looks like a path; send the content of the image file"
    if text.startswith("<"):
        return "it is markup, such as HTML or SVG"
    found = re.search(r"[^A-Za-z0-9+/=_ \t\r\n\f\v-]", text)
    return f"it has {found[0]!a} at position {found.start()}" if found else ""
