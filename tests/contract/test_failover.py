"""Three services, one of them killed during a job: no vector is wrong, none is lost."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import psutil
import pytest
from serving import FaultyServer, packed, ready_url

from kalm_integrations import KalmClient
from kalm_integrations.errors import IdentityMismatchError
from kalm_integrations.models import EMBEDDED

pytestmark = pytest.mark.slow

KEY = "correct-horse"
TEXTS = [f"Text number {number} of a job." for number in range(1500)]


@pytest.fixture(scope="module")
def services() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Three `kalm serve` with the embedded engine, by their URLs."""
    command = [sys.executable, "-m", "kalm_integrations.cli", "serve", "--port", "0"]
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(
                    command,
                    env={**os.environ, "KALM_API_KEY": KEY},
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(3)
        ]
        for process in processes:
            stack.callback(process.kill)
        urls = {ready_url(process): process for process in processes}
        assert len(urls) == 3
        yield urls


def test_one_of_three_is_killed_during_a_job(
    services: dict[str, subprocess.Popen[str]], caplog: pytest.LogCaptureFixture
) -> None:
    expected = KalmClient(backend="local").embed(TEXTS).packed
    client = KalmClient(
        base_url=[*services],
        api_key=KEY,
        model=EMBEDDED.space.model,
        batch_size=8,
        max_concurrency=6,
        timeout=120,
    )
    victim = next(iter(services.values()))
    found = np.zeros_like(expected)
    seen = np.zeros(len(TEXTS), dtype=int)
    with caplog.at_level(logging.WARNING), client:
        for part in client.iter_embed(TEXTS):
            found[part.indices] = part.packed
            seen[part.indices] += 1
            if seen.sum() > len(TEXTS) // 3 and victim.poll() is None:
                for process in [*psutil.Process(victim.pid).children(True), victim]:
                    os.kill(process.pid, signal.SIGKILL)
                victim.wait()
        counts = client.count_tokens(TEXTS[:3])
    assert counts == KalmClient(backend="local").count_tokens(TEXTS[:3])
    assert (seen == 1).all()
    # Texts that are embedded together differ from the same ones alone by rounding.
    apart = np.abs(expected.astype("f4") - np.roll(expected, 1, axis=0)).max(axis=1).min()
    assert np.abs(found.astype("f4") - expected).max() < 0.002 < apart
    assert sum("requests go to the other servers" in line for line in caplog.messages) == 1


def test_servers_of_two_identities_are_refused() -> None:
    other = replace(EMBEDDED.space, revision="another")
    steps = [packed(lambda answer: replace(answer, identity=other))] * 9
    with FaultyServer() as right, FaultyServer(steps=steps) as wrong:
        client = KalmClient(
            base_url=[right.url, wrong.url], model=EMBEDDED.space.model, batch_size=1
        )
        with client, pytest.raises(IdentityMismatchError):
            client.embed(["a", "b", "c"])
