"""Shards into Modal's own queue. It starts containers, hands out shards, and tries again."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from kalm_integrations.bulk.on_modal import state as job_state
from kalm_integrations.bulk.on_modal import worker_pool
from kalm_integrations.bulk.on_modal.state import Call, Run, Store


@dataclass(frozen=True)
class Queue:
    """Where shards are sent.

    Attributes:
        app_name: The app's name on Modal.
        environment_name: Its environment; None is the token's own.
        limits: A run with the limits of those that are sent.
    """

    app_name: str
    environment_name: str | None
    limits: Run

    def send(self, store: Store, job: str, shards: list[int]) -> None:
        """Send a new run of `shards`. The run counts before the first of them starts."""
        import modal

        run = self.limits.model_copy(update={"id": job_state.new_run(), "shards": shards})
        folder = f"{job_state.RUNS}/{run.id}"
        store.write({f"{folder}/{job_state.RUN}": run.to_bytes()})
        if not shards:
            return
        found = modal.Cls.from_name(
            self.app_name, worker_pool.CLASS, environment_name=self.environment_name
        )
        workers = found()
        with warnings.catch_warnings():
            # Modal's own class method calls what Modal deprecated for functions. Not through
            # `with_options`: each set of arguments is a variant with snapshots of its own.
            warnings.filterwarnings("ignore", ".*update_autoscaler")
            workers.update_autoscaler(max_containers=run.max_containers)
        count = len(shards)
        call = workers.embed_shard.experimental_spawn_map([job] * count, [run.id] * count, shards)
        store.write({f"{folder}/{job_state.CALL}": Call(call=call.object_id).to_bytes()})


def call_of(store: Store, path: str) -> Any:
    """Modal's handle of a call that was noted; None if nobody lived to note it."""
    import modal

    try:
        content = store.read(path)
    except FileNotFoundError:
        return None
    return modal.FunctionCall.from_id(Call.from_bytes(content, path).call)
