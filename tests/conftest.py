import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["MODAL_CONFIG_PATH"] = os.devnull  # read when modal is imported; nobody's own settings

import hypothesis
import pytest
from scripted import ScriptedTransport

from kalm_integrations import KalmClient, retry

# How long an example takes is the machine's matter.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")


_STARTS = {"subprocess.Popen", "os.fork", "os.posix_spawn", "os.exec"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="skip slow tests; start no process")


_LONGEST = (
    *("bulk_killed", "distributions", "endpoints", "rpc_errors", "bulk_on_modal", "types"),
    *("container_lifecycle", "first_deployment", "doctor_deployed", "notebooks", "examples"),
    *("deploy", "readme", "deploy_request", "image", "llama_index_caches", "exit", "cli"),
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first, so that both workers end at about the same time."""
    if config.getoption("--fast"):
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    rank = {f"test_{name}": place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_runtestloop(session: pytest.Session) -> None:
    """With --fast, a test that starts a process fails: it lacks its mark."""

    def refuse(event: str, _: tuple[Any, ...]) -> None:
        if event in _STARTS and "PYTEST_CURRENT_TEST" in os.environ:
            raise RuntimeError(f"{event} in a test that is not marked slow")

    if session.config.getoption("--fast"):
        sys.addaudithook(refuse)


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("KALM_"):
            monkeypatch.delenv(name)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.001)


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> Callable[..., KalmClient]:
    """A client (or adapter) whose requests go to a scripted transport."""

    def over(
        transport: ScriptedTransport, kind: type[KalmClient] = KalmClient, **settings: Any
    ) -> KalmClient:
        monkeypatch.setattr("kalm_integrations.dispatch.open_transport", lambda _: transport)
        return kind(backend="local", **settings)

    return over
