"""Who may call: API keys, and which web pages may."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from ...errors import ConfigError

# Shorter ones can be guessed.
_MIN_KEY = 16


class ApiKeys:
    """The keys that open the service, kept only as hashes.

    A line of the file is a key, or a name and a key; `#` begins a comment. Jobs belong to the name, so a key that is
    replaced under its name keeps them; a key without one is named by its hash.
    """

    def __init__(self, keys: Sequence[tuple[str, str]]) -> None:
        """Take (name, key) pairs."""
        self._hashes = [(name, hashlib.sha256(key.encode()).digest()) for name, key in keys]

    @classmethod
    def read(cls, path: Path) -> ApiKeys:
        """Read a key file.

        Raises:
            ConfigError: it cannot be read, has no key, a short one, or one twice.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"api-key-file {str(path)!r} cannot be read ({type(error).__name__})") from error
        keys = []
        for number, line in enumerate(lines, 1):
            words = line.partition("#")[0].split()
            if not words:
                continue
            # The line itself is not shown: it may hold a key.
            if len(words) > 2 or len(words[-1]) < _MIN_KEY:
                raise ConfigError(
                    f"api-key-file {str(path)!r}, line {number}: a line is a key of at least {_MIN_KEY} characters, "
                    "optionally after a name"
                )
            key = words[-1]
            keys.append((words[0] if len(words) == 2 else hashlib.sha256(key.encode()).hexdigest()[:16], key))
        if not keys:
            raise ConfigError(f"api-key-file {str(path)!r} holds no key; write one key on a line")
        if len({key for _, key in keys}) < len(keys):
            raise ConfigError(f"api-key-file {str(path)!r} holds a key twice; each key belongs to one owner")
        return cls(keys)

    def owner(self, authorization: str | None) -> str | None:
        """The name behind an Authorization header; None if it opens nothing.

        Takes the same time whether a key is nearly right or all wrong.
        """
        scheme, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found = None
        for name, digest in self._hashes:
            if hmac.compare_digest(digest, given):
                found = name
        return found if scheme.lower() == "bearer" else None


def stranger(host: str, origin: str | None, allowed_hosts: Sequence[str]) -> str | None:
    """Why a request comes from where it must not, in one sentence; None if it may.

    A browser sends requests wherever a page tells it to. Another site's page is known by its Origin; one that has
    pointed its own name at this machine, by the name in Host.

    Args:
        host: the Host header.
        origin: the Origin header.
        allowed_hosts: names under which the service may be called; empty allows all.
    """
    if allowed_hosts and _name(host) not in allowed_hosts:
        return f"this service does not answer to the name {_name(host)[:80]!r}"
    if origin is not None and origin.lower().partition("://")[2] != host.lower():
        return "pages of other sites may not call this service"
    return None


def _name(host: str) -> str:
    """A Host header without its port."""
    name = host.lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]
