"""The life cycle of a container, and each of its failures."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref

import numpy as np
import pytest
from scripted import vectors_of
from scripted_engine import ScriptedEngine

from kalm_integrations.errors import (
    CanaryFailedError,
    ContainerFailedError,
    EngineLoadError,
    InvalidResponseError,
    KalmError,
)
from kalm_integrations.protocol import EmbedRequest
from modal_backend import canary, lifecycle
from modal_backend.lifecycle import Lifecycle

WRONG = {"spoil": lambda vectors: vectors * np.float32(0.5)}
RIGHT = vectors_of(["a", "b"], "float32")
CANARY = " embed" * (len(canary.TEXTS) + 2)
"""Calls of the canary: its texts together, each alone, one with an instruction."""
REQUEST = EmbedRequest(texts=["a", "b"], role="document", dtype="float32")


class Loader:
    """Loads the engines of a script, one after the other; the last one again and again.

    Args:
        script: An engine's arguments, or what loading raises.
    """

    def __init__(self, *script):
        self._script = script
        self.log = []
        self.engines = []
        self.loads = 0

    async def __call__(self):
        step = self._script[min(self.loads, len(self._script) - 1)]
        self.loads += 1
        self.log.append(f"{self.loads} load")
        if isinstance(step, BaseException):
            raise step
        self.engines.append(ScriptedEngine(**step, log=self.log, name=str(self.loads)))
        return self.engines[-1]


async def start(loader, snapshot="asleep", between=lambda: None, restored=False, **options):
    """A container that has started; `between` is what happens in the snapshot."""
    started = Lifecycle(loader, snapshot, **options)
    await started.prepare()
    between()
    await started.resume(restored=restored)
    return started


async def served(started):
    return (await started.service.embed(REQUEST)).vectors


# -- healthy -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("snapshot", "log", "phases"),
    [
        ("off", f"load warm_up{CANARY}", "load warm_up canary"),
        ("awake", f"load warm_up{CANARY}{CANARY}", "load warm_up canary canary_after"),
        (
            "asleep",
            f"load warm_up{CANARY} sleep wake{CANARY}",
            "load warm_up canary sleep wake canary_after",
        ),
    ],
)
async def test_phases_run_in_order_and_are_timed(snapshot, log, phases):
    loader = Loader({})
    started = await start(loader, snapshot)
    assert loader.log == [f"1 {done}" for done in log.split()]
    assert list(started.phases) == phases.split()
    assert started.failure is None
    assert np.array_equal(await served(started), RIGHT)


async def test_phases_are_timed_in_seconds(monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(lifecycle.time, "perf_counter", lambda: next(now) ** 2)
    started = await start(Loader({}))
    assert list(started.phases.values()) == [1, 5, 9, 13, 17, 21]


async def test_a_failed_phase_is_timed():
    started = await start(Loader({"faults": {"wake": OSError("lost")}}))
    assert (
        " ".join(started.phases)
        == "load warm_up canary sleep wake load_again warm_up_again canary_again"
    )


async def test_an_unprepared_container_serves_an_error():
    with pytest.raises(EngineLoadError, match="nothing is loaded yet"):
        await served(Lifecycle(Loader({}), "off"))


async def test_small_rounding_differences_after_a_restore_are_logged_and_served(caplog):
    loader = Loader({})

    def rounds_otherwise():
        loader.engines[0].spoil = lambda v: v.astype(np.float16).astype(np.float32)

    started = await start(loader, between=rounds_otherwise)
    assert started.failure is None
    assert "not bit-equal" in caplog.text
    assert loader.loads == 1


async def test_equal_vectors_after_a_restore_log_nothing(caplog):
    await start(Loader({}))
    assert not caplog.records


# -- failing once ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "first",
    [OSError("no weights"), WRONG, {"faults": {"embed": OSError("no device")}}],
    ids=["loading", "vectors", "embedding"],
)
@pytest.mark.parametrize("snapshot", ["off", "awake", "asleep"])
async def test_a_failure_before_the_snapshot_is_repaired_by_a_second_load(first, snapshot):
    """An empty snapshot would cost every later start the whole load."""
    loader = Loader(first, {})
    prepared = Lifecycle(loader, snapshot)
    await prepared.prepare()
    assert (prepared.failure, loader.loads) == (None, 2)
    assert ("2 sleep" in loader.log) == (snapshot == "asleep")
    await prepared.resume()
    assert (prepared.failure, loader.loads) == (None, 2)
    assert np.array_equal(await served(prepared), RIGHT)


async def test_an_engine_that_cannot_sleep_is_closed_before_another_is_loaded():
    loader = Loader({"faults": {"sleep": OSError("no memory")}}, {})
    started = await start(loader)
    assert " ".join(loader.log).count("1 sleep 1 close 2 load") == 1
    assert started.failure is None


@pytest.mark.parametrize("fault", ["sleep", "wake"])
async def test_an_error_in_close_does_not_prevent_the_next_load(fault, caplog):
    loader = Loader({"faults": {fault: OSError("lost"), "close": OSError("lost too")}}, {})
    started = await start(loader)
    assert (started.failure, loader.loads) == (None, 2)
    assert "an engine did not close" in caplog.text
    assert np.array_equal(await served(started), RIGHT)


@pytest.mark.parametrize("fault", ["wake", "embed"])
@pytest.mark.parametrize("error", [OSError("stale"), KalmError("stale."), ConnectionResetError()])
async def test_an_engine_that_fails_after_a_restore_is_loaded_again(fault, error, caplog):
    loader = Loader({}, {})
    started = await start(loader, between=lambda: loader.engines[0].faults.update({fault: error}))
    done = ["load", "warm_up", *CANARY.split()]
    assert loader.log[-len(done) - 1 :] == ["1 close", *(f"2 {each}" for each in done)]
    assert started.failure is None
    assert "an engine that is not trusted is discarded" in caplog.text


async def test_vectors_changed_by_the_snapshot_are_not_served():
    loader = Loader({}, {})

    def mixed_up():
        loader.engines[0].spoil = lambda v: v[:, ::-1]

    started = await start(loader, between=mixed_up)
    assert loader.loads == 2
    assert np.array_equal(await served(started), RIGHT)


async def test_a_third_load_can_heal_a_snapshot_without_an_engine():
    loader = Loader(WRONG, WRONG, {})
    started = await start(loader, restored=True)
    assert (started.failure, loader.loads) == (None, 3)
    assert list(started.phases)[-2:] == ["warm_up_again_again", "canary_again_again"]


async def test_an_engine_is_closed_before_the_next_is_loaded():
    loader = Loader(WRONG, {"faults": {"sleep": OSError("x")}}, {})
    await start(loader, restored=True)
    order = [done for done in loader.log if done.split()[1] in ("load", "close")]
    assert order == ["1 load", "1 close", "2 load", "2 close", "3 load"]


async def test_the_error_does_not_keep_a_failed_engine_in_memory(monkeypatch):
    monkeypatch.setattr(lifecycle.log, "disabled", True)  # pytest keeps what is logged
    loader = Loader(WRONG)
    failed = Lifecycle(loader, "off")
    await failed.prepare()
    gone = [weakref.ref(engine) for engine in loader.engines]
    loader.engines.clear()
    gc.collect()
    assert [engine() for engine in gone] == [None, None]


# -- failing for good --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("script", "failure", "message"),
    [
        (
            WRONG,
            CanaryFailedError,
            "invalid vectors of 7 of 7 texts; the first one got a vector of length 0.5000 instead "
            "of 1.",
        ),
        (EngineLoadError("not the tested files."), EngineLoadError, "not the tested files."),
        (OSError("disk"), EngineLoadError, "the engine failed: OSError: disk."),
        (MemoryError(), EngineLoadError, "the engine failed: MemoryError: ."),
        (
            {"faults": {"embed": ZeroDivisionError("x"), "close": OSError("y")}},
            EngineLoadError,
            "the engine failed: ZeroDivisionError: x.",
        ),
    ],
)
@pytest.mark.parametrize(
    ("snapshot", "restored"),
    [("off", False), ("awake", False), ("awake", True), ("asleep", False), ("asleep", True)],
)
async def test_permanent_failures_are_served_and_not_raised(
    script, failure, message, snapshot, restored, caplog
):
    loader = Loader(script)
    started = await start(loader, snapshot, restored=restored)
    assert type(started.failure) is failure
    assert started.failure.args == (message,)
    assert loader.loads == 2 + restored  # two in a start, one more in a restored container
    assert f"this container serves nothing: {message}" in caplog.text
    await started.close()


async def test_every_call_gets_its_own_error_instance():
    started = await start(Loader(WRONG))
    caught = []
    for _ in range(2):
        with pytest.raises(CanaryFailedError) as error:
            await served(started)
        caught.append(error.value)
    first, second = caught
    assert first is not second
    assert first is not started.failure
    assert str(first) == str(second) == str(started.failure)


async def test_a_second_failing_engine_is_closed_and_its_error_served():
    loader = Loader({}, WRONG)

    def breaks():
        loader.engines[0].faults["wake"] = OSError("lost")

    started = await start(loader, between=breaks)
    assert type(started.failure) is CanaryFailedError
    assert loader.log[-5:] == ["1 close", "2 load", "2 warm_up", "2 embed", "2 close"]


@pytest.mark.parametrize("stop", [asyncio.CancelledError(), KeyboardInterrupt()])
async def test_cancellation_of_the_start_is_raised_without_another_load(stop):
    loader = Loader(stop)
    ended = Lifecycle(loader, "off")
    with pytest.raises(type(stop)):
        await ended.prepare()
    assert loader.loads == 1


async def test_cancellation_of_the_canary_closes_the_engine():
    loader = Loader({"faults": {"embed": asyncio.CancelledError()}})
    with pytest.raises(asyncio.CancelledError):
        await Lifecycle(loader, "off").prepare()
    assert loader.log == ["1 load", "1 warm_up", "1 embed", "1 close"]


# -- time and hopeless errors --------------------------------------------------------------------
class SlowLoader(Loader):
    """Each load takes so many seconds."""

    def __init__(self, seconds, *script):
        super().__init__(*script)
        self._seconds = seconds

    async def __call__(self):
        await asyncio.sleep(self._seconds)
        return await super().__call__()


@pytest.mark.parametrize("restored", [False, True])
async def test_no_load_starts_without_time_for_it(restored, caplog):
    loader = SlowLoader(0.15, TimeoutError("not ready"), {})
    # A start has time for two of these: not for another one after 0.15 s.
    started = Lifecycle(loader, "asleep", attempt_timeout=0.1)
    await started.prepare()
    assert (loader.loads, type(started.failure)) == (1, EngineLoadError)
    assert "--startup-timeout" in caplog.text
    await started.resume(restored=restored)
    # Another container has the time of a whole start.
    assert loader.loads == (2 if restored else 1)
    assert (started.failure is None) == restored
    assert codes(started) == ["snapshot_without_engine"]


async def test_a_load_is_retried_if_there_is_time():
    loader = SlowLoader(0.05, TimeoutError("not ready"), {})
    started = await start(loader, attempt_timeout=1000)
    assert (started.failure, loader.loads, codes(started)) == (None, 2, [])


@pytest.mark.parametrize("restored", [False, True])
async def test_a_permanent_error_is_retried_only_after_a_restore(restored):
    missing = EngineLoadError("the weights are not on this machine.")
    missing.permanent = True
    loader = Loader(missing, {})
    started = Lifecycle(loader, "asleep")
    await started.prepare()
    assert loader.loads == 1
    await started.resume(restored=restored)
    assert loader.loads == (2 if restored else 1)  # the weights may be there by then
    assert (started.failure is None) == restored


# -- warnings ------------------------------------------------------------------------------------
def codes(started):
    return [warning.code for warning in started.service.warnings]


async def test_engine_age_is_the_age_of_the_snapshot(monkeypatch):
    loader = Loader({}, {})
    started = Lifecycle(loader, "asleep")
    await started.prepare()
    later = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: later)
    await started.resume(restored=True)
    assert 3590 < started.engine_age < 3610
    await started._load_and_check()
    assert started.engine_age == 0


@pytest.mark.parametrize("first", [OSError("no weights"), WRONG, TimeoutError("not ready")])
async def test_a_snapshot_without_an_engine_is_reported_at_each_start_from_it(first, caplog):
    loader = Loader(first, first, {})
    started = Lifecycle(loader, "asleep")
    await started.prepare()
    caplog.clear()
    await started.resume(restored=True)
    assert (started.failure, started.restored, loader.loads) == (None, True, 3)
    assert codes(started) == ["snapshot_without_engine"]
    assert "snapshot_without_engine" in caplog.text
    assert "kalm deploy" in started.service.warnings[0].message


async def test_a_snapshot_without_an_engine_is_reported_if_the_next_load_fails():
    started = await start(Loader(WRONG), restored=True)
    assert type(started.failure) is CanaryFailedError
    assert codes(started) == ["snapshot_without_engine"]


async def test_without_snapshots_no_snapshot_is_reported():
    started = await start(Loader(WRONG), snapshot="off")
    assert (type(started.failure), codes(started)) == (CanaryFailedError, [])


@pytest.mark.parametrize("first", [WRONG, OSError("x")])
async def test_a_second_load_before_the_snapshot_leaves_no_warning(first):
    started = await start(Loader(first, {}), restored=True)
    assert (started.failure, codes(started), started.trusted) == (None, [], True)


async def test_discarding_an_engine_clears_its_canary_warning():
    loader = Loader(WRONG, OSError("x"), OSError("x"))
    started = Lifecycle(loader, "asleep", canary_mode="warn")
    await started.prepare()
    assert codes(started) == ["canary_failed"]
    loader.engines[0].faults.update({"wake": OSError("stale")})
    await started.resume()
    assert started.failure is not None
    assert codes(started) == ["restore_failed"]


async def test_a_failed_restore_is_reported():
    loader = Loader({}, {})
    broken = {"wake": OSError("stale")}
    started = await start(loader, between=lambda: loader.engines[0].faults.update(broken))
    assert (started.failure, codes(started)) == (None, ["restore_failed"])
    assert "stale" in started.service.warnings[0].message


# -- canary_mode=warn ---------------------------------------------------------------
@pytest.mark.parametrize("snapshot", ["off", "awake", "asleep"])
async def test_in_warn_mode_wrong_vectors_are_served_and_reported(snapshot, caplog):
    loader = Loader(dict(WRONG))
    started = Lifecycle(loader, snapshot, canary_mode="warn")
    await started.prepare()
    assert ("1 sleep" in loader.log) == (snapshot == "asleep")  # it is in the snapshot
    assert (started.failure, started.trusted, loader.loads) == (None, False, 1)
    caplog.clear()
    await started.resume(restored=True)
    assert (started.failure, started.trusted, loader.loads) == (None, False, 1)
    assert codes(started) == ["canary_failed"]
    assert "length 0.5000" in started.service.warnings[0].message
    assert "canary_failed" in [r.message.split(":")[0] for r in caplog.records]
    # The service's own last check still refuses what is no embedding at all.
    with pytest.raises(InvalidResponseError):
        await served(started)


async def test_in_warn_mode_vectors_that_the_snapshot_changed_are_served_and_reported():
    loader = Loader({})

    def mixed_up():
        loader.engines[0].spoil = lambda v: v[:, ::-1]

    started = await start(loader, between=mixed_up, canary_mode="warn")
    assert (codes(started), loader.loads) == (["canary_failed"], 1)
    assert np.array_equal(await served(started), RIGHT[:, ::-1])


async def test_in_warn_mode_a_canary_that_passes_later_is_no_warning_any_more():
    loader = Loader(dict(WRONG))

    def recovers():
        loader.engines[0].spoil = lambda v: v

    started = await start(loader, between=recovers, canary_mode="warn")
    assert (codes(started), started.trusted) == ([], True)


async def test_in_warn_mode_an_engine_that_breaks_is_still_discarded():
    loader = Loader({"faults": {"embed": OSError("no device")}}, {})
    started = await start(loader, canary_mode="warn")
    assert (started.failure, codes(started), loader.loads) == (None, [], 2)


# -- replacement -------------------------------------------------------------------------------
class Container:
    def __init__(self, *faults):
        self._faults = iter(faults)
        self.stops = 0

    async def stop_fetching(self):
        self.stops += 1
        if (fault := next(self._faults, None)) is not None:
            raise fault


async def test_a_healthy_container_is_not_replaced(monkeypatch):
    monkeypatch.setattr(lifecycle, "REPLACEMENT_DELAY", 0)
    started, container = await start(Loader({})), Container()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await started.watch(container.stop_fetching)
    assert container.stops == 0


async def test_a_dead_engine_is_logged_and_replaced_at_once(caplog):
    loader = Loader({})
    started, container = await start(loader), Container()
    watching = asyncio.create_task(started.watch(container.stop_fetching))
    loader.engines[0].death = ContainerFailedError("the core is dead.")
    await asyncio.wait_for(watching, 1)
    assert container.stops == 1
    assert loader.log[-1] == "1 close"
    assert caplog.text.count("the core is dead") == 1
    with pytest.raises(ContainerFailedError, match="the core is dead"):
        await served(started)


async def test_an_unhealthy_container_is_replaced_after_a_delay(monkeypatch):
    monkeypatch.setattr(lifecycle, "REPLACEMENT_DELAY", 0.2)
    started, container = await start(Loader(WRONG)), Container()
    watching = asyncio.create_task(started.watch(container.stop_fetching))
    await asyncio.sleep(0.05)
    assert container.stops == 0
    with pytest.raises(CanaryFailedError):
        await served(started)
    await watching
    assert container.stops == 1


async def test_a_failed_request_for_a_replacement_is_repeated(monkeypatch, caplog):
    monkeypatch.setattr(lifecycle, "REPLACEMENT_DELAY", 0.01)
    started, container = await start(Loader(WRONG)), Container(OSError("no answer"))
    await started.watch(container.stop_fetching)
    assert container.stops == 2
    assert "the request for a replacement failed" in caplog.text


def test_unhealthy_containers_restart_at_most_every_five_minutes():
    assert lifecycle.REPLACEMENT_DELAY == 300
