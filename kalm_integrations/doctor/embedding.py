"""What only a running service can tell: its identity, its vectors, its speed."""

from __future__ import annotations

import statistics
import time
from typing import Final

import numpy as np

from kalm_integrations import reference
from kalm_integrations.client import KalmClient
from kalm_integrations.doctor.checks import Check, Finding, Patient
from kalm_integrations.errors import (
    EngineLoadError,
    IdentityMismatchError,
    InvalidResponseError,
)
from kalm_integrations.event_loop import background_loop
from kalm_integrations.install_hints import install_command
from kalm_integrations.models import KALM
from kalm_integrations.options import STARTUP_TIMEOUT
from kalm_integrations.transports.base import describe_service

QUESTION: Final = "How tall is K2?"
RELATED: Final = "K2 is 8,611 metres high."
UNRELATED: Final = "Bread rises because yeast gives off gas."
_QUERIES: Final = 5
_SILENCE: Final = (
    "See the service's own log (on Modal: `modal app logs APP --since 1h`, with the app's name). "
    f"Unset KALM_TIMEOUT: on Modal `--wake` then waits for up to {STARTUP_TIMEOUT:g} s. Elsewhere, "
    "raise KALM_TIMEOUT if a start takes longer."
)
_IF_BF16: Final = (
    "If the service computes in bf16, which it does not say, these are not KaLM's vectors: check "
    "its revision, pooling and tokenizer, and store nothing of it before."
)


_WARNED: Final = {
    "snapshot_without_engine": "See in the service's log (`modal app logs APP --since 1h`) why the "
    "first load failed, fix that, then run `kalm deploy` again: that discards the snapshots, and "
    "the next start makes a new one.",
    "canary_failed": "Store no vectors of this service. See its log, run the download of the "
    "weights again, then `kalm deploy`; without `--canary warn` such an engine is not served.",
    "restore_failed": "Nothing, if it happens once. If it happens at each start, run `kalm deploy` "
    "again; if that does not help, with `--snapshot off`.",
}
"""What to do about a warning of the service, by its code."""


def checks(door: str, patient: Patient, needs: tuple[str, ...]) -> list[Check]:
    """The last ones of every backend. `door` names the first, which may wake the service."""
    made = [
        Check(door, _first_answer, needs=needs, wakes=True, silence=_SILENCE),
        Check("identity", _identity, needs=(door,), wakes=True, silence=_SILENCE),
        Check("warnings", _warnings, needs=("identity",)),
        Check("vectors", _vectors, needs=("identity",), wakes=True, silence=_SILENCE),
        Check("latency", _latency, needs=("vectors",), wakes=True, silence=_SILENCE),
    ]
    if patient.reference:
        made.append(Check("golden", _reference, needs=("vectors",), wakes=True, silence=_SILENCE))
    return made


def _first_answer(patient: Patient) -> Finding:
    started = time.perf_counter()
    patient.client = KalmClient(timeout=patient.limit, show_progress=False)
    try:
        patient.client.warm_up()
    except IdentityMismatchError as error:  # the next check's
        patient.mismatch = error
    except EngineLoadError as error:
        if patient.settings.resolved_backend != "local":
            raise
        return Finding.fail(error.message, f"Run {install_command('local')}")
    patient.first = time.perf_counter() - started
    return Finding.ok("the service answers, and lets this client in")


def _identity(patient: Patient) -> Finding:
    if patient.mismatch is not None:
        raise patient.mismatch
    settings = patient.settings
    description = background_loop().submit(describe_service(settings)).result()
    served, patient.warnings = description.identity, description.warnings
    patient.served = served
    if served is None:
        return Finding.warn(
            "the service reports no identity: only its model's name, the dimensions and the "
            "vectors' length can be checked",
            "Serve with `kalm deploy` or `kalm serve`, or make sure yourself which revision and "
            "quantization run there, and never change them under an index.",
        )
    compared = "as expected" if settings.expected_space.declared else "of the expected model"
    return Finding.ok(f"{served.model} ({served.fingerprint}), {compared}")


def _warnings(patient: Patient) -> Finding:
    """What the service reports of itself; asks nobody again."""
    if not patient.warnings:
        return Finding.ok("the service reports none")
    detail = "\n".join(f"{each.code}: {each.message}" for each in patient.warnings)
    worst = min(patient.warnings, key=lambda warning: warning.code == "restore_failed")
    remedy = _WARNED.get(worst.code, _SILENCE)
    if {each.code for each in patient.warnings} == {"restore_failed"}:
        return Finding.warn(detail, remedy)
    return Finding.fail(detail, remedy)


def _vectors(patient: Patient) -> Finding:
    query = patient.embeds.embed([QUESTION], role="query").vectors[0]
    documents = patient.embeds.embed([RELATED, UNRELATED]).vectors
    near, far = documents @ query
    length = float(np.linalg.norm(query))
    shown = (
        f"{len(query)} dimensions, length {length:.3f}; question and answer {near:.2f}, "
        f"question and another text {far:.2f}"
    )
    return Finding.ok(shown) if near > far else Finding.fail(shown, InvalidResponseError.remedy)


def _latency(patient: Patient) -> Finding:
    took = []
    for number in range(_QUERIES):
        started = time.perf_counter()
        patient.embeds.embed([f"{QUESTION} {number}"], role="query")
        took.append(time.perf_counter() - started)
    usual = statistics.median(took) * 1000
    return Finding.ok(
        f"{patient.first:.1f} s to the first answer, any start included; then {usual:.0f} ms a "
        f"query (median of {_QUERIES})"
    )


def _reference(patient: Patient) -> Finding:
    served, expected = patient.served, patient.settings.expected_space
    if not reference.applies_to(served or expected):
        detail = f"nobody knows what {expected.model} should give for the reference texts of KaLM"
        return Finding(status="skipped", detail=detail)
    vectors = reference.embed(patient.embeds)
    verdict = reference.judge(vectors, served.quantization if served else None)
    if verdict.failures:
        return Finding.fail(str(verdict), InvalidResponseError.remedy)
    if served is None:  # what it computes in, it does not tell either: should that be bf16, ...
        verdict = reference.judge(vectors, KALM.space.quantization)
        if verdict.failures:
            return Finding.warn(str(verdict), _IF_BF16)
    return Finding.ok(str(verdict))
