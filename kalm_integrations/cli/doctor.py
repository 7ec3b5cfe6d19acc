"""`kalm doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from cyclopts import Parameter

from kalm_integrations.cli import console
from kalm_integrations.cli.documents import DoctorReport
from kalm_integrations.cli.parameters import Json
from kalm_integrations.doctor import examine
from kalm_integrations.doctor.base import DoctorContext, Finding
from kalm_integrations.version import __version__


def doctor(
    *,
    wake: Annotated[
        bool,
        Parameter(help="Ask the service for vectors, even where that starts a paid container."),
    ] = False,
    reference: Annotated[
        bool,
        Parameter(help="--wake, and compare KaLM's vectors with published ones."),
    ] = False,
    golden: Annotated[bool, Parameter(show=False)] = False,
    json: Json = False,
) -> bool:
    """Run the checks; return whether none failed."""
    return run(DoctorContext(wake=wake or reference or golden, reference=reference or golden), json)


def run(context: DoctorContext, as_json: bool = False) -> bool:
    """Run the checks, printing each finding; return whether none failed."""
    output, notices = console.stdout(), console.stderr() if as_json else console.stdout()

    def notify(line: str) -> None:
        notices.print(f"  {line}", soft_wrap=True)

    findings = []
    for finding in examine(context, notify):
        findings.append(finding)
        if not as_json:
            console.print_finding(output, finding)
    document = _report(findings, context)
    if as_json:
        console.print_document(document)
    else:
        output.print(f"\n{document.summary}")
    return document.ok


def _report(findings: Sequence[Finding], context: DoctorContext) -> DoctorReport:
    failed = [finding for finding in findings if finding.status == "fail"]
    warned = ", ".join(finding.name for finding in findings if finding.status == "warn")
    if failed:
        problems = "1 problem" if len(failed) == 1 else f"{len(failed)} problems"
        names = ", ".join(finding.name for finding in failed)
        summary = f"{problems}: {names}. First: {failed[0].remedy}"
    else:
        summary = f"All good, but look at: {warned}." if warned else "All good."
        if context.scales_to_zero and not context.wake:
            summary += " No container was started; `kalm doctor --wake` has the service embed."
    return DoctorReport(
        ok=not failed,
        summary=summary,
        version=__version__,
        backend=context.config.resolved_backend if context.config else None,
        wake=context.wake,
        checks=list(findings),
    )
