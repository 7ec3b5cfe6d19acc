"""The systems that are evaluated: how a user names one, what it serves, its vectors."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.client import KalmClient, progress_bar
from kalm_integrations.errors import (
    ConfigurationError,
    IdentityMismatchError,
    InvalidInputError,
    KalmError,
)
from kalm_integrations.event_loop import background_loop
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import Role
from kalm_integrations.result import ArrayBuilder
from kalm_integrations.transports.base import describe_service

Vectors = NDArray[np.float32]
_SECRETS: Final = ("api_key", "modal_key", "modal_secret")
_SEARCH_OPTIONS: Final = ("dimensions", "query_instruction", "document_instruction")
_NAMED_ROWS: Final = 5


class Texts(NamedTuple):
    """Texts, and where each one is in the user's files."""

    texts: list[str]
    places: list[str]


def parse(spec: str) -> dict[str, Any]:
    """Client arguments from "URL-or-app key=value key=value"; "local" is the embedded engine.

    `api_key_variable` names the environment variable that holds the system's API key.

    Raises:
        ConfigurationError: It contains a secret, or a word that is none of these.
    """
    options: dict[str, Any] = {}
    for word in shlex.split(spec):
        name, equals, value = word.partition("=")
        if "://" in name:
            options |= {"backend": "http", "base_url": word}
        elif not equals and word == "local":
            options |= {"backend": "local"}
        elif not equals and ":" not in word and "/" not in word:
            options |= {"backend": "modal", "app_name": word, "base_url": None}
        elif not equals:
            raise ConfigurationError(f"{word}: neither a URL nor an app. Use http://{word} ?")
        elif name in _SECRETS:
            raise ConfigurationError(f"{name}= would show the secret: use {name}_variable=NAME.")
        elif name.removesuffix("_variable") in _SECRETS:
            if value not in os.environ:
                raise ConfigurationError(f"{word}: there is no such environment variable.")
            options[name.removesuffix("_variable")] = os.environ[value]
        else:
            options[name] = int(value) if value.isdecimal() else value
    return options


@dataclass(frozen=True, slots=True)
class System:
    """One way to embed: a deployment with a model, a prompt and a number of dimensions.

    Attributes:
        name: As the user wrote it.
        client: Accepts only the space that the service reported at the start.
        identity: That space; None if the service reports none.
        service: Key that systems share if their document vectors come from the same service.
    """

    name: str
    client: KalmClient = field(repr=False)
    identity: SpaceIdentity | None
    service: str = field(repr=False)

    def describe(self) -> dict[str, Any]:
        """What was evaluated, for the JSON document."""
        config = self.client.config
        return {
            "name": self.name,
            "model": config.served_model,
            "fingerprint": self.identity.fingerprint if self.identity else None,
            "quantization": self.identity.quantization if self.identity else None,
            "query_template": config.query_template,
            "document_template": config.document_template,
        }

    def embed(self, texts: Texts, role: Role) -> Vectors:
        """Embed texts with a progress bar. Returns unit vectors, a row per text.

        Raises:
            ConfigurationError: Texts that the model refuses; the message names their places.
            KalmError: The service failed, or serves another space than at the start.
        """
        client = self.client
        builder = ArrayBuilder(len(texts.texts), client.vector_dimensions)
        with blame(self.name), progress_bar(len(texts.texts), f"{self.name} {role}") as advance:
            try:  # iter_embed, since the timeout of embed() is for the whole call
                for part in client.iter_embed(texts.texts, role=role):
                    builder.add(part)
                    advance(len(part))
            except InvalidInputError as error:
                if not error.invalid:
                    raise
                named = [f"{texts.places[b.index]} {b.reason}" for b in error.invalid]
                more = f"; and {len(named) - _NAMED_ROWS} more" if len(named) > _NAMED_ROWS else ""
                raise ConfigurationError(
                    f"{'; '.join(named[:_NAMED_ROWS])}{more}. Fix or remove these texts; "
                    "truncate=end cuts long ones."
                ) from error
            return builder.result(client.config.vector_dtype, client.vector_identity).vectors


@contextmanager
def connected(specs: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list[System]]:
    """Start all services at the same time, and close the clients at the end.

    Args:
        specs: Name and client arguments of each system.

    Raises:
        ConfigurationError: Arguments that cannot work; no service was started.
        KalmError: A service cannot be reached, or does not start.
    """
    common = {"expected_identity": None, "show_progress": False}
    with ExitStack() as stack:
        probes = []
        for name, options in specs:
            with blame(name):
                service = {k: v for k, v in options.items() if k not in _SEARCH_OPTIONS}
                probes.append(
                    (name, options, KalmClient(**common | service | {"dimensions": None}))
                )
        with ThreadPoolExecutor(len(probes)) as pool:
            systems = list(pool.map(lambda probe: _connect(*probe), probes))
        for system in systems:
            stack.callback(system.client.close)
        yield systems


def _connect(name: str, options: dict[str, Any], probe: KalmClient) -> System:
    with blame(name), probe:
        mismatch = None
        try:
            probe.warm_up()
        except IdentityMismatchError as error:  # another model than KaLM, which is fine here
            mismatch = error
        identity = background_loop().submit(describe_service(probe.config)).result().identity
        if mismatch and (identity is None or probe.config.model not in (None, identity.model)):
            raise mismatch
        served = {"model": identity.model, "expected_identity": identity} if identity else {}
        client = KalmClient(
            **{"expected_identity": None, "show_progress": False} | options | served
        )
        return System(name, client, identity, repr(probe))


@contextmanager
def blame(name: str) -> Iterator[None]:
    """Name the system in the errors of this block."""
    try:
        yield
    except KalmError as error:
        error.args = (f"{name}: {error.args[0] if error.args else ''}",)
        raise


def read_rows(path: Path, text_column: str | None) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Place, text and all columns of each row of a corpus that `kalm embed` reads.

    Raises:
        ConfigurationError: A row cannot be read, or its text is not a string.
        ImportError: The extra "eval" is not installed.
    """
    from kalm_integrations.bulk.sources import find

    source = find(str(path), text_column)
    for file in source.files:
        for row in source.rows(file):
            if row.unreadable or not isinstance(row.text, str):
                raise ConfigurationError(f"{row.place} {row.unreadable or 'has no text'}.")
            yield row.place, row.text, row.columns


def search(
    queries: Vectors, documents: Vectors, k: int, own: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The k nearest documents of each query, by exact search.

    Cosines are compared to six decimals, as finer ones are noise of the transfer in float16.
    Equally near documents are ordered by their row.

    Args:
        queries: Unit vectors.
        documents: Unit vectors, more than k.
        k: Number of documents.
        own: For each query a document to leave out, or -1.

    Returns:
        Rows of documents, shape (queries, k), the nearest first.
    """
    results = []
    for start in range(0, len(queries), 64):
        scores = (queries[start : start + 64] @ documents.T).round(6)
        rows = own[start : start + 64]
        left_out = np.flatnonzero(rows >= 0)
        scores[left_out, rows[left_out]] = -np.inf
        results.append(np.argsort(-scores, axis=1, kind="stable")[:, :k])
    return np.concatenate(results)
