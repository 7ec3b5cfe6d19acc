"""The services that programs of `programs` talk to."""

from __future__ import annotations

from collections.abc import Iterator

import programs
import pytest
from programs import Service, over_http, services


@pytest.fixture(scope="module", params=["local", "http"])
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    with services(request.param) as service:
        yield service


@pytest.fixture(scope="module")
def local() -> Iterator[Service]:
    with programs.local() as service:
        yield service


@pytest.fixture(scope="module")
def http() -> Iterator[Service]:
    with over_http() as service:
        yield service
