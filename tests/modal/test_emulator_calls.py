"""Calling functions: a real client, a real container, and the emulated server between them."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import modal
import pytest
from grpclib import GRPCError, Status
from modal.exception import (
    AuthError,
    ExecutionError,
    FunctionTimeoutError,
    NotFoundError,
    ResourceExhaustedError,
    ServiceError,
)
from modal_emulator import Emulator
from toy import failing_app, toy_app

MIB = 1024 * 1024


@pytest.fixture(scope="module")
def deployed(emulator: Emulator) -> Emulator:
    emulator.set_secret("toy-secret", {"TOY_SECRET": "one"})
    emulator.deploy(toy_app.__file__)
    emulator.deploy(failing_app.__file__)
    return emulator


@pytest.fixture(scope="module")
def toy(deployed: Emulator, modal_client: modal.Client) -> Any:
    return modal.Cls.from_name("toy", "Toy", client=modal_client)()


@pytest.fixture(scope="module")
def square(deployed: Emulator, modal_client: modal.Client) -> Any:
    return modal.Function.from_name("toy", "square", client=modal_client)


def test_a_method_and_a_function(toy: Any, square: Any) -> None:
    assert toy.echo.remote({"a": [1, 2]}) == {"a": [1, 2]}
    assert square.remote(7) == 49


async def test_async_calls_share_a_container(toy: Any, deployed: Emulator) -> None:
    assert await asyncio.gather(*[toy.echo.remote.aio(i) for i in range(8)]) == list(range(8))
    assert deployed.starts("Toy") == 1


async def test_inputs_run_at_once_up_to_the_limit(toy: Any) -> None:
    peaks = await asyncio.gather(*[toy.work.remote.aio(0.3) for _ in range(12)])
    assert max(peaks) == 8


def test_map_keeps_the_order(square: Any) -> None:
    assert list(square.map(range(20))) == [x * x for x in range(20)]


def test_spawned_calls_are_fetched_by_id(toy: Any, modal_client: modal.Client) -> None:
    call = toy.echo.spawn("later")
    again = modal.FunctionCall.from_id(call.object_id, client=modal_client)
    assert again.get(timeout=10) == "later"


def test_a_generator_streams(toy: Any) -> None:
    assert list(toy.count.remote_gen(5)) == list(range(5))


def test_a_cancelled_call_ends(toy: Any, deployed: Emulator) -> None:
    call = toy.work.spawn(30)
    deployed.wait(lambda: deployed.cloud.calls[call.object_id].inputs)
    call.cancel(terminate_containers=True)
    with pytest.raises(modal.exception.RemoteError, match="cancelled"):
        call.get(timeout=10)


def test_what_a_container_sees(toy: Any, deployed: Emulator) -> None:
    seen = toy.surroundings.remote()
    root = deployed.running("Toy")[0].root
    assert seen["cwd"] == str(root)
    assert seen["file"] == str(root / "toy_app.py")
    assert (seen["flag"], seen["remote"], seen["token"]) == ("from image", "1", None)


def test_volumes_are_shared_and_kept(toy: Any, deployed: Emulator) -> None:
    assert toy.write.remote("note.txt", "kept") == "kept"
    assert (deployed.volume("toy-volume") / "note.txt").read_text() == "kept"
    assert deployed.cloud.volumes.commits.total() == 1


# -- exceptions --------------------------------------------------------------------------------
def test_an_exception_arrives_as_itself(deployed: Emulator, modal_client: modal.Client) -> None:
    with pytest.raises(ValueError, match="as asked"):
        modal.Function.from_name("failing", "broken", client=modal_client).remote()


def test_an_exception_of_a_class_unknown_here_does_not(toy: Any) -> None:
    """In the container the class is `toy_app.ToyError`; this process has no module `toy_app`."""
    with pytest.raises(ExecutionError, match="toy_app"):
        toy.fail.remote(42)


def test_the_client_retries_what_the_function_asks_it_to(
    deployed: Emulator, modal_client: modal.Client
) -> None:
    flaky = modal.Function.from_name("failing", "flaky", client=modal_client)
    assert flaky.remote("once") == "second attempt"


def test_a_call_past_its_timeout_loses_its_container(
    deployed: Emulator, modal_client: modal.Client
) -> None:
    sleepy = modal.Function.from_name("toy", "sleepy", client=modal_client)
    with pytest.raises(FunctionTimeoutError, match="timeout of 1s"):
        sleepy.remote(30)
    assert sleepy.remote(0) == "awake"
    assert deployed.starts("sleepy") == 2


# -- sizes -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("size", "puts"), [(2 * MIB - 200, 0), (2 * MIB + 1, 2)])
def test_values_above_two_mib_travel_as_blobs(
    toy: Any, deployed: Emulator, size: int, puts: int
) -> None:
    before = deployed.cloud.blobs.stats["puts"]
    assert len(toy.echo.remote(bytes(size))) == size
    assert deployed.cloud.blobs.stats["puts"] - before == puts


def test_spawned_calls_use_blobs_from_eight_kib_on(toy: Any, deployed: Emulator) -> None:
    before = deployed.cloud.blobs.stats["puts"]
    assert len(toy.echo.spawn(bytes(9 * 1024)).get()) == 9 * 1024
    assert deployed.cloud.blobs.stats["puts"] - before == 2


# -- faults ------------------------------------------------------------------------------------
def test_the_client_rides_out_a_blip(toy: Any, deployed: Emulator) -> None:
    deployed.inject("FunctionMap", GRPCError(Status.UNAVAILABLE, "blip"), times=2)
    assert toy.echo.remote(1) == 1
    assert deployed.pending_faults("FunctionMap") == 0


def test_the_client_gives_up_after_three_retries(toy: Any, deployed: Emulator) -> None:
    deployed.inject("FunctionMap", GRPCError(Status.UNAVAILABLE, "down"), times=4)
    with pytest.raises(ServiceError, match="down"):
        toy.echo.remote(1)
    assert deployed.pending_faults("FunctionMap") == 0


def test_a_rate_limit_is_not_retried(toy: Any, deployed: Emulator) -> None:
    deployed.inject("FunctionMap", GRPCError(Status.RESOURCE_EXHAUSTED, "too fast"))
    with pytest.raises(ResourceExhaustedError, match="too fast"):
        toy.echo.remote(1)


def test_a_fault_may_be_a_delay(toy: Any, deployed: Emulator) -> None:
    deployed.inject("FunctionMap", lambda _: asyncio.sleep(0.5))
    began = time.monotonic()
    toy.echo.remote(1)
    assert time.monotonic() - began > 0.5


def test_strangers_are_refused(deployed: Emulator) -> None:
    with (
        deployed.client(("ak-stranger", "as-stranger")) as stranger,
        pytest.raises(AuthError, match="Token validation failed"),
    ):
        modal.Cls.from_name("toy", "Toy", client=stranger)().echo.remote(1)


@pytest.mark.parametrize(
    ("app", "name", "message"),
    [("absent", "Toy", "App 'absent' not found"), ("toy", "Absent", "No Cls 'Absent'")],
)
def test_what_is_not_deployed_is_not_found(
    deployed: Emulator, modal_client: modal.Client, app: str, name: str, message: str
) -> None:
    with pytest.raises(NotFoundError):
        modal.Cls.from_name(app, name, client=modal_client)().echo.remote(1)


def test_credentials_come_from_the_environment(deployed: Emulator, modal_env: Emulator) -> None:
    assert modal.Function.from_name("toy", "square").remote(3) == 9


def test_no_rpc_was_missing(toy: Any, square: Any, deployed: Emulator) -> None:
    assert not deployed.unimplemented


# -- the input plane ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def newer(new_emulator: Any) -> Emulator:
    emulator: Emulator = new_emulator(input_plane=True)
    emulator.deploy(failing_app.__file__)
    return emulator


def test_over_the_newer_protocol_the_client_repeats_what_was_lost(newer: Emulator) -> None:
    with newer.client() as client, ThreadPoolExecutor() as threads:
        note = modal.Cls.from_name("failing", "Dies", client=client)().note
        call = threads.submit(note.remote, "lost", 0.3)
        newer.wait((newer.volume("failing-notes") / "lost").exists)
        killed = newer.kill("Dies")
        assert call.result(timeout=20) != killed.pid
        assert len(set(note.map(["one", "two"], [0, 0]))) == 1
    names = {request.name for request in newer.cloud.recorder.requests}
    assert names >= {"AttemptStart", "AttemptRetry", "MapStartOrContinue"}
    assert "FunctionMap" not in names
    assert not newer.unimplemented
