"""The two deployments that are compared: who they are, and their vectors of the user's texts."""

from __future__ import annotations

import asyncio
import ipaddress
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal, Self
from urllib.parse import urlsplit

from kalm_integrations.client import KalmClient
from kalm_integrations.errors import (
    ConfigurationError,
    IdentityMismatchError,
    InvalidInputError,
    KalmError,
)
from kalm_integrations.evaluation.agreement import Vectors
from kalm_integrations.evaluation.texts import Texts
from kalm_integrations.event_loop import background_loop
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import Role
from kalm_integrations.result import ArrayBuilder
from kalm_integrations.transports.base import describe_service

Name = Literal["baseline", "candidate"]

_APP: Final = re.compile(r"[^\s:/]*")


@dataclass(frozen=True, slots=True)
class Deployment:
    """One side of a comparison.

    Attributes:
        name: Which.
        where: Its URL, or its app's name on Modal.
        client: Accepts exactly the space that the service reported when it was asked.
        space: That space; None if it reports none.
    """

    name: Name
    where: str
    client: KalmClient
    space: SpaceIdentity | None

    @property
    def model(self) -> str:
        """Its name."""
        return self.client.served_model

    def embed(self, texts: Texts, role: Role, advance: Callable[[int], object]) -> Vectors:
        """The vectors of all `texts`, in the type that travels.

        Raises:
            ConfigurationError: The model takes some of them not; they are named by their places.
            KalmError: The service failed, or serves another space than before.
        """
        client = self.client
        assembly = ArrayBuilder(
            len(texts),
            client.vector_dimensions,
            client.config.vector_dtype,
            client.vector_identity,
        )
        with self.blamed():
            try:
                # Not embed(): its timeout is for the whole call, and a corpus may take longer.
                for part in client.iter_embed(texts.texts, role=role):
                    assembly.add(part)
                    advance(len(part))
            except InvalidInputError as error:
                if not error.invalid:
                    raise
                raise texts.refuse(error.invalid) from error
            return assembly.result().packed

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """An error that leaves this block says whose it is."""
        with _blamed(self.name, self.where):
            yield

    def close(self) -> None:
        """Close its connections."""
        self.client.close()


def may_sleep(where: str) -> bool:
    """Whether to ask a deployment may start what is paid: not on this machine, nor in one's own
    network, where an address is a private one or a name without a dot."""
    if "://" not in where:
        return True
    try:
        host = urlsplit(where).hostname or ""
        return not ipaddress.ip_address(host).is_private
    except ValueError:  # a name
        return "." in host


def connect(baseline: str, candidate: str, dimensions: int | None) -> list[Deployment]:
    """Wake both, at the same time, and ask each who it is.

    Args:
        baseline: A URL, or an app's name on Modal.
        candidate: The same.
        dimensions: Of all vectors; None is what KALM_DIMENSIONS says, or the native number.

    Returns:
        The baseline and the candidate.

    Raises:
        ConfigurationError: An argument or a variable cannot work, or they serve two models.
        KalmError: One of them cannot be reached, or does not start.
    """
    # Both clients first: what is wrong with one shows before the other wakes anything.
    asking = [_Asking.make("baseline", baseline), _Asking.make("candidate", candidate)]

    async def all_of_them() -> list[Deployment]:
        return [*await asyncio.gather(*(each.connected(dimensions) for each in asking))]

    one, other = asyncio.run(all_of_them())
    if one.model != other.model:
        raise ConfigurationError(
            f"the baseline serves {one.model}, the candidate {other.model}: rankings by two "
            "models differ by far more than by a quantization. Name two deployments of one model."
        )
    return [one, other]


@dataclass(frozen=True, slots=True)
class _Asking:
    """A deployment of which nobody has asked yet what it serves."""

    name: Name
    where: str
    arguments: dict[str, Any]
    client: KalmClient

    @classmethod
    def make(cls, name: Name, where: str) -> Self:
        if "://" not in where and not _APP.fullmatch(where):
            raise ConfigurationError(
                f"--{name} {where}: this is neither a URL nor an app's name. Did you mean "
                f"http://{where} ?"
            )
        arguments: dict[str, Any] = {"backend": "modal", "app_name": where, "base_url": None}
        if "://" in where:
            arguments = {"backend": "http", "base_url": where}
        # What a client expects by default, or by a variable, is one space; here are two by design.
        arguments |= {"expected_identity": None, "show_progress": False}
        with _blamed(name, where):
            return cls(name, where, arguments, KalmClient(**arguments, dimensions=None))

    async def connected(self, dimensions: int | None) -> Deployment:
        with _blamed(self.name, self.where):
            served = await self._served()
            arguments = dict(self.arguments)
            if served is not None:
                arguments |= {"model": served.model, "expected_identity": served}
            if dimensions is not None:
                arguments |= {"dimensions": dimensions}
            return Deployment(self.name, self.where, KalmClient(**arguments), served)

    async def _served(self) -> SpaceIdentity | None:
        async with self.client as client:
            mismatch = None
            try:
                await client.awarm_up()
            except IdentityMismatchError as error:
                mismatch = error
            description = await asyncio.wrap_future(
                background_loop().submit(describe_service(client.config))
            )
            served = description.identity
        if mismatch and served and client.config.model not in (None, served.model):
            raise mismatch  # KALM_MODEL asks for another
        return served


@contextmanager
def _blamed(name: Name, where: str) -> Iterator[None]:
    try:
        yield
    except KalmError as error:
        error.args = (f"the {name}, {where}: {error.args[0] if error.args else ''}",)
        raise
