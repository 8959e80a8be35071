"""Who may use the server: keys, kept as hashes, and what each may take.

A keys file has a line for each tenant, `NAME sha256:HEX` (or `NAME tml-…`, the key itself, for a file that only you
read); `#` starts a comment. Without one, a key is made at the first start, shown once, and only its hash kept.
Left out on purpose: accounts, roles, and sharing between tenants.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from cispo.types import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True)
class Limits:
    """What one key may take. bytes_stored: of checkpoints and samplers; requests: accepted and not yet resolved."""

    body_bytes: int
    num_samples: int
    requests: int
    stored_bytes: int
    runs: int


class Keys:
    """Names by the SHA-256 of their keys."""

    def __init__(self, hashes: dict[str, str]):
        self._hashes = {name: bytes.fromhex(value.removeprefix("sha256:")) for name, value in hashes.items()}

    def owner(self, key: str | None) -> str | None:
        """The tenant of a key, or None. Every stored hash is compared, each in constant time."""
        if not key:
            return None
        digest = hashlib.sha256(key.encode()).digest()
        found = None
        for name, stored in self._hashes.items():
            if hmac.compare_digest(digest, stored):
                found = name
        return found


def hash_of(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def read_keys(path: Path) -> Keys:
    """Raises ConfigError with file and line."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"--keys {path}: cannot be read ({error.strerror})") from None
    hashes: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        if len(words) != 2 or not _NAME.fullmatch(words[0]):
            raise ConfigError(f"--keys {path}:{number}: expected `NAME sha256:HEX` or `NAME tml-…`")
        name, value = words
        if name in hashes:
            raise ConfigError(f"--keys {path}:{number}: {name} has a key already")
        if value.startswith("tml-"):
            value = hash_of(value)
        if not _HASH.fullmatch(value):
            raise ConfigError(
                f"--keys {path}:{number}: the key of {name} must start with tml-, or be sha256: and 64 digits"
            )
        if value in hashes.values():
            raise ConfigError(f"--keys {path}:{number}: {name} has the key of another")
        hashes[name] = value
    if not hashes:
        raise ConfigError(f"--keys {path}: holds no key; write a line `NAME tml-…`")
    return Keys(hashes)


def own_keys(folder: Path) -> tuple[Keys, str | None]:
    """The keys of a state directory, made now if there are none: then the key itself too, to be shown once."""
    path = folder / "keys"
    if path.exists():
        return read_keys(path), None
    key = "tml-" + secrets.token_urlsafe(24)
    temporary = path.with_suffix(".new")
    temporary.touch(mode=0o600)
    temporary.write_text(f"default {hash_of(key)}\n")
    temporary.rename(path)
    return read_keys(path), key
