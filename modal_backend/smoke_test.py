"""`modal run -m modal_backend.app`: checks a deployment from a client and prints a table."""

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
_QUERIES: Final = 10


def run(settings: DeploySettings) -> None:
    """Call the deployed class over RPC and print the results.

    Args:
        settings: Of the deployment.

    Raises:
        SystemExit: It is not deployed, does not start, or serves wrong vectors.
    """
    try:
        _run(settings)
    except KalmError as error:
        # Modal would print a page of traceback above it.
        raise SystemExit(f"{type(error).__name__}: {error}") from None


def _run(settings: DeploySettings) -> None:
    arguments: dict[str, Any] = {"app_name": settings.app_name, **settings.client_arguments}
    client = KalmClient(backend="modal", **arguments)
    start = time.perf_counter()
    identity = client.warm_up(timeout=max(client.config.timeout, FIRST_START))
    first = time.perf_counter() - start
    query = client.embed([QUESTION], role="query").vectors[0]
    related, unrelated = client.embed([ANSWER, OTHER]).vectors @ query
    durations = []
    for number in range(_QUERIES):
        start = time.perf_counter()
        client.embed([f"{QUESTION} {number}"], role="query")
        durations.append(time.perf_counter() - start)
    (vector,) = deployed(client.config).embed.remote([ANSWER])
    description = deployed(client.config).describe.remote()
    space, verdict = SpaceIdentity.from_dict(description["identity"]), None
    if reference.applies_to(space):
        verdict = reference.judge(reference.embed(client), space.quantization)

    title = f"{settings.app_name}, class {client.config.class_name}"
    table = Table(title=title, title_justify="left")
    table.add_column("")
    table.add_column("", overflow="fold")
    table.add_row("model", identity.space.model)
    table.add_row("revision", identity.space.revision)
    table.add_row("identity", f"{identity.space.fingerprint} (the space)")
    table.add_row("dimensions", str(len(vector)))
    table.add_row("cosine", f"{related:.3f} to its answer, {unrelated:.3f} to another text")
    if verdict is not None:
        table.add_row("reference texts", str(verdict))
    table.add_row("first answer", f"{first:.2f} s")
    median = 1000 * statistics.median(durations)
    table.add_row("one query", f"{median:.0f} ms, median of {_QUERIES}")
    for phase, seconds in description["phases"].items():
        table.add_row(f"start: {phase}", f"{seconds:.2f} s")
    Console(highlight=False).print(table)
    if related <= unrelated:
        raise SystemExit("the answer is not nearer than another text: these vectors are wrong")
    if verdict is not None and verdict.failures:
        raise SystemExit("the reference texts have other vectors than KaLM's: these are wrong")
