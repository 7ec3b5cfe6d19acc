"""`kalm doctor`: what an application in this environment would meet, check by check.

Reads the same KALM_* variables as the client. Starts no container unless told to.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from kalm_integrations.doctor import checks, here, report
from kalm_integrations.doctor.checks import Check, Finding, Patient
from kalm_integrations.terminal import wrapped, write


def run(*, wake: bool, as_json: bool, reference: bool = False) -> bool:
    """Check, and print what was found.

    Args:
        wake: Have the service embed, even where that starts a container, which costs money.
        as_json: Print one JSON document instead of text; what is waited for goes to stderr.
        reference: Have it embed the reference texts too, for which it is woken.

    Returns:
        Whether no check failed.
    """
    patient = Patient(wake=wake or reference, reference=reference)
    findings: dict[str, Finding] = {}
    waits = patient.wake
    notices = sys.stderr if as_json else sys.stdout
    with _quiet():
        for check in _checks(patient):
            found = checks.skipped(check, patient, findings)
            if found is None and check.wakes and waits:
                limit = f"{patient.limit:g} s (KALM_TIMEOUT sets it)"
                write(f"  waiting for the service, for up to {limit}", notices)
                if patient.on_modal:
                    app = patient.settings.app_name
                    shows = f"  meanwhile `modal app logs {app} -f` shows the phases of a start"
                    write(shows, notices)
                waits = False
            found = report.clean(found or checks.made(check, patient))
            findings[check.name] = found
            if not as_json:
                write(report.lines(found))
        if patient.client is not None:
            patient.client.close()
    if as_json:
        write(report.document(findings.values(), patient))
    else:
        write("\n" + wrapped(report.summary(findings.values(), patient)))
    return report.good(findings.values())


def _checks(patient: Patient) -> Iterator[Check]:
    """In order. Which ones follow those of this machine, its settings decide."""
    yield from here.HERE
    if patient.configured is None:
        yield Check("service", here.settings, needs=("settings",))
        return
    backend = patient.settings.resolved_backend
    if backend == "local":
        from kalm_integrations.doctor import embedding

        yield from embedding.checks("engine", patient, needs=("settings",))
        return
    if backend == "modal":
        from kalm_integrations.doctor import on_modal

        yield from on_modal.over_rpc(patient)
        return
    from kalm_integrations.doctor import over_http

    if patient.settings.base_url is None:
        from kalm_integrations.doctor import on_modal

        yield from on_modal.to_the_endpoint()
    yield from over_http.checks(patient)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the package's log lines: what they tell is in the findings."""
    log, silent = logging.getLogger("kalm_integrations"), logging.NullHandler()
    log.addHandler(silent)  # in place of the one of last resort, which writes to stderr
    try:
        yield
    finally:
        log.removeHandler(silent)
