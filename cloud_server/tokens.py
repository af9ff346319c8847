"""Bearer tokens: who may use this cloud. One file of names and digests; the tokens are written nowhere.

A token is 256 random bits, so its plain SHA-256 is stored: salts and slow hashes (bcrypt, Argon2) make
guessing what people choose expensive, and nobody guesses one of 2**256. A fast hash also cannot be used to
keep the server busy with wrong tokens. The name of a token is the identity of whoever shows it.
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from shared.cache import locked, replacing
from shared.complaint import in_words

log = logging.getLogger(__name__)

PREFIX = "plora_"  # so that a token left somewhere by mistake is found by secret scanners, and by people
TOKEN_BYTES = 32
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
MAX_FILE_BYTES = 16 << 20  # a hundred thousand tokens; more is no token file


class TokenFileError(ValueError):
    """A token file that is missing, damaged or badly kept, or a name that it cannot take."""


class Entry(BaseModel):
    """What is kept of one token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    created: str  # ISO 8601, UTC

    @property
    def digest(self) -> bytes:
        """SHA-256 of the token."""
        return bytes.fromhex(self.sha256)


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")

    version: Literal[1] = 1
    tokens: dict[Annotated[str, Field(pattern=f"^{NAME.pattern}$")], Entry] = Field(default_factory=dict)


def add(path: Path, name: str) -> str:
    """Make a token for ``name`` and return it: this is the only time that it can be seen.

    Raises
    ------
    TokenFileError
        If the name cannot be one or has a token, or the file is damaged.
    """
    if NAME.fullmatch(name) is None:
        raise TokenFileError(
            f"{name!r} cannot be a name: at most 64 letters, digits and . _ @ -, a letter or digit first"
        )
    with locked(path):
        document = _read_or_new(path)
        if name in document.tokens:
            raise TokenFileError(f"{name!r} has a token; revoke it first, or choose another name")
        token = PREFIX + secrets.token_urlsafe(TOKEN_BYTES)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        document.tokens[name] = Entry(sha256=digest(token).hex(), created=now)
        _write(path, document)
    return token


def revoke(path: Path, name: str) -> None:
    """Forget the token of ``name``; servers that read this file end its streams within seconds.

    Raises
    ------
    TokenFileError
        If there is none, or the file is missing or damaged.
    """
    with locked(path):
        document, _ = _read(path)
        if document.tokens.pop(name, None) is None:
            raise TokenFileError(f"{name!r} has no token in {path}")
        _write(path, document)


def entries(path: Path) -> dict[str, Entry]:
    """Return what is kept, by name.

    Raises
    ------
    TokenFileError
        If the file is missing or damaged.
    """
    return dict(_read(path)[0].tokens)


def digest(token: str) -> bytes:
    """Return what is stored of a token."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


class TokenBook:
    """The tokens that a server knows: those of the file, as it is now.

    Parameters
    ----------
    path
        The file. It is read again when it has changed. A file that has become unreadable changes nothing,
        so that a slip of the pen shuts nobody out; a file that is gone lets nobody in.

    Raises
    ------
    TokenFileError
        If the file is missing or damaged now, or others than its owner may write to it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        document, status = _read(path)
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise TokenFileError(f"others may write to {path}, and so let themselves in: chmod 600 {path}")
        # Digests are found by what only this process can compute: how long that takes tells nothing of them.
        self._secret = secrets.token_bytes(32)
        self._state: tuple[int, ...] | None = _state(status)
        self._learn(_digests(document))

    def refresh(self) -> None:
        """Read the file again if it has changed."""
        try:
            state = _state(self.path.stat())
        except FileNotFoundError:
            if self._known:
                log.error("the token file %s is gone: nobody is let in", self.path)
            self._learn({})
            self._state = None
            return
        except OSError:
            return self._keep(())
        if state == self._state:
            return
        try:
            document, status = _read(self.path)
        except TokenFileError:
            return self._keep(state)
        self._learn(_digests(document))
        self._state = _state(status)
        log.info("read %s again: %d tokens", self.path, len(self._known))

    def identity(self, token: str) -> tuple[str, bytes] | None:
        """Return name and digest of a token, None if it is not known (any more).

        Takes as long for a wrong token as for a right one, and however many are known: it runs where
        everybody is served.
        """
        self.refresh()
        shown = digest(token)
        name = self._by_digest.get(self._blind(shown), "")
        is_known = hmac.compare_digest(self._known.get(name, bytes(len(shown))), shown)
        return (name, shown) if name and is_known else None

    def holds(self, name: str, shown: bytes) -> bool:
        """Whether that name still has that token."""
        return name in self._known and hmac.compare_digest(self._known[name], shown)

    def _learn(self, known: dict[str, bytes]) -> None:
        self._known = known
        self._by_digest = {self._blind(held): name for name, held in known.items()}

    def _blind(self, shown: bytes) -> bytes:
        return hashlib.blake2b(shown, key=self._secret, digest_size=16).digest()

    def _keep(self, state: tuple[int, ...]) -> None:
        if state != self._state:  # say it once
            log.error("cannot read %s: the tokens known before stay valid until it is mended", self.path)
        self._state = state


def _read_or_new(path: Path) -> _Document:
    return _read(path)[0] if path.exists() else _Document()


def _read(path: Path) -> tuple[_Document, os.stat_result]:
    try:
        if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
            raise TokenFileError(f"{path} is no file but a pipe or device; a token file has to be a file")
        with path.open("rb") as file:
            status = os.fstat(file.fileno())  # of what is read, whatever takes its place meanwhile
            raw = file.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise TokenFileError(
            f"no token file at {path}; `privatelora-cloud token add NAME` makes it"
        ) from None
    except OSError as error:
        raise TokenFileError(f"cannot read the token file: {in_words(error)}") from None
    try:
        if len(raw) > MAX_FILE_BYTES:
            raise ValueError
        return _Document.model_validate_json(raw), status
    except (ValidationError, ValueError):
        raise TokenFileError(
            f"{path} is no token file, or damaged; restore it, or delete it and add every token anew"
        ) from None


def _write(path: Path, document: _Document) -> None:
    with replacing(path) as file:  # a file of mode 0600 that takes the old one's place at once
        file.write(document.model_dump_json(indent=1).encode() + b"\n")


def _digests(document: _Document) -> dict[str, bytes]:
    return {name: entry.digest for name, entry in document.tokens.items()}


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev
