"""The short way of a query: its caller, who waits anyway, drives an event loop itself.

Over the I/O thread a query changes threads twice, which costs more than all else the client does
with it. The loop here is the client's own and no other call runs on it: what strikes the caller in
its midst, Ctrl-C for one, costs that loop and nothing else.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
import weakref
from concurrent.futures import Future
from typing import TYPE_CHECKING

from kalm_integrations.errors import KalmError
from kalm_integrations.event_loop import ClientLoop, is_ending

if TYPE_CHECKING:
    from kalm_integrations.batching import Batch
    from kalm_integrations.result import EmbeddedBatch
    from kalm_integrations.session import Call, Session

_FRESH = 0.5  # seconds for which a connection is not looked at before it is used again
_STRUCK = 1.0  # seconds that a call which was struck has to unwind


class Lane:
    """A session on a loop that rests between calls: for one blocking caller at a time.

    Args:
        session: Its own, and unused. (Its transport was imported by another before: a fork while
            a lane imports something would leave that half done in the child.)
        owner: Its end closes the lane.
    """

    def __init__(self, session: Session, owner: object) -> None:
        self._session = session
        self._loop = ClientLoop()
        self._used = time.monotonic()
        self._turn = threading.Lock()
        self._owned = weakref.finalize(owner, self.close)
        self._owned.atexit = False
        self.closed = False
        _lanes.add(self)

    def send(self, batch: Batch, call: Call) -> EmbeddedBatch | None:
        """`Session.send`; None where this caller must take the I/O thread: another is here, a
        loop runs in this thread, or the lane is closed.

        Raises:
            KalmError: As `Session.send`.
        """
        if not self._turn.acquire(blocking=False):
            return None
        try:
            if self.closed or is_ending() or _in_a_loop():
                return None
            return self._loop.run_until_complete(self._send(batch, call))
        except KalmError:
            raise
        except BaseException:
            # From a signal's handler; the loop may not have finished what it was at.
            self.close()
            raise
        finally:
            self._turn.release()

    def close(self) -> Future[None]:
        """Close the connection, on a thread of its own, since the caller's may be a loop's.
        A call that is under way ends with an error."""
        done: Future[None] = Future()
        if self.closed:
            done.set_result(None)
            return done
        self.closed = True
        self._owned.detach()

        def close() -> None:
            try:
                if self._turn.locked():
                    self._loop.call_soon_threadsafe(self._interrupt)
                with self._turn:
                    self._wind_up()
            finally:
                done.set_result(None)

        try:
            threading.Thread(target=close, name="kalm-close", daemon=True).start()
        except RuntimeError:  # the interpreter is ending, and the connection with it
            done.set_result(None)
        return done

    async def _send(self, batch: Batch, call: Call) -> EmbeddedBatch:
        if time.monotonic() - self._used > _FRESH:
            await asyncio.sleep(0)  # what the service closed meanwhile is noticed first
        try:
            return await self._session.send(batch, call)
        finally:
            self._used = time.monotonic()

    def _interrupt(self) -> None:
        self._closing = asyncio.ensure_future(self._session.close())

    def _wind_up(self) -> None:
        _lanes.discard(self)
        self._loop.run_until_complete(self._end())
        self._loop.close()

    async def _end(self) -> None:
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        if left:  # one whose step was struck may never end
            await asyncio.wait(left, timeout=_STRUCK)
        await self._session.close()


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


_lanes: set[Lane] = set()
_abandoned: list[Lane] = []


@atexit.register
def _close_all() -> None:
    for lane in list(_lanes):
        if not lane.closed and lane._turn.acquire(blocking=False):  # else a daemon thread is there
            lane.closed = True
            lane._wind_up()


def _after_fork_in_child() -> None:
    # As with the I/O thread's loop: the selector is the parent's too.
    for lane in _lanes:
        lane.closed = True
        lane._loop.let_go()
        _abandoned.append(lane)
    _lanes.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
