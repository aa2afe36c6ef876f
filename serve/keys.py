"""API keys: who may do what. The store keeps a digest of each, never the key."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Sequence

from osml_plugin.errors import OsmlError, unknown_name

from .store.records import KeyRecord

SCOPES = ("recognize", "enroll", "admin")
"""What a key may be allowed: to recognize; to change classes and discover; everything."""
LOCAL = "local"
"""The actor where no key is required and none was sent."""
MAX_NAME = 100

_KEY = re.compile(r"osml_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_NO_DIGEST = secrets.token_hex(32)


class Refused(OsmlError):
    """A request that may not be done: HTTP status 401 (no valid key) or 403 (its scope is missing)."""

    def __init__(self, status: int, detail: str):
        super().__init__(detail)
        self.status, self.detail = status, detail


def make_key(name: str, scopes: Iterable[str]) -> tuple[str, KeyRecord]:
    """A new key, `osml_<12 hex: id>_<43 characters: secret>`, shown this once, and its record for the store.

    name: 1 to 100 printable characters; the audit log names the key's holder by it. scopes: some of `SCOPES`.
    """
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name != name.strip() or name == LOCAL:
        raise OsmlError(
            f"the name of a key has 1 to {MAX_NAME} printable characters, no blanks at its ends, and is not "
            f"'{LOCAL}'; got {name[: 2 * MAX_NAME]!r}"
        )
    scopes = set(scopes)
    for scope in sorted(scopes - set(SCOPES)):
        raise unknown_name("scope", scope, SCOPES)
    if not scopes:
        raise OsmlError(f"key '{name}' has no scopes; expected one or more of {', '.join(SCOPES)}")
    key_id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    record = KeyRecord(key_id, name, tuple(scope for scope in SCOPES if scope in scopes), _digest(secret))
    return f"osml_{key_id}_{secret}", record


def keys_required(host_is_loopback: bool, keys: Sequence[KeyRecord]) -> bool:
    """Whether every request needs a key: always where other machines can call; on loopback as soon as a key was ever
    made, so that revoking the last one does not open the door."""
    return not host_is_loopback or len(keys) > 0


class KeyRing:
    """The keys as the store has them, revoked ones included."""

    def __init__(self, keys: Sequence[KeyRecord], required: bool):
        self.required = required
        self._keys = {key.id: key for key in keys}

    def identify(self, authorization: str | None, scope: str) -> str:
        """The actor: the name of the key in an `Authorization: Bearer KEY` header.

        A key that was sent is checked even where none is required. Raises `Refused`.
        """
        if authorization is None:
            if self.required:
                raise Refused(401, "an API key is needed: send it as 'Authorization: Bearer osml_...'")
            return LOCAL
        scheme, _, token = authorization.partition(" ")
        match = _KEY.fullmatch(token.strip()) if scheme.lower() == "bearer" else None
        key_id, secret = match.groups() if match else ("", "")
        key = self._keys.get(key_id)
        live = key is not None and key.revoked_at is None
        # Always one comparison, and one message: neither says which ids exist, or existed.
        if not hmac.compare_digest(_digest(secret), key.digest if live else _NO_DIGEST) or not live:
            raise Refused(401, "this API key is not valid: send one of 'osml keys' as 'Authorization: Bearer osml_...'")
        if scope not in key.scopes and "admin" not in key.scopes:
            raise Refused(403, f"this API key lacks the scope '{scope}'; it has {', '.join(key.scopes)}")
        return key.name


def _digest(secret: str) -> str:
    """SHA-256: the secret is 32 random bytes, which nobody guesses, so that a slow hash would add nothing."""
    return hashlib.sha256(secret.encode("ascii")).hexdigest()
