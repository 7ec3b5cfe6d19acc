import os
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
