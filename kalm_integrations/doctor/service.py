"""Checks that need the running service: its identity, its vectors, its speed."""

from __future__ import annotations

import json
import shlex
import statistics
import time
from collections.abc import Callable
from typing import Final

from kalm_integrations import reference
from kalm_integrations.client import KalmClient
from kalm_integrations.doctor.base import Check, DoctorContext, Result, fail, skipped, warn
from kalm_integrations.errors import (
    EngineLoadError,
    IdentityMismatchError,
    InvalidResponseError,
)
from kalm_integrations.event_loop import background_loop
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.install_hints import install_command
from kalm_integrations.models import KALM, NAMED_SPACES
from kalm_integrations.options import STARTUP_TIMEOUT
from kalm_integrations.transports.base import describe_service

QUESTION: Final = "How tall is K2?"
TEXTS: Final = ("K2 is 8,611 metres high.", "Bread rises because yeast gives off gas.")
"""The answer, and another text."""
_QUERIES: Final = 5
_NO_ANSWER: Final = (
    "See the service's own log (on Modal: `modal app logs APP --since 1h`, with the app's name). "
    f"Unset KALM_TIMEOUT: on Modal `--wake` then waits for up to {STARTUP_TIMEOUT:g} s. Elsewhere, "
    "raise KALM_TIMEOUT if a start takes longer."
)
_IF_BF16: Final = (
    "If the service computes in bf16, which it does not say, these are not KaLM's vectors: check "
    "its revision, pooling and tokenizer before you store any."
)
_WARNINGS: Final = {
    "snapshot_without_engine": "See in the service's log (`modal app logs APP --since 1h`) why the "
    "first load failed, fix that, then run `kalm deploy` again: that discards the snapshots, and "
    "the next start makes a new one.",
    "canary_failed": "Store no vectors of this service. See its log, run the download of the "
    "weights again, then `kalm deploy`; without `--canary warn` such an engine is not served.",
    "restore_failed": "Nothing, if it happens once. If it happens at each start, run `kalm deploy` "
    "again; if that does not help, with `--snapshot off`.",
}
"""What to do about a warning of the service, by its code."""


def checks(first: str, context: DoctorContext, *needs: str) -> list[Check]:
    """The last checks of every backend. `first` names the one that may start a container."""
    looks: list[tuple[str, Callable[[DoctorContext], Result], tuple[str, ...]]] = [
        (first, _first_answer, needs),
        ("identity", _identity, (first,)),
        ("warnings", _warnings, ("identity",)),
        ("vectors", _vectors, ("identity",)),
        ("latency", _latency, ("vectors",)),
    ]
    if context.reference:
        looks.append(("reference", _reference, ("vectors",)))
    return [Check(*look, wakes=True, no_answer=_NO_ANSWER) for look in looks]


def mismatch_remedy(served: SpaceIdentity | None, expected: SpaceIdentity) -> str:
    """What to do where `served` is not `expected`; names the variable that accepts `served`."""
    correct = "correct KALM_BASE_URL or KALM_APP_NAME"
    never = "Vectors of two spaces must not meet in one index."
    if served is None:
        return f"{never} {correct[0].upper() + correct[1:]}, KALM_MODEL or KALM_EXPECTED_IDENTITY."
    variable = f"KALM_MODEL={served.model}"
    if served.model == expected.model:
        name = next((name for name, space in NAMED_SPACES.items() if space == served), None)
        variable = f"KALM_EXPECTED_IDENTITY={name or shlex.quote(json.dumps(served.to_dict()))}"
    return f"If these are the vectors that you want, set {variable}; otherwise {correct}. {never}"


def _first_answer(context: DoctorContext) -> Result:
    started = time.perf_counter()
    options = {**context.arguments, "timeout": context.limit, "show_progress": False}
    context.client = KalmClient(**options)
    try:
        context.client.warm_up()
    except IdentityMismatchError as error:  # the next check's
        context.mismatch = error
    except EngineLoadError as error:
        if context.settings.resolved_backend != "local":
            raise
        return fail(error.message, f"Run {install_command('local')}")
    context.first_answer = time.perf_counter() - started
    return "the service answers and accepts this client"


def _identity(context: DoctorContext) -> Result:
    config = context.settings
    context.description = background_loop().submit(describe_service(config)).result()
    served = context.description.identity
    if context.mismatch is not None:
        remedy = mismatch_remedy(served, config.expected_space)
        return fail(context.mismatch.message, remedy)
    if served is None:
        return warn(
            "the service reports no identity: only its model's name, the dimensions and the "
            "vectors' length can be checked",
            "Serve with `kalm deploy` or `kalm serve`, or make sure yourself which revision and "
            "quantization run there, and never change them under an index.",
        )
    expected = "as expected" if config.expected_space.declared else "of the expected model"
    vectors = context.connected.vector_identity.fingerprint
    return f"{served.model}, space {served.fingerprint}, vectors {vectors}, {expected}"


def _warnings(context: DoctorContext) -> Result:
    """What the service reports about itself; sends nothing."""
    warnings = context.description.warnings if context.description else ()
    if not warnings:
        return "the service reports none"
    detail = "\n".join(f"{warning.code}: {warning.message}" for warning in warnings)
    harmless = [warning.code == "restore_failed" for warning in warnings]
    if all(harmless):
        return warn(detail, _WARNINGS["restore_failed"])
    return fail(detail, _WARNINGS.get(warnings[harmless.index(False)].code, _NO_ANSWER))


def _vectors(context: DoctorContext) -> Result:
    query = context.connected.embed([QUESTION], role="query").vectors[0]
    near, far = context.connected.embed(TEXTS).vectors @ query
    detail = (
        f"{len(query)} dimensions, length {float(query @ query) ** 0.5:.3f}; question and answer "
        f"{near:.2f}, question and another text {far:.2f}"
    )
    return detail if near > far else fail(detail, InvalidResponseError.remedy)


def _latency(context: DoctorContext) -> Result:
    durations = []
    for number in range(_QUERIES):
        started = time.perf_counter()
        context.connected.embed([f"{QUESTION} {number}"], role="query")
        durations.append(time.perf_counter() - started)
    return (
        f"{context.first_answer:.1f} s to the first answer, any start included; then "
        f"{statistics.median(durations) * 1000:.0f} ms a query (median of {_QUERIES})"
    )


def _reference(context: DoctorContext) -> Result:
    served = context.description.identity if context.description else None
    expected = context.settings.expected_space
    if not reference.applies_to(served or expected):
        return skipped(f"no reference vectors of {expected.model} are published")
    vectors = reference.embed(context.connected)
    verdict = reference.judge(vectors, served.quantization if served else None)
    if verdict.failures:
        return fail(str(verdict), InvalidResponseError.remedy)
    if served is None:  # nor does it say what it computes in: check against bf16 too
        verdict = reference.judge(vectors, KALM.space.quantization)
        if verdict.failures:
            return warn(str(verdict), _IF_BF16)
    return str(verdict)
