"""Shards into Modal's own queue. It starts containers, hands out shards, and tries again."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from kalm_integrations.bulk.on_modal import job_state, worker_pool
from kalm_integrations.bulk.on_modal.job_state import Run
from kalm_integrations.bulk.on_modal.store import Store


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Where shards are sent.

    Attributes:
        app_name: The app's name on Modal.
        environment_name: Its environment; None is the token's own.
        max_containers: That may work at a time, of all jobs from now on.
    """

    app_name: str
    environment_name: str | None
    max_containers: int

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make the same again."""
        return asdict(self)

    def send(self, store: Store, job: str, shards: Sequence[int]) -> str:
        """Send a new run of `shards`; its id. The run counts before the first of them starts."""
        import modal

        run = Run(id=job_state.new_run(), shards=list(shards), max_containers=self.max_containers)
        folder = f"{job_state.RUNS}/{run.id}"
        store.write({f"{folder}/{job_state.RUN}": job_state.to_bytes(run)})
        if not shards:
            return run.id
        found = modal.Cls.from_name(
            self.app_name, worker_pool.CLASS, environment_name=self.environment_name
        )
        workers = found()
        _limit(workers, self.max_containers)
        count = len(shards)
        call = workers.embed_shard.experimental_spawn_map(
            [job] * count, [run.id] * count, list(shards)
        )
        store.write({f"{folder}/{job_state.CALL}": job_state.to_bytes({"call": call.object_id})})
        return run.id


def _limit(workers: Any, max_containers: int) -> None:
    """Set the most containers of the pool.

    Not through `with_options`: each set of its arguments is a variant, which loads the model and
    writes snapshots on its own.
    """
    with warnings.catch_warnings():
        # Modal's own class method calls what Modal deprecated for functions.
        warnings.filterwarnings("ignore", ".*update_autoscaler")
        workers.update_autoscaler(max_containers=max_containers)


def call_of(store: Store, run: str) -> Any:
    """Modal's handle of what a run has sent; None if nobody lived to note it."""
    import modal

    try:
        noted = json.loads(store.read(f"{job_state.RUNS}/{run}/{job_state.CALL}"))
    except FileNotFoundError:
        return None
    return modal.FunctionCall.from_id(noted["call"])
