"""What the doctor prints. No secret is in it, whoever said it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Final
from urllib.parse import urlsplit
from urllib.request import getproxies

from kalm_integrations.doctor.checks import Finding, Patient, Status
from kalm_integrations.terminal import printable, wrapped
from kalm_integrations.version import __version__

_MARKS: Final[dict[Status, str]] = {"ok": "✓", "warn": "!", "fail": "✗", "skipped": "-"}
_MARGIN: Final = 16
_TOOK_LONG: Final = 0.5  # seconds that a line mentions
_SECRETS: Final = (
    "KALM_API_KEY",
    "KALM_MODAL_KEY",
    "KALM_MODAL_SECRET",
    "MODAL_TOKEN_ID",
    "MODAL_TOKEN_SECRET",
)


def lines(finding: Finding) -> str:
    """A check for people: mark, name, detail; then what to do."""
    first, *more = finding.detail.splitlines() or [""]
    took = f" ({finding.seconds:.1f} s)" if finding.seconds >= _TOOK_LONG else ""
    remedy = [f"→ {finding.remedy}"] if finding.remedy else []
    head = f"{_MARKS[finding.status]} {finding.name}".ljust(_MARGIN)
    margin = " " * _MARGIN
    return "\n".join([wrapped(first + took, head), *(wrapped(x, margin) for x in more + remedy)])


def document(findings: Iterable[Finding], patient: Patient) -> str:
    """All of it as JSON; docs/doctor.md has the fields."""
    made = patient.configured
    content = {
        "ok": good(findings),
        "summary": summary(findings, patient),
        "version": __version__,
        "backend": made.resolved_backend if made else None,
        "wake": patient.wake,
        "checks": [asdict(finding) for finding in findings],
    }
    return json.dumps(content, indent=2)


def good(findings: Iterable[Finding]) -> bool:
    """Whether no check failed."""
    return all(finding.status != "fail" for finding in findings)


def summary(findings: Iterable[Finding], patient: Patient) -> str:
    """How it is, and what to do first."""
    failed = [finding for finding in findings if finding.status == "fail"]
    warned = [finding.name for finding in findings if finding.status == "warn"]
    if failed:
        problems = "1 problem" if len(failed) == 1 else f"{len(failed)} problems"
        return f"{problems}: {', '.join(f.name for f in failed)}. First: {failed[0].remedy}"
    said = f"All good, but look at: {', '.join(warned)}." if warned else "All good."
    asleep = patient.on_modal and not patient.wake
    return said + (" Nothing was woken; `kalm doctor --wake` has it embed." if asleep else "")


def clean(finding: Finding) -> Finding:
    """Without secrets, and without anything that could steer a terminal.

    Much of it was said by others: servers that repeat a wrong key, libraries that show a URL.
    """
    return replace(finding, detail=_clean(finding.detail), remedy=_clean(finding.remedy))


def _clean(text: str) -> str:
    for secret in _secrets():
        text = text.replace(secret, "***")
    return printable(text)


def _secrets() -> list[str]:
    """The longest first: one may be a part of another."""
    values = {os.environ.get(name, "").strip() for name in _SECRETS}
    values |= {urlsplit(proxy).password or "" for proxy in getproxies().values()}
    return sorted(values - {""}, key=len, reverse=True)
