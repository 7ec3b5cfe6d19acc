"""A first start whose weights come from slow storage, with real vLLM and a tiny checkpoint.

A plugin of vLLM's makes each read of a tensor in the engine core last as long as it would at a
given number of bytes a second. That stands for a throttled folder: to throttle a real one takes
root (control groups, device-mapper) or a device that containers lack (FUSE), and a pipe cannot be
mapped into memory, as safetensors files are. Everything else is real: Modal's client and container
runtime, our life cycle with its limits, vLLM's processes, the files. The cloud is an emulator.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import modal
import pytest
from modal_emulator import Emulator
from modal_emulator.container import Container
from throttled_weights import BEGUN, BYTES_PER_SECOND, install
from tiny_models import in_hub_cache

from kalm_integrations import KalmClient
from kalm_integrations.errors import DeadlineExceededError
from kalm_integrations.options import STARTUP_TIMEOUT
from modal_backend.engines.vllm.process import READY_TIMEOUT

ROOT = Path(__file__).parents[2]
MODEL = "kalm-tests/tiny-gemma"
APP, CLASS = "vllm-embedding-snapshot", "VLLMEmbeddingSnapshot"
LIMIT = 12
"""Seconds of a load, in the first container."""
SECONDS = 3
"""That reading the weights takes in the restored one."""
PATIENCE = 8
"""Seconds that impatient callers wait."""


@dataclass
class Start:
    """What was seen of one start."""

    container: Container
    described: dict[str, Any]
    dimensions: int
    impatient: BaseException | None
    diagnosis: dict[str, Any]
    client_log: list[str]


@pytest.fixture(scope="module")
def start(gemma: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """The first container reads so slowly that no load ends in time; the one that is restored from
    its snapshot has faster storage and a longer limit."""
    size = sum(file.stat().st_size for file in gemma.rglob("*.safetensors"))
    too_slow = {BYTES_PER_SECOND: str(size // (20 * LIMIT)), READY_TIMEOUT: str(LIMIT)}
    slow = {BYTES_PER_SECOND: str(size // SECONDS), READY_TIMEOUT: "600"}
    # As on one GPU: the core runs the model itself.
    alone = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    with (
        Emulator(
            stop_grace=30,
            container_path=[install(tmp_path_factory.mktemp("plugin") / "path")],
            container_env=alone | too_slow,
            restore_env=slow,
        ) as emulator,
        pytest.MonkeyPatch.context() as patch,
        emulator.in_this_process(patch),
    ):
        emulator.deploy(
            "modal_backend.app",
            cwd=ROOT,
            env={
                "KALM_DEPLOY_MODEL": MODEL,
                "KALM_DEPLOY_ENFORCE_EAGER": "1",
                # On a busy machine callers that wait would start a second one.
                "KALM_DEPLOY_MAX_CONTAINERS": "1",
            },
        )
        in_hub_cache(gemma, emulator.volume("hf-embedding-cache") / "hub", MODEL)
        with Records() as records, ThreadPoolExecutor(2) as threads:
            call = threads.submit(client(timeout=400).embed, ["a text"])
            impatient = threads.submit(client(timeout=PATIENCE).warm_up)
            diagnosis = doctor(emulator)
            dimensions = call.result().vectors.shape[1]
        (container,) = emulator.containers(f"{APP}/{CLASS}")  # no start failed
        described = modal.Cls.from_name(APP, CLASS)().describe.remote()
        yield Start(
            container,
            described,
            dimensions,
            impatient.exception(),
            diagnosis,
            records.messages,
        )
        emulator.stop_app(APP)


class Records(logging.Handler):
    """Warnings of the client's, of all threads."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())

    def __enter__(self) -> Records:
        logging.getLogger("kalm_integrations").addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("kalm_integrations").removeHandler(self)


def client(**options: Any) -> KalmClient:
    return KalmClient(backend="modal", model=MODEL, max_retries=1, **options)


def doctor(emulator: Emulator) -> dict[str, Any]:
    variables = {"KALM_BACKEND": "modal", "KALM_MODEL": MODEL, "KALM_TIMEOUT": str(PATIENCE)}
    done = subprocess.run(
        [sys.executable, "-m", "kalm_integrations.cli", "doctor", "--wake", "--json"],
        env={**os.environ, **emulator.client_env, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    diagnosis: dict[str, Any] = json.loads(done.stdout)
    return diagnosis


def test_slow_loads_fail_twice_without_killing_the_container(start: Start) -> None:
    """Two are tried, for which the start has time; nothing is raised in `enter`."""
    phases = start.described["phases"]
    assert list(phases) == ["load", "load_again", "load_again_again", "warm_up", "canary"]
    assert min(phases["load"], phases["load_again"]) >= LIMIT
    assert {"checkpoint", "restore", "ready"} <= start.container.events.keys()
    assert "startup-timeout" not in start.container.events


def test_the_warning_names_the_limit_and_the_option(start: Start) -> None:
    (warning,) = start.described["warnings"]
    assert warning["code"] == "snapshot_without_engine"
    for text in (warning["message"], start.container.log):
        assert f"not ready within {LIMIT} s ({READY_TIMEOUT})" in text
        assert "--startup-timeout" in text


def test_a_slow_load_within_the_limit_succeeds(start: Start) -> None:
    assert start.dimensions == 128
    assert start.described["restored"]
    assert start.described["phases"]["load_again_again"] >= SECONDS
    assert f"{BEGUN} at " in start.container.log


def test_waiting_clients_log_where_to_watch_the_start(start: Start) -> None:
    look = f"modal app logs {APP} -f"
    assert any("may be starting" in line and look in line for line in start.client_log)
    assert "phase load begins" in start.container.log


def test_a_short_timeout_names_the_timeout_of_a_first_start(start: Start) -> None:
    assert isinstance(start.impatient, DeadlineExceededError)
    assert "may still be starting" in str(start.impatient)
    assert f"warm_up(timeout={STARTUP_TIMEOUT:g})" in str(start.impatient)


def test_the_doctor_reports_the_slow_start(start: Start) -> None:
    (container,) = (c for c in start.diagnosis["checks"] if c["name"] == "container")
    assert container["status"] == "fail"
    assert "may still be starting" in container["detail"]
    assert "KALM_TIMEOUT" in container["remedy"]
    assert not start.diagnosis["ok"]
