"""`modal run -m modal_backend.app`: what a deployment does, seen from a client."""

from __future__ import annotations

import statistics
import time
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from kalm_integrations import reference
from kalm_integrations.client import KalmClient
from kalm_integrations.errors import KalmError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.options import FIRST_START
from kalm_integrations.transports.modal import deployed
from modal_backend.settings import DeploySettings

QUESTION: Final = "Warum geht Brot auf?"
ANSWER: Final = "Bread rises because yeast gives off gas."
OTHER: Final = "The Nile flows through eleven countries."
_TIMED: Final = 10


def prove(settings: DeploySettings) -> None:
    """Call the deployed class over RPC, and print a table.

    Args:
        settings: Name the app, and the engine whose identity is expected.

    Raises:
        SystemExit: It is not deployed, does not start, or serves other vectors.
    """
    try:
        _prove(_client(settings), settings)
    except KalmError as error:
        # Modal would show it at the end of a page of traceback.
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def _client(settings: DeploySettings) -> KalmClient:
    arguments: dict[str, Any] = {"app_name": settings.app_name, **settings.client_arguments}
    return KalmClient(backend="modal", **arguments)


def _prove(client: KalmClient, settings: DeploySettings) -> None:
    start = time.perf_counter()
    identity = client.warm_up(timeout=max(client.config.timeout, FIRST_START))
    first = time.perf_counter() - start
    query = client.embed([QUESTION], role="query").vectors[0]
    related, unrelated = client.embed([ANSWER, OTHER]).vectors @ query
    seconds = []
    for number in range(_TIMED):
        start = time.perf_counter()
        client.embed([f"{QUESTION} {number}"], role="query")
        seconds.append(time.perf_counter() - start)
    (plain,) = deployed(client.config).embed.remote([ANSWER])
    described = deployed(client.config).describe.remote()
    verdict = _reference(client, SpaceIdentity.from_dict(described["identity"]))

    table = Table(
        title=f"{settings.app_name}, class {client.config.class_name}", title_justify="left"
    )
    table.add_column("")
    table.add_column("", overflow="fold")
    table.add_row("model", identity.space.model)
    table.add_row("revision", identity.space.revision)
    table.add_row("identity", f"{identity.space.fingerprint} (the space)")
    table.add_row("dimensions", str(len(plain)))
    table.add_row("cosine", f"{related:.3f} to its answer, {unrelated:.3f} to another text")
    if verdict is not None:
        table.add_row("reference texts", str(verdict))
    table.add_row("first answer", f"{first:.2f} s")
    table.add_row("one query", f"{1000 * statistics.median(seconds):.0f} ms, median of {_TIMED}")
    for phase, taken in described["phases"].items():
        table.add_row(f"start: {phase}", f"{taken:.2f} s")
    Console(highlight=False).print(table)
    if related <= unrelated:
        raise SystemExit("the answer is not nearer than another text: these vectors are wrong")
    if verdict is not None and verdict.failures:
        raise SystemExit("the reference texts have other vectors than KaLM's: these are wrong")


def _reference(client: KalmClient, space: SpaceIdentity) -> reference.Verdict | None:
    """Of the service of `space`; None if it has another model."""
    if not reference.applies_to(space):
        return None
    return reference.judge(reference.embed(client), space.quantization)
