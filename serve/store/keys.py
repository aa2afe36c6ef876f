"""API keys, hashed."""

from __future__ import annotations

from sqlalchemy import insert, select, update

from .errors import Conflict
from .ledger import Change, Ledger, now
from .records import KeyRecord
from .tables import keys


class Keys(Ledger):
    """Each change raises `State.keys_version`."""

    def keys(self) -> list[KeyRecord]:
        """The oldest first, revoked ones included."""
        with self._database.read() as connection:
            rows = connection.execute(select(keys).order_by(keys.c.created_at, keys.c.id)).mappings()
            return [KeyRecord(**{**row, "scopes": tuple(row["scopes"])}) for row in rows]

    def add_key(self, key: KeyRecord) -> None:
        """Raises `Conflict` where a key that is not revoked has its name, or any its id."""
        with self._database.write() as connection:
            this = Change(connection)
            taken = ((keys.c.name == key.name) & keys.c.revoked_at.is_(None)) | (keys.c.id == key.id)
            if connection.execute(select(keys.c.id).where(taken)).first() is not None:
                raise Conflict(f"there is a key '{key.name}' already: revoke it, or choose another name")
            connection.execute(
                insert(keys),
                {
                    "id": key.id,
                    "name": key.name,
                    "scopes": list(key.scopes),
                    "digest": key.digest,
                    "created_at": key.created_at,
                    "revoked_at": key.revoked_at,
                },
            )
            this.set(keys_version=this.state.keys_version + 1)

    def revoke_key(self, name: str) -> bool:
        """False: no key in use has this name."""
        with self._database.write() as connection:
            this = Change(connection)
            valid = update(keys).where(keys.c.name == name, keys.c.revoked_at.is_(None))
            revoked = connection.execute(valid.values(revoked_at=now())).rowcount > 0
            if revoked:
                this.set(keys_version=this.state.keys_version + 1)
            return revoked
