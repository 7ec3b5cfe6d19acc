"""A container's work at shards, without Modal: the Volume is a folder, the engine is scripted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from scripted import DIMENSIONS, vector_of
from scripted_engine import ScriptedEngine

from kalm_integrations.bulk import shards
from kalm_integrations.bulk.manifest import Manifest
from kalm_integrations.bulk.on_modal import records as job_state
from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.bulk.on_modal.records import FolderStore, Run, Stop
from kalm_integrations.bulk.on_modal.state import Reader, State
from kalm_integrations.bulk.on_modal.transfer import upload
from kalm_integrations.bulk.options import Options
from kalm_integrations.bulk.plan import make_plan
from kalm_integrations.errors import CanaryFailedError, KalmError
from kalm_integrations.identity import VectorIdentity
from kalm_integrations.models import EMBEDDED
from kalm_integrations.readers.source import Source
from modal_backend.bulk.worker import Container, Worker
from modal_backend.service import EmbeddingService

JOB = "embed-0123456789abcdef"
RUN = "0000000000001-aaaa"


class Volume:
    """Counts, and sees that nobody has a file open while it is reloaded."""

    def __init__(self) -> None:
        self.busy = self.reloads = self.commits = 0

    async def reload(self) -> None:
        assert not self.busy
        self.reloads += 1

    async def commit(self) -> None:
        self.commits += 1


@pytest.fixture
def job(tmp_path: Path) -> FolderStore:
    """Ten rows in shards of four, sent once."""
    source = tmp_path / "in.jsonl"
    rows: list[Any] = ["a", "b", "a", None, *"cdefgh"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    identity = VectorIdentity(
        space=EMBEDDED.space, dimensions=DIMENSIONS, document_template="<{text}>"
    )
    plan = make_plan(
        Source(str(source)), "error", Options(shard_rows=4, on_error="null"), lambda _: None
    )
    store = FolderStore(tmp_path / "volume" / job_state.JOBS / JOB)
    upload(store, plan, plan.job(identity.to_dict(), "float16"), str(source), lambda _: None)
    send(store, RUN, [0, 1, 2])
    return store


def send(store: FolderStore, run: str, numbers: list[int], **limits: float) -> None:
    made = Run(id=run, shards=numbers, max_containers=1, **limits)
    store.write({f"{job_state.RUNS}/{run}/{job_state.RUN}": made.to_bytes()})


class Made:
    """A worker with all that a test looks at."""

    def __init__(
        self, folder: Path, engine: ScriptedEngine, failure: KalmError | None, name: str
    ) -> None:
        self.volume, self.engine, self.gave_way = Volume(), engine, 0
        container = Container(
            id=name, started=100.0, gpu="H100", dollars_per_second=0.5, failure=failure
        )

        async def give_way() -> None:
            self.gave_way += 1

        self.worker = Worker(self.volume, folder, EmbeddingService(engine), container, give_way)

    def embed(self, *numbers: int, run: str = RUN) -> list[Any]:
        async def all_of_them() -> list[Any]:
            return await asyncio.gather(
                *(self.worker.embed_shard(JOB, run, number) for number in numbers),
                return_exceptions=True,
            )

        return asyncio.run(all_of_them())


@pytest.fixture
def new(tmp_path: Path) -> Callable[..., Made]:
    def new(
        engine: ScriptedEngine | None = None,
        failure: KalmError | None = None,
        name: str = "ta-1",
    ) -> Made:
        return Made(tmp_path / "volume", engine or ScriptedEngine(), failure, name)

    return new


def state(store: FolderStore) -> State:
    found = Reader(store).read()
    assert found is not None
    return found


def test_every_row_gets_its_vector_and_the_last_shard_the_manifest(
    job: FolderStore, new: Any
) -> None:
    made = new()
    assert made.embed(2, 0, 1) == ["finished"] * 3
    vectors = pq.read_table(job.folder / "shards")["vector"].to_pylist()
    texts = ["a", "b", "a", None, *"cdefgh"]
    assert len(vectors) == 10
    for vector, text in zip(vectors, texts, strict=True):
        if text is None:
            assert vector is None
        else:
            assert np.array_equal(np.array(vector, dtype=np.float16), vector_of(f"<{text}>"))
    manifest = Manifest.read(job.folder)
    assert manifest is not None
    assert manifest.complete
    assert [shard.name for shard in manifest.shards] == [shards.name_of(n) for n in range(3)]
    assert pq.read_table(job.folder / "rejected.parquet")["row"].to_pylist() == [3]
    sent = [text for texts, _ in made.engine.asked for text in texts]
    assert sorted(sent) == [f"<{text}>" for text in "abcdefgh"]  # "a" once
    assert manifest.job == state(job).description.job


def test_a_finished_shard_is_not_embedded_again(job: FolderStore, new: Any) -> None:
    new().embed(0)
    again = new()
    assert again.embed(0) == ["finished before"]
    assert again.engine.asked == []


def test_inputs_of_an_older_run_end_at_once(job: FolderStore, new: Any) -> None:
    send(job, "0000000000002-bbbb", [0])
    made = new()
    assert made.embed(0) == ["a newer run has taken over"]
    reloads = made.volume.reloads
    assert made.embed(1) == ["a newer run has taken over"]
    assert made.volume.reloads == reloads  # known by now
    assert made.embed(0, run="0000000000002-bbbb") == ["finished"]


def test_a_stopped_run_embeds_nothing(job: FolderStore, new: Any) -> None:
    stop = Stop(reason="cancelled", message="It was cancelled.")
    job.write({f"{job_state.RUNS}/{RUN}/{job_state.STOPPED}": stop.to_bytes()})
    assert new().embed(0, 1) == ["the run was stopped"] * 2
    assert state(job).over


def test_a_shard_that_always_fails_is_given_up_after_four_attempts(
    job: FolderStore, new: Any
) -> None:
    made = new(ScriptedEngine(faults={"embed": RuntimeError("choked")}))
    outcomes = [made.embed(1)[0] for _ in range(5)]
    assert [type(outcome) for outcome in outcomes[:3]] == [RuntimeError] * 3
    assert outcomes[3:] == ["given up", "given up"]
    (number, failure), *others = state(job).failed.items()
    assert (number, others) == (1, [])
    assert "RuntimeError: choked" in failure.message
    assert [bool(attempt.error) for attempt in failure.attempts] == [True] * 4
    # A new run tries anew.
    send(job, "0000000000002-bbbb", [1])
    assert new().embed(1, run="0000000000002-bbbb") == ["finished"]
    assert state(job).failed == {}


def test_a_shard_that_kills_its_containers_is_given_up_too(job: FolderStore, new: Any) -> None:
    for number in range(job_state.MOST_ATTEMPTS):
        made = new(name=f"ta-{number}")
        claimed = made.worker._claim(job, RUN, 0)  # and then it dies
        assert claimed.job.shard_rows == 4
    assert new().embed(0) == ["given up"]
    assert "4 containers died" in state(job).failed[0].message
    assert len(state(job).containers) == 4


def test_a_shard_over_its_time_limit_is_tried_again_in_another_container(
    job: FolderStore, new: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hanging(ScriptedEngine):
        async def embed(self, *_: Any, **__: Any) -> Any:
            await asyncio.sleep(3600)

    limits: list[int] = []

    def seconds_for(tokens: int) -> float:
        limits.append(tokens)
        return 0.05

    with monkeypatch.context() as patch:
        patch.setattr(worker_pool, "seconds_for", seconds_for)
        hung = new(Hanging())
        (outcome,) = hung.embed(1)
    assert isinstance(outcome, RuntimeError)
    assert "time limit" in str(outcome)
    assert hung.gave_way == 1
    assert limits == [state(job).description.tokens[1]]
    (attempt,) = state(job).records[1].attempts
    assert "time limit" in attempt.error
    assert new(name="ta-2").embed(1) == ["finished"]


def test_the_time_limit_grows_with_the_shard_up_to_modals_own() -> None:
    assert worker_pool.seconds_for(0) == 900
    assert worker_pool.seconds_for(1_000_000) == 2000
    assert worker_pool.seconds_for(10**9) == worker_pool.TIMEOUT == 86_400


def test_a_part_that_cannot_be_read_is_recorded_as_any_failure(job: FolderStore, new: Any) -> None:
    (job.folder / job_state.INPUT / shards.name_of(2)).write_bytes(b"PAR1 no more PAR1")
    outcomes = [new().embed(2)[0] for _ in range(job_state.MOST_ATTEMPTS)]
    assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 3 + [str]
    assert state(job).failed[2].code == "invalid_request"
    assert "part-000002.parquet is damaged" in state(job).failed[2].message


def test_a_shard_that_cannot_be_written_is_recorded_too(job: FolderStore, new: Any) -> None:
    (job.folder / "shards" / ".part-000000.parquet.tmp").mkdir(parents=True)
    (outcome,) = new().embed(0)
    assert isinstance(outcome, RuntimeError)
    (attempt,) = state(job).records[0].attempts
    assert "Error" in attempt.error
    assert state(job).finished == {}


@pytest.mark.parametrize("spoil", [lambda v: v / 2, lambda v: v * np.nan, lambda v: v[:-1]])
def test_wrong_vectors_are_never_written(job: FolderStore, new: Any, spoil: Any) -> None:
    made = new(ScriptedEngine(spoil))
    (outcome,) = made.embed(1)
    assert isinstance(outcome, RuntimeError)
    assert "invalid_vectors" in str(outcome)
    assert list((job.folder / "shards").iterdir()) == []
    assert state(job).finished == {}


def test_an_engine_of_another_space_stops_the_run(job: FolderStore, new: Any) -> None:
    class Other(ScriptedEngine):
        identity = type(EMBEDDED.space)(**{**EMBEDDED.space.to_dict(), "revision": "b"})

    (outcome,) = new(Other()).embed(0)
    assert "revision" in outcome
    stopped = state(job).stop
    assert stopped is not None
    assert stopped.reason == "identity"


def test_the_third_container_without_trust_stops_the_run(job: FolderStore, new: Any) -> None:
    failure = CanaryFailedError("two different texts have one vector.")
    for number in range(2):
        made = new(failure=failure, name=f"ta-{number}")
        outcomes = made.embed(0, 1)
        assert [type(outcome) for outcome in outcomes] == [RuntimeError] * 2
        assert made.gave_way
        assert state(job).stop is None
    last = new(failure=failure, name="ta-2")
    assert last.embed(0, 1, 2) == ["the run was stopped"] * 3
    assert not last.gave_way  # it sees the others off
    stopped = state(job).stop
    assert stopped is not None
    assert stopped.reason == "canary"
    assert state(job).records == {}  # no shard is blamed


def test_a_cancelled_input_leaves_the_files_alone(job: FolderStore, new: Any) -> None:
    made = new()

    async def cancelled() -> None:
        task = asyncio.create_task(made.worker.embed_shard(JOB, RUN, 0))
        while not made.volume.reloads:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with made.worker._lock:  # what it had begun ends before anybody else may go on
            assert made.volume.commits == 1

    asyncio.run(cancelled())
    assert made.embed(1) == ["finished"]


@pytest.mark.parametrize("call", ["reload", "commit"])
def test_a_volume_that_hangs_has_another_container_take_over(
    job: FolderStore, new: Any, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modal_backend.bulk.worker.VOLUME_SECONDS", 0.1)
    made = new()

    async def hang() -> None:
        await asyncio.Event().wait()

    setattr(made.volume, call, hang)
    (error,) = made.embed(0)
    assert isinstance(error, RuntimeError)
    assert made.gave_way >= 1


def test_costs_are_those_of_containers_and_not_of_shards(job: FolderStore, new: Any) -> None:
    new().embed(0, 1)  # in a container that has been ready for years, and worked for others
    found = state(job)
    last = max(record.finished for record in found.finished.values())
    first = min(at.at for record in found.finished.values() for at in record.attempts)
    assert found.containers.keys() == {"ta-1"}
    assert found.seconds == pytest.approx(last - first)
    assert found.dollars == pytest.approx(0.5 * (last - first))
    assert found.waiting == [2]
    assert found.dollars_to_come is not None
    assert found.dollars_to_come >= 0.5 * 60
    assert found.manifest.complete is False
