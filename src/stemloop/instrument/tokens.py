"""Who speaks: tokens that are random, stored as hashes, scoped, expiring and revocable.

A token is ``slt_ID_SECRET``; the secret has 256 random bits. What is kept of it is a salt and the SHA-256 of salt and
token: the slow hashes made for passwords defend words that can be guessed, and 2**256 values cannot. The file is
replaced as a whole (written aside, synced, renamed) and has mode 0600.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stemloop.core.errors import InputError, NotAuthorised, UnknownName
from stemloop.core.instruction import KINDS
from stemloop.instrument.files import FileLock, write_atomically

#: From the weakest to the strongest: a viewer looks, an agent (a program) drives, an operator (a person) takes over,
#: an engineer also issues and revokes tokens.
ROLES = ("viewer", "agent", "operator", "engineer")
MIN_TOKEN_LENGTH = 16
#: The issued tokens, in a server's folder.
TOKENS_FILE = "tokens.json"
#: Longest life of an issued token [s].
LIFE_MAX_S = 366 * 24 * 3600.0

#: What a holder may be called.
NAME_PATTERN = r"^[A-Za-z0-9_.@ -]{0,64}$"
_NAME = re.compile(NAME_PATTERN)


@dataclass(frozen=True)
class Identity:
    """Who holds a token.

    ``name`` is ``role`` or ``role:person``. ``kinds`` are the instruction kinds that the token may ask for (None for
    all); ``token_id`` names an issued token; it ends at ``expires_s`` [s since 1970].
    """

    name: str
    role: str
    kinds: tuple[str, ...] | None = None
    token_id: str = ""
    expires_s: float | None = None

    @property
    def rank(self) -> int:
        """0 for a viewer, 1 for an agent, 2 for an operator, 3 for an engineer."""
        return ROLES.index(self.role)

    def require(self, role: str, what: str) -> None:
        """Raise ``NotAuthorised`` unless this role is at least ``role``."""
        if self.rank < ROLES.index(role):
            raise NotAuthorised(
                f"{self.name} may not {what}: that needs the role {role}. Connect with the token of one."
            )

    def require_kind(self, kind: str) -> None:
        """Raise ``NotAuthorised`` unless the token's scope has the instruction ``kind``."""
        if self.kinds is not None and kind not in self.kinds:
            raise NotAuthorised(
                f"the token of {self.name} is for {', '.join(self.kinds)} only, not for {kind!r}: "
                "ask for a token with a wider scope."
            )


@dataclass(frozen=True)
class Entry:
    """What is kept of an issued token: never the token. Times are seconds since 1970."""

    token_id: str
    name: str
    role: str
    salt: str
    sha256: str
    issued_s: float
    expires_s: float | None = None
    kinds: tuple[str, ...] | None = None
    instruments: tuple[str, ...] | None = None
    revoked_s: float | None = None

    @classmethod
    def from_dict(cls, kept: dict[str, Any]) -> Entry:
        """The entry that was kept as JSON."""
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in kept.items()}
        return cls(**values)

    def public(self) -> dict[str, Any]:
        """The entry without salt and hash."""
        return {key: value for key, value in asdict(self).items() if key not in ("salt", "sha256")}

    def verdict(self, now_s: float, instrument: str) -> str:
        """Why the token is not good now for this instrument, or nothing if it is."""
        if self.revoked_s is not None:
            return "was revoked"
        if self.expires_s is not None and now_s >= self.expires_s:
            return "has expired"
        if self.instruments is not None and instrument not in self.instruments:
            return f"is for {', '.join(self.instruments)} and not for {instrument}"
        return ""


def _hash(salt: str, token: str) -> str:
    return hashlib.sha256(salt.encode() + token.encode("utf-8", "surrogatepass")).hexdigest()


def _identity(entry: Entry) -> Identity:
    return Identity(entry.name, entry.role, entry.kinds, entry.token_id, entry.expires_s)


class TokenFile:
    """The issued tokens of one instrument, in a JSON file that programs change one at a time."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path = path
        self._clock = clock
        self._entries: dict[str, Entry] = {}
        self._seen: tuple[int, int] | None = None
        self._lock = threading.Lock()
        self.refresh()

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            self._entries, self._seen = {}, None
            return
        if os.name == "posix" and found.st_mode & 0o077:
            raise NotAuthorised(
                f"{self.path} can be read by others: take their rights away with 'chmod 600 {self.path}'."
            )
        stamp = (found.st_mtime_ns, found.st_ino)
        if stamp != self._seen:
            self._entries, self._seen = self._read(), stamp

    def _read(self) -> dict[str, Entry]:
        try:
            kept = json.loads(self.path.read_text(encoding="utf-8"))["tokens"]
            entries = [Entry.from_dict(one) for one in kept]
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{self.path} is no file of issued tokens ({type(error).__name__}): move it away and issue new ones."
            ) from None
        return {entry.token_id: entry for entry in entries}

    def _change(self, change: Callable[[dict[str, Entry]], None]) -> None:
        with self._lock, FileLock(self.path.with_name(f"{self.path.name}.lock")):
            self._seen = None
            self._refresh()
            entries = dict(self._entries)
            change(entries)
            write_atomically(self.path, {"version": 1, "tokens": [asdict(entry) for entry in entries.values()]})
            self._seen = None
            self._refresh()

    def issue(
        self,
        role: str,
        name: str = "",
        life_s: float | None = None,
        kinds: Iterable[str] | None = None,
        instruments: Iterable[str] | None = None,
    ) -> tuple[str, Entry]:
        """Make a token; returns it, for the only time, and what is kept of it.

        Parameters
        ----------
        role : str
            One of ``ROLES``.
        name : str
            A person or program; the holder is called ``role:name``.
        life_s : float, optional
            Seconds until it expires, at most a year; None for a token that does not.
        kinds, instruments : iterable of str, optional
            The instruction kinds and the instruments that it is good for; None for all.
        """
        if role not in ROLES:
            raise InputError(f"unknown role {role!r:.40}; known: {', '.join(ROLES)}.")
        full = f"{role}:{name}" if name else role
        if not _NAME.fullmatch(name):
            raise InputError(f"a name has up to 64 letters, digits and . @ _ -; got {name!r:.80}.")
        if life_s is not None and not 0 < life_s <= LIFE_MAX_S:
            raise InputError(f"a token lives above 0 and at most {LIFE_MAX_S:.0f} s; {life_s!r} was asked.")
        kinds = None if kinds is None else tuple(kinds)
        if unknown := set(kinds or ()) - set(KINDS):
            raise InputError(f"unknown instruction {', '.join(sorted(unknown))!r:.80}; known: {', '.join(KINDS)}.")
        token_id, salt = secrets.token_hex(6), secrets.token_hex(16)
        token = f"slt_{token_id}_{secrets.token_urlsafe(32)}"
        now = self._clock()
        entry = Entry(
            token_id,
            full,
            role,
            salt,
            _hash(salt, token),
            now,
            None if life_s is None else now + life_s,
            kinds,
            None if instruments is None else tuple(instruments),
        )
        self._change(lambda entries: entries.update({token_id: entry}))
        return token, entry

    def revoke(self, token_id: str) -> Entry:
        """End a token now, also on connections that were opened with it; ``InputError`` if there is none such."""

        def end(entries: dict[str, Entry]) -> None:
            if token_id not in entries:
                raise UnknownName(
                    f"no token {token_id!r:.40} was issued here: 'stemloop instrument token list' names them."
                )
            if entries[token_id].revoked_s is None:
                entries[token_id] = replace(entries[token_id], revoked_s=self._clock())

        self._change(end)
        return self._entries[token_id]

    def entries(self) -> list[Entry]:
        """All tokens that were issued, the oldest first."""
        self.refresh()
        return list(self._entries.values())

    def find(self, token_id: str) -> Entry | None:
        """The entry of a token, as last read."""
        return self._entries.get(token_id)


class Tokens:
    """Tells identities by their tokens.

    Parameters
    ----------
    given : mapping, optional
        From ``role`` or ``role:person`` to a secret of at least 16 characters: tokens that live as long as the server.
        Only their salted hashes are kept.
    file : TokenFile, optional
        The tokens that were issued.
    instrument : str
        The name of the instrument, for tokens that are good for some only.
    """

    def __init__(
        self,
        given: Mapping[str, str] | None = None,
        file: TokenFile | None = None,
        instrument: str = "",
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.file = file
        self._instrument = instrument
        self._clock = clock
        self._salt = secrets.token_hex(16)
        self._given: dict[str, Identity] = {}
        for name, token in (given or {}).items():
            role = name.split(":", 1)[0]
            if role not in ROLES:
                raise InputError(f"token {name!r}: the role must be one of {', '.join(ROLES)}.")
            if not isinstance(token, str) or len(token) < MIN_TOKEN_LENGTH:
                raise InputError(
                    f"the token of {name!r} is shorter than {MIN_TOKEN_LENGTH} characters; make it longer."
                )
            self._given[_hash(self._salt, token)] = Identity(name, role)
        if len(self._given) != len(given or {}):
            raise InputError("two names share one token; give each its own.")

    @staticmethod
    def make() -> dict[str, str]:
        """New random tokens, one for each role."""
        return {role: secrets.token_urlsafe(32) for role in ROLES}

    def identify(self, token: str) -> Identity:
        """Whose token this is, or ``NotAuthorised``. Hashes are compared in constant time."""
        given = _hash(self._salt, token)
        found = [identity for kept, identity in self._given.items() if hmac.compare_digest(kept, given)]
        if found:
            return found[0]
        entry = self._issued(token)
        if entry is None:
            raise NotAuthorised(
                "the token is not known here: ask an engineer for one ('stemloop instrument token issue')."
            )
        if verdict := entry.verdict(self._clock(), self._instrument):
            raise NotAuthorised(f"the token {entry.token_id} of {entry.name} {verdict}: ask an engineer for a new one.")
        return _identity(entry)

    def _issued(self, token: str) -> Entry | None:
        if self.file is None:
            return None
        self.file.refresh()
        parts = token.split("_", 2)
        entry = self.file.find(parts[1]) if len(parts) == 3 and parts[0] == "slt" else None
        if entry is None or not hmac.compare_digest(entry.sha256, _hash(entry.salt, token)):
            return None
        return entry

    def confirm(self, who: Identity) -> None:
        """Raise ``NotAuthorised`` if the token of an open connection has expired or been revoked since."""
        if not who.token_id:
            return
        entry = self.file and self.file.find(who.token_id)
        verdict = entry.verdict(self._clock(), self._instrument) if entry else "is no longer known"
        if verdict:
            raise NotAuthorised(f"the token {who.token_id} of {who.name} {verdict}: ask an engineer for a new one.")

    def refresh(self) -> None:
        """Read the issued tokens again if their file has changed; what cannot be read leaves them as they were."""
        if self.file is not None:
            self.file.refresh()


def secret_file(path: Path, values: Mapping[str, str]) -> None:
    """Write secrets for programs of the same user on the same machine (mode 0600)."""
    write_atomically(path, dict(values))
