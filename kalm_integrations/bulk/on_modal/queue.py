"""Shards into Modal's own queue, from here or from a container."""

from __future__ import annotations

import warnings

from kalm_integrations.bulk.on_modal import records, worker_pool
from kalm_integrations.bulk.on_modal.records import Run, Store, run_path


def send_run(app_name: str, environment_name: str | None, store: Store, job: str, run: Run) -> None:
    """Put a run's shards into Modal's own queue, which starts containers, hands out shards, and
    tries again. The run counts before the first of them starts."""
    import modal

    path, count = run_path(run.id, records.RUN), len(run.shards)
    store.write({path: run.to_bytes()})
    if not count:
        return
    found = modal.Cls.from_name(app_name, worker_pool.CLASS, environment_name=environment_name)
    workers = found()
    with warnings.catch_warnings():
        # Modal's own class method calls what Modal deprecated for functions. Not through
        # `with_options`: each set of arguments is a variant with snapshots of its own.
        warnings.filterwarnings("ignore", ".*update_autoscaler")
        workers.update_autoscaler(max_containers=run.max_containers)
    call = workers.embed_shard.experimental_spawn_map([job] * count, [run.id] * count, run.shards)
    run.call = call.object_id
    store.write({path: run.to_bytes()})
