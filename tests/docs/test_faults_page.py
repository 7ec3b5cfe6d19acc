"""The table "Faults" of docs/errors.md: each failure is caused again."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import fault_matrix
import pytest


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.slow
def test_the_page_is_what_happens() -> None:
    assert fault_matrix.page().splitlines() == fault_matrix.PAGE.read_text().splitlines()
