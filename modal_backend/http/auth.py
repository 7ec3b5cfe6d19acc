"""Bearer keys: who may use the HTTP API, and how much."""

from __future__ import annotations

import hashlib
import hmac
import time
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from kalm_integrations.errors import ConfigurationError, RateLimitError

FILE_VARIABLE = "KALM_API_KEYS_FILE"


class NamedKey(BaseModel):
    """A key in the file of named keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    requests_per_minute: int | None = Field(None, ge=1)
    tokens_per_minute: int | None = Field(None, ge=1)
    queries_only: bool = False


class Allowance:
    """A limit per minute (a token bucket). As much as the limit may be used at once; what was used
    beyond it is waited for."""

    def __init__(self, per_minute: int | None) -> None:
        self._limit = per_minute
        self._left = float(per_minute or 0)
        self._at = time.monotonic()

    def wait(self) -> float:
        """Seconds until there is one left."""
        if self._limit is None:
            return 0.0
        now, rate = time.monotonic(), self._limit / 60
        self._left = min(self._limit, self._left + rate * (now - self._at))
        self._at = now
        return max(0.0, (1 - self._left) / rate)

    def use(self, amount: int) -> None:
        """Use `amount`, even if there is less left."""
        self._left -= amount


@dataclass(slots=True)
class Caller:
    """Who presents a key: its name in the file, or else the beginning of its digest."""

    name: str
    key: NamedKey | None = None
    requests: Allowance = field(init=False, compare=False)
    tokens: Allowance = field(init=False, compare=False)

    def __post_init__(self) -> None:
        self.requests = Allowance(self.key.requests_per_minute if self.key else None)
        self.tokens = Allowance(self.key.tokens_per_minute if self.key else None)

    @property
    def queries_only(self) -> bool:
        """Whether it may only embed queries."""
        return self.key is not None and self.key.queries_only

    def over_limit(self) -> RateLimitError | None:
        """Count a request; or return why it is refused."""
        for each, unit in ((self.requests, "requests"), (self.tokens, "tokens")):
            if seconds := each.wait():
                message = f"key {self.name!r} has used its {unit} per minute."
                return RateLimitError(message, seconds)
        self.requests.use(1)
        return None


class BearerKeys:
    """The valid keys. There may be several, so that they can be rotated.

    Args:
        keys: The valid keys. An empty list refuses every request; None accepts every request.
        file: More keys, with names and limits; see `read_keys`.

    Raises:
        ConfigurationError: The file cannot be used.
    """

    def __init__(self, keys: Sequence[SecretStr] | None, file: Path | None = None) -> None:
        self.file = file
        self._callers: dict[bytes, Caller] | None = None
        if keys is not None:
            self.replace(keys)

    def replace(self, keys: Sequence[SecretStr]) -> None:
        """Accept these keys, those of the file, and no others. One secret may hold several keys,
        separated by white space."""
        # Digests have one length, so comparing them reveals nothing about the key.
        digests = [
            _digest(key.encode()) for secret in keys for key in secret.get_secret_value().split()
        ]
        self._plain = {digest: Caller(digest.hex()[:8]) for digest in digests}
        self.reload()

    @property
    def required(self) -> bool:
        """Whether requests need a key."""
        return self._callers is not None

    def reload(self) -> int:
        """Read the file again; return the number of its keys. What a key has used of its limits
        stays, unless these have changed.

        Raises:
            ConfigurationError: The file cannot be used. The keys of before stay valid.
        """
        named = read_keys(self.file) if self.file else {}
        before = self._callers or {}
        self._callers = {
            digest: before[digest] if before.get(digest) == caller else caller
            for digest, caller in {**self._plain, **named}.items()
        }
        return len(named)

    def identify(self, authorization: str) -> Caller | None:
        """Who presents the key in the value of an Authorization header; None if it is not valid."""
        if self._callers is None:
            return _ANYBODY
        scheme, _, key = authorization.partition(" ")
        presented = _digest(key.strip().encode("latin-1"))  # as Starlette decodes headers
        # Every key is compared, so that the time does not reveal which one matches.
        matches = [
            caller
            for digest, caller in self._callers.items()
            if hmac.compare_digest(presented, digest)
        ]
        return matches[0] if matches and scheme.lower() == "bearer" else None


def read_keys(file: Path) -> dict[bytes, Caller]:
    """The keys in a TOML file: a table for each, under its name, with the fields of `NamedKey`.

    Raises:
        ConfigurationError: It cannot be read, has no key, or something in it is wrong.
    """
    try:
        keys = _FILE.validate_python(tomllib.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"] if part != "[key]")
        raise ConfigurationError(f"{FILE_VARIABLE}: {file}: {place}: {first['msg']}.") from None
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{FILE_VARIABLE}: {file}: {error}.") from None
    callers = {bytes.fromhex(key.sha256): Caller(name, key) for name, key in keys.items()}
    if not keys or len(callers) < len(keys):
        problem = "two names have the same key" if keys else "there is no key in it"
        raise ConfigurationError(f"{FILE_VARIABLE}: {file}: {problem}.")
    return callers


_FILE = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[\w.-]{1,64}$")], NamedKey])
_ANYBODY = Caller("without key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
