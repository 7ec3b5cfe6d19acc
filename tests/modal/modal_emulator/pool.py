"""The inputs and containers of one function: queue, scaling, restarts, timeouts, cancellation."""

import asyncio
import collections
import math
import time
from typing import TYPE_CHECKING

from modal_proto import api_pb2

from .container import Container
from .model import CANCELLED, STOPPED, Call, Function, Input, Result
from .retries import pause_before_retry

if TYPE_CHECKING:
    from .cloud import Cloud


class Pool:
    """Crashing containers are restarted for as long as there is work, or `min_containers` asks.

    Modal documents for deployed apps: crashes "will be retried indefinitely", with a crash-loop
    backoff; so here a call whose container never comes up waits until a container does, the
    caller gives up, or the app stops. For ephemeral apps the waiting calls fail after some crashes.
    """

    def __init__(self, cloud: "Cloud", function: Function) -> None:
        self.cloud, self.function = cloud, function
        self.definition = cloud.definition(function)
        self.queue: collections.deque[Input] = collections.deque()
        self.delayed: set[Input] = set()  # failed, and to be run again after a pause
        self.running: dict[str, tuple[Input, Container]] = {}
        self.containers: list[Container] = []
        self.history: list[Container] = []  # those whose process was started
        self.changed = asyncio.Condition()
        self.failed_starts = 0
        self.snapshot_usable = True
        self.stopped = False
        self._not_before = 0.0
        self._revival: asyncio.Task[None] | None = None

    @property
    def live(self) -> list[Container]:
        return [c for c in self.containers if not c.stopping]

    # -- demand --------------------------------------------------------------------------------
    def enqueue(self, entry: Input) -> None:
        self.queue.append(entry)
        self.wake()
        self.cloud.spawn(self.scale())

    def wake(self) -> None:
        async def notify() -> None:
            async with self.changed:
                self.changed.notify_all()

        self.cloud.spawn(notify())

    @property
    def concurrency(self) -> int:
        d = self.definition
        return d.target_concurrent_inputs or d.max_concurrent_inputs or d.batch_max_size or 1

    async def scale(self) -> None:
        """Starts the containers that are missing, unless the last starts failed a moment ago."""
        settings = self.definition.autoscaler_settings
        waiting = sum(not entry.done for entry in self.queue)
        wanted = math.ceil((waiting + len(self.running)) / self.concurrency)
        wanted = max(wanted, settings.min_containers)
        limit = settings.max_containers or wanted
        missing = min(wanted, limit, self.cloud.options.max_local_containers) - len(self.live)
        if self.stopped or missing <= 0:
            return
        pause = self._not_before - time.monotonic()
        if pause > 0:
            if self._revival is None or self._revival.done():
                self._revival = self.cloud.spawn(self._revive(pause))
            return
        started = [Container(self) for _ in range(missing)]
        self.containers += started
        for container in started:
            await container.start()

    async def _revive(self, pause: float) -> None:
        await asyncio.sleep(pause)
        self._revival = None
        await self.scale()

    # -- the containers' side ------------------------------------------------------------------
    async def take(self, container: Container, limit: int, linger: float) -> list[Input] | None:
        """The next inputs for a container, at most `limit`; None tells it to stop."""
        async with self.changed:
            while not self.queue:
                if container.stopping or self._scale_down(container):
                    return None
                await self._wait(self._idle_left(container))
            if container.stopping:
                return None
            deadline = time.monotonic() + linger
            while limit > len(self.queue) and (left := deadline - time.monotonic()) > 0:
                await self._wait(left)
            taken: list[Input] = []
            while self.queue and len(taken) < limit:
                # A batch runs one method.
                if taken and self.queue[0].payload.method_name != taken[0].payload.method_name:
                    break
                taken.append(self.queue.popleft())
            for entry in taken:
                self.running[entry.input_id] = (entry, container)
                entry.watchdog = self.cloud.spawn(self._expire(entry, entry.retry_count, container))
            return taken

    async def _wait(self, seconds: float | None) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self.changed.wait()
        except TimeoutError:
            pass

    def _idle_left(self, container: Container) -> float | None:
        if any(owner is container for _, owner in self.running.values()):
            return None
        settings = self.definition.autoscaler_settings
        window = (
            settings.scaledown_window
            or self.definition.task_idle_timeout_secs
            or self.cloud.options.idle_seconds
        )
        return max(container.idle_since + window - time.monotonic(), 0.0)

    def _scale_down(self, container: Container) -> bool:
        if self._idle_left(container) != 0.0:
            return False
        if len(self.live) <= self.definition.autoscaler_settings.min_containers:
            container.idle_since = time.monotonic()
            return False
        container.stopping = True
        container.mark("scaledown")
        return True

    async def _expire(self, entry: Input, attempt: int, container: Container) -> None:
        limit = self.definition.timeout_secs or 300
        await asyncio.sleep(limit)
        message = f"Task's current input in {entry.call.call_id} hit its timeout of {limit}s"
        result = Result(status=Result.GENERIC_STATUS_TIMEOUT, exception=message)
        if await self.finish(entry.input_id, attempt, result):
            await container.kill()

    async def finish(
        self,
        input_id: str,
        attempt: int,
        result: api_pb2.GenericResult,
        *,
        data_format: "api_pb2.DataFormat.ValueType" = api_pb2.DATA_FORMAT_UNSPECIFIED,
        started_at: float = 0.0,
    ) -> bool:
        """Takes the result of an attempt; False if it comes too late to count."""
        entry, container = self.running.get(input_id, (None, None))
        if entry is None or container is None or entry.retry_count != attempt:
            return False
        self._release(input_id)
        container.idle_since = time.monotonic()
        self.wake()
        pause = pause_before_retry(entry, result, self.definition.retry_policy)
        if pause is not None:
            self.delayed.add(entry)
            self.cloud.spawn(self._retry(entry, pause))
            return True
        if entry.cancelled and result.status == CANCELLED.status:
            result = CANCELLED  # the container's own says nothing
        await entry.call.publish(
            entry,
            result,
            data_format=data_format,
            task_id=container.task_id,
            started_at=started_at,
        )
        return True

    async def _retry(self, entry: Input, pause: float) -> None:
        await asyncio.sleep(pause)
        if entry in self.delayed:
            self.delayed.remove(entry)
            entry.retry(entry.payload)
            self.enqueue(entry)

    def _release(self, input_id: str) -> Input:
        entry, _ = self.running.pop(input_id)
        if entry.watchdog is not None and entry.watchdog is not asyncio.current_task():
            entry.watchdog.cancel()
        return entry

    # -- cancellation and the end --------------------------------------------------------------
    async def cancel(self, call: Call, *, terminate_containers: bool) -> None:
        call.cancelled = True
        await self._fail_waiting(CANCELLED, call)
        by_container: dict[Container, list[Input]] = collections.defaultdict(list)
        for entry, container in self.running.values():
            if entry.call is call:
                entry.cancelled = True
                by_container[container].append(entry)
        for container, entries in by_container.items():
            if terminate_containers:
                for entry in entries:
                    await self.finish(entry.input_id, entry.retry_count, CANCELLED)
                await container.kill()
            else:
                container.cancellations.put_nowait([entry.input_id for entry in entries])

    async def drain(self) -> None:
        """A redeployment: containers finish what they have and go; the next ones are new."""
        self.function.definition = self.definition = self.cloud.definition(self.function)
        self.failed_starts, self._not_before, self.snapshot_usable = 0, 0.0, True
        self.stopped = False
        for container in self.containers:
            container.stopping = True
        self.wake()
        await self.scale()

    async def stop(self, grace: float) -> None:
        """The app was stopped: whoever still waits is told, the containers are ended."""
        self.stopped = True
        await self._fail_waiting(STOPPED)
        for input_id, (entry, _) in list(self.running.items()):
            await self.finish(input_id, entry.retry_count, STOPPED)
        await asyncio.gather(*[c.stop(grace) for c in list(self.containers)])

    async def _fail_waiting(self, result: api_pb2.GenericResult, call: Call | None = None) -> None:
        """Ends the inputs that no container has: all of them, or those of one call."""
        ended = [e for e in (*self.queue, *self.delayed) if call in (None, e.call)]
        gone = set(ended)
        self.queue = collections.deque(e for e in self.queue if e not in gone)
        self.delayed -= gone
        for entry in ended:
            await entry.call.publish(entry, result)

    # -- failures ------------------------------------------------------------------------------
    def on_ready(self) -> None:
        self.failed_starts, self._not_before = 0, 0.0

    async def on_exit(self, container: Container) -> None:
        """A container is gone: its inputs go to another one, and a failed start is counted."""
        self.containers.remove(container)
        lost = [i for i, (_, owner) in self.running.items() if owner is container]
        for input_id in reversed(lost):
            await self._reschedule(self._release(input_id), container)
        if container.failed_to_start and not self.stopped:
            first, most = self.cloud.options.crash_backoff
            self._not_before = time.monotonic() + min(first * 2**self.failed_starts, most)
            self.failed_starts += 1
            limit = self.cloud.escalation_limit(self.function.app_id)
            if limit is not None and self.failed_starts >= limit:
                await self._fail_waiting(container.startup_result)
        self.wake()
        await self.scale()

    async def _reschedule(self, entry: Input, container: Container) -> None:
        if entry.cancelled:
            await entry.call.publish(entry, CANCELLED, task_id=container.task_id)
            return
        entry.lost_containers += 1
        enough = entry.lost_containers >= self.cloud.options.max_internal_failures
        # What has streamed out cannot be taken back, and so not be done again.
        if not (enough or entry.call.data_out):
            self.queue.appendleft(entry)
            return
        message = f"Container exited with status {container.exit_status} while running the input"
        result = Result(status=Result.GENERIC_STATUS_INTERNAL_FAILURE, exception=message)
        await entry.call.publish(entry, result, task_id=container.task_id)
