"""Runs `kalm doctor` in this process, and reads what it prints, in either of its forms."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest

from kalm_integrations.cli import main

SECRETS = {
    "KALM_API_KEY": "hunter2-a",
    "KALM_MODAL_KEY": "hunter2-b",
    "KALM_MODAL_SECRET": "hunter2-c",
}
NEVER_SHOWN = ("hunter2", "as-emulated", "ws-emulated")
"""The wrong secrets of tests, and the right ones of the emulated Modal."""


@dataclass(frozen=True)
class Diagnosis:
    """What one run ended with."""

    exit_status: int
    shown: str
    errors: str
    """On stderr: with --json, what is waited for."""
    found: dict[str, tuple[str, str]]
    """Check → its status, and its detail and remedy, white space made one space."""
    summary: str

    def status(self, *names: str) -> list[str]:
        return [self.found[name][0] for name in names]

    def text(self, name: str) -> str:
        return self.found[name][1]

    @property
    def failed(self) -> list[str]:
        return [name for name, (status, _) in self.found.items() if status == "fail"]


class Doctor:
    """Examines the environment of this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str], *, as_json: bool) -> None:
        self._capfd = capfd
        self.as_json = as_json

    def __call__(self, *arguments: str) -> Diagnosis:
        self._capfd.readouterr()
        status = main(["doctor", *arguments, *(["--json"] if self.as_json else [])])
        shown, errors = self._capfd.readouterr()
        assert not [secret for secret in NEVER_SHOWN if secret in shown + errors]
        assert re.fullmatch(r"(  (waiting|meanwhile) .*\n)*" if self.as_json else "", errors)
        found, summary = read(shown) if self.as_json else read_text(shown)
        failed = [name for name, (state, _) in found.items() if state == "fail"]
        assert status == bool(failed)
        if failed:
            assert summary.startswith(f"{len(failed)} problem")
            assert ", ".join(failed) in summary
            assert all("→" in text for state, text in found.values() if state == "fail")
        else:
            assert summary.startswith("All good")
        return Diagnosis(status, shown, errors, found, summary)


def read(shown: str) -> tuple[dict[str, tuple[str, str]], str]:
    """The JSON form."""
    document = json.loads(shown)
    found = {}
    for check in document["checks"]:
        assert check.keys() == {"name", "status", "detail", "remedy", "seconds"}
        text = f"{check['detail']} → {check['remedy']}" if check["remedy"] else check["detail"]
        found[check["name"]] = (check["status"], " ".join(text.split()))
    assert document["ok"] == all(status != "fail" for status, _ in found.values())
    return found, document["summary"]


def read_text(shown: str) -> tuple[dict[str, tuple[str, str]], str]:
    """The form for people."""
    marks = {"✓": "ok", "!": "warn", "✗": "fail", "-": "skipped"}
    lines, _, summary = shown.partition("\n\n")
    blocks = re.split(
        r"^(?=[✓!✗-] )", re.sub(r"^  waiting .*\n", "", lines, flags=re.M), flags=re.M
    )
    found = {}
    for block in blocks[1:]:
        name, text = block[2:16].strip(), block[16:]
        found[name] = (marks[block[0]], " ".join(text.split()))
    return found, " ".join(summary.split())
