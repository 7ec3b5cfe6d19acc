"""Shards into Modal's own queue. It starts containers, hands out shards, and tries again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from kalm_integrations.bulk.on_modal import pool, records
from kalm_integrations.bulk.on_modal.records import Description, Run
from kalm_integrations.bulk.on_modal.store import Store

_SLOWEST: Final = 500
"""Tokens a second that a shard has at least: half of a small GPU, with room."""
_SHORTEST, _LONGEST = 900, 86_400
"""Seconds that a shard may take; Modal's own limit is a day."""


@dataclass(frozen=True, kw_only=True)
class Queue:
    """Where shards are sent.

    Attributes:
        app_name: The app's name on Modal.
        environment_name: Its environment; None is the token's own.
        max_containers: That may work at a time.
    """

    app_name: str
    environment_name: str | None
    max_containers: int

    def to_dict(self) -> dict[str, Any]:
        """The arguments that make the same again."""
        return asdict(self)

    def send(self, store: Store, job: str, description: Description, shards: Sequence[int]) -> str:
        """Send a new run of `shards`; its id. The run counts before the first of them starts."""
        import modal

        run = Run(id=records.new_run(), shards=list(shards), max_containers=self.max_containers)
        folder = f"{records.RUNS}/{run.id}"
        store.write({f"{folder}/{records.RUN}": records.to_bytes(run)})
        if not shards:
            return run.id
        found = modal.Cls.from_name(
            self.app_name, pool.CLASS, environment_name=self.environment_name
        )
        largest = max(description.tokens[number] for number in shards)
        timeout = min(_LONGEST, max(_SHORTEST, largest // _SLOWEST))
        sized = found.with_options(max_containers=self.max_containers, timeout=timeout)
        count = len(shards)
        call = sized().embed_shard.experimental_spawn_map(
            [job] * count, [run.id] * count, list(shards)
        )
        store.write({f"{folder}/{records.CALL}": records.to_bytes({"call": call.object_id})})
        return run.id


def call_of(store: Store, run: str) -> Any:
    """Modal's handle of what a run has sent; None if nobody lived to note it."""
    import modal

    try:
        noted = json.loads(store.read(f"{records.RUNS}/{run}/{records.CALL}"))
    except FileNotFoundError:
        return None
    return modal.FunctionCall.from_id(noted["call"])
