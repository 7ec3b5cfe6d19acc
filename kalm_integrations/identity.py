"""Identities: two vectors can be compared if theirs are equal.

The *service* reads a `SpaceIdentity` from its loaded engine and sends it with every response. The
*client* declares the one that it expects, and compares. Neither is derived from the other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from kalm_integrations.errors import IdentityMismatchError

_UNDECLARED = "undeclared"


def fingerprint(value: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of `value` as canonical JSON: short, and safe in a file name."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class SpaceIdentity:
    """A vector space: everything about a loaded engine that moves its vectors.

    Attributes:
        model: The model's public name.
        revision: The resolved commit, or the digest of the weights; never a branch name.
        pooling: How token states become one vector, e.g. "last".
        normalized: Whether vectors have unit length.
        attention: "causal", "bidirectional", or "none" where the model has no attention.
        quantization: The scheme that the engine runs, e.g. "bf16", not the requested one.
        profile: Version of how we run this model; raised when that changes vectors.
    """

    model: str
    revision: str
    pooling: str
    normalized: bool
    attention: str
    quantization: str
    profile: int

    @classmethod
    def undeclared(cls, model: str) -> Self:
        """The identity of a model without profile: only its name is known."""
        return cls(
            model=model,
            revision=_UNDECLARED,
            pooling=_UNDECLARED,
            normalized=True,
            attention=_UNDECLARED,
            quantization=_UNDECLARED,
            profile=0,
        )

    @property
    def declared(self) -> bool:
        """Whether more than the name is known."""
        return self.revision != _UNDECLARED

    @property
    def fingerprint(self) -> str:
        """Short form of the whole identity: 16 hex digits."""
        return fingerprint(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Built-in types only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: A field is missing, unknown, or of another type.
        """
        types = {"normalized": bool, "profile": int}
        names = {field.name for field in fields(cls)}
        if set(value) != names:
            missing = sorted(names - set(value))
            unknown = sorted(map(str, set(value) - names))
            raise ValueError(f"not a space identity: missing {missing}, unknown {unknown}")
        for name in names:
            if type(value[name]) is not types.get(name, str):
                raise ValueError(f"not a space identity: {name} is {value[name]!r}")
        return cls(**value)

    def differences(self, other: SpaceIdentity) -> str:
        """Each field in which `other` differs, as "name: mine != theirs; ..."."""
        return _differences(self.to_dict(), other.to_dict())


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorIdentity:
    """What every vector of one index must share: the space, the dimensions (0: the native number
    of a model without profile), and the template that documents were embedded with. Queries may
    have another instruction at any time, so their template is not part of it; nor is the type in
    which vectors are transferred."""

    space: SpaceIdentity
    dimensions: int
    document_template: str

    @property
    def fingerprint(self) -> str:
        """Short form of the whole identity: 16 hex digits. Store it with your index."""
        return fingerprint(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Built-in types only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Self:
        """The inverse of `to_dict`.

        Raises:
            ValueError: It is not what `to_dict` gives.
        """
        try:
            space = SpaceIdentity.from_dict(value["space"])
            return cls(
                space=space,
                dimensions=int(value["dimensions"]),
                document_template=str(value["document_template"]),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a vector identity: {error!r}") from error

    def check(self, stored: VectorIdentity) -> None:
        """Compare with the identity that was stored with an index.

        Raises:
            IdentityMismatchError: They differ; the message says in what.
        """
        if self != stored:
            mine, theirs = self.to_dict(), stored.to_dict()
            differences = _differences(
                {**mine.pop("space"), **mine}, {**theirs.pop("space"), **theirs}
            )
            raise IdentityMismatchError(
                f"these vectors ({self.fingerprint}) are not those of the index "
                f"({stored.fingerprint}): {differences}."
            )


def _differences(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    return "; ".join(f"{k}: {mine[k]!r} != {theirs[k]!r}" for k in mine if mine[k] != theirs[k])
