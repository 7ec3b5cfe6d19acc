"""`kalm doctor`: what an application in this environment would meet, check by check.

Reads the same KALM_* variables as the client. Starts no container unless told to.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from kalm_integrations.doctor import machine, over_http, service
from kalm_integrations.doctor.base import Check, DoctorContext, Finding, redact, run_check, skip


def examine(context: DoctorContext, notify: Callable[[str], None]) -> Iterator[Finding]:
    """Run the checks one after the other; the findings hold no secret.

    Args:
        context: What may be done; the checks fill it.
        notify: Called with a line before a check that may wait for the service.
    """
    log, silent = logging.getLogger("kalm_integrations"), logging.NullHandler()
    log.addHandler(silent)  # the findings tell what the package logs
    findings: dict[str, Finding] = {}
    notified = not context.wake
    try:
        for check in _checks(context):
            finding = skip(check, context, findings)
            if finding is None and check.wakes and not notified:
                notify(f"waiting for the service, for up to {context.limit:g} s (KALM_TIMEOUT)")
                if context.scales_to_zero:
                    logs = f"modal app logs {context.settings.app_name} -f"
                    notify(f"meanwhile `{logs}` shows the phases of a start")
                notified = True
            finding = finding or run_check(check, context)
            texts = {name: redact(getattr(finding, name)) for name in ("detail", "remedy")}
            findings[check.name] = finding.model_copy(
                update={"name": check.name, "seconds": finding.seconds, **texts}
            )
            yield findings[check.name]
    finally:
        log.removeHandler(silent)
        if context.client is not None:
            context.client.close()


def _checks(context: DoctorContext) -> Iterator[Check]:
    """In order; the settings decide which ones follow those of this machine."""
    yield from machine.CHECKS
    if context.config is None:
        yield Check("service", machine.settings, needs=("settings",))
        return
    backend, base_url = context.settings.resolved_backend, context.settings.base_url
    if backend == "local":
        yield from service.checks("engine", context, "settings")
        return
    if backend == "modal" or base_url is None:
        from kalm_integrations.doctor import on_modal

        yield from on_modal.checks(context)
    if backend == "http":
        yield from over_http.checks(context)
