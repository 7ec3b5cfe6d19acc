"""The systems that are evaluated: how a user names them, what they serve, their vectors."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from kalm_integrations.client import KalmClient
from kalm_integrations.errors import (
    ConfigurationError,
    IdentityMismatchError,
    InvalidInputError,
    KalmError,
)
from kalm_integrations.evaluation.texts import Texts
from kalm_integrations.event_loop import background_loop
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.progress import progress_bar
from kalm_integrations.prompts import Role
from kalm_integrations.result import ArrayBuilder
from kalm_integrations.transports.base import describe_service

Vectors = NDArray[np.float32]
_SECRETS: Final = ("api_key", "modal_key", "modal_secret")
_SEARCH: Final = ("dimensions", "query_instruction", "document_instruction")
_COMMON: Final = {"expected_identity": None, "show_progress": False}


def parse(spec: str) -> dict[str, Any]:
    """Client arguments from "URL-or-app key=value key=value"; "local" is the embedded engine.

    `api_key_variable` names the environment variable that holds the API key.

    Raises:
        ConfigurationError: It contains a secret, or a word that is none of these.
    """
    options: dict[str, Any] = {}
    try:
        words = shlex.split(spec)
    except ValueError as error:
        raise ConfigurationError(f"{spec}: {error}.") from error
    for word in words:
        name, equals, value = word.partition("=")
        secret = name.removesuffix("_variable")
        if "backend" in options and (not equals or "://" in name):
            raise ConfigurationError(f"{spec}: {word} is a second address.")
        if "://" in name:
            options |= {"backend": "http", "base_url": word}
        elif word == "local":
            options |= {"backend": "local"}
        elif not equals and not {":", "/"} & {*word}:
            options |= {"backend": "modal", "app_name": word, "base_url": None}
        elif not equals:
            raise ConfigurationError(
                f"{word}: neither a URL nor an app. Did you mean http://{word}?"
            )
        elif name in _SECRETS:
            raise ConfigurationError(f"{name}=: name a variable that holds it: {name}_variable=.")
        elif secret in _SECRETS:
            if value not in os.environ:
                raise ConfigurationError(f"{word}: there is no such environment variable.")
            options[secret] = os.environ[value]
        else:
            options[name] = value
    return options


@dataclass(frozen=True, slots=True)
class System:
    """A deployment with a model, a prompt and a number of dimensions.

    Attributes:
        name: As the user wrote it.
        client: Accepts only the space that the service reported at the start.
        identity: That space; None if the service reports none.
        service: Systems with the same value get document vectors from the same service.
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
            "identity": self.identity.to_dict() if self.identity else None,
            "query_template": config.query_template,
            "document_template": config.document_template,
        }

    def embed(self, texts: Texts, role: Role) -> Vectors:
        """Embed texts with a progress bar. Returns unit vectors, a row per text.

        Raises:
            ConfigurationError: Texts that the model refuses; the message names them.
            KalmError: The service failed, or serves another space than at the start.
        """
        client, total = self.client, len(texts.texts)
        builder = ArrayBuilder(
            total, client.vector_dimensions, client.config.vector_dtype, client.vector_identity
        )
        with _named(self.name), progress_bar(total, f"{self.name}, {role}") as advance:
            try:  # not embed(), whose timeout is for all texts together
                for part in client.iter_embed(texts.texts, role=role):
                    builder.add(part)
                    advance(len(part))
            except InvalidInputError as error:
                if not error.invalid:
                    raise
                bad = [f"{texts.names[one.index]} {one.reason}" for one in error.invalid]
                raise ConfigurationError(
                    f"{'; '.join(bad[:5])} ({len(bad)} in all). Fix or remove these texts, or add "
                    "truncate=end to cut long ones."
                ) from error
            vectors = builder.result().vectors
        # Of unit length before the transfer in float16, which is too coarse to order documents.
        lengths: Vectors = np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors / lengths


@contextmanager
def connected(specs: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[list[System]]:
    """Start all services at the same time, and close the clients at the end.

    Args:
        specs: Name and client arguments of each system.

    Raises:
        ConfigurationError: Arguments that cannot work; no service was started.
        KalmError: A service cannot be reached, or does not start.
    """
    probes = []
    for name, options in specs:
        service = {key: value for key, value in options.items() if key not in _SEARCH}
        with _named(name):
            probe = KalmClient(**{**_COMMON, **service, "dimensions": None})
        probes.append((name, options, probe))
    _check_keys(probes)
    with ThreadPoolExecutor(len(probes)) as pool:
        systems = list(pool.map(lambda probe: _connect(*probe), probes))
    try:
        yield systems
    finally:
        for system in systems:
            system.client.close()


def _check_keys(probes: Sequence[tuple[str, dict[str, Any], KalmClient]]) -> None:
    """Refuse to send KALM_API_KEY to another host than the one it belongs to."""
    owners = _hosts(os.environ.get("KALM_BASE_URL", "").split(","))
    for name, options, probe in probes:
        config = probe.config
        if config.base_url is None or config.api_key is None or "api_key" in options:
            continue
        hosts = _hosts(config.base_urls)
        owners = owners or hosts
        if not hosts <= owners:
            raise ConfigurationError(
                f"{name}: KALM_API_KEY is for {', '.join(sorted(owners))}. Add "
                "api_key_variable=NAME, which names the variable with this system's key, or unset "
                "KALM_API_KEY."
            )


def _hosts(urls: Sequence[str]) -> set[str]:
    return {host for url in urls if (host := urlsplit(url.strip()).hostname)}


def _connect(name: str, options: dict[str, Any], probe: KalmClient) -> System:
    with _named(name), probe:
        mismatch = None
        try:
            probe.warm_up()
        except IdentityMismatchError as error:  # another model than KaLM, which is fine here
            mismatch = error
        identity = background_loop().submit(describe_service(probe.config)).result().identity
        if mismatch and (identity is None or probe.config.model not in (None, identity.model)):
            raise mismatch
        served = {"model": identity.model, "expected_identity": identity} if identity else {}
        return System(name, KalmClient(**{**_COMMON, **options, **served}), identity, repr(probe))


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except KalmError as error:
        error.args = (f"{name}: {error.args[0] if error.args else ''}",)
        raise
