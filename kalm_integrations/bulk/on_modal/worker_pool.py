"""The pool of containers that embed shards, by the names that both sides know. Imports nothing, so
that `modal deploy` needs no pyarrow."""

from __future__ import annotations

from typing import Final

CLASS: Final = "VLLMBulkEmbedding"
PREPARE: Final = "prepare_bulk"
VOLUME: Final = "/root/kalm-bulk"
"""Where the jobs' Volume is mounted."""
INPUT: Final = "/root/kalm-input"
"""Where an input on Modal or in a bucket is mounted, for `PREPARE`."""
SCALEDOWN_WINDOW: Final = 60
"""Seconds that an idle container waits for another shard, and is paid."""
MAX_CONTAINERS: Final = 4
"""Containers that may work at a time, unless a job sets another limit."""
TIMEOUT: Final = 86_400
"""Seconds that Modal gives a shard: its own limit, and the last resort. It is the same for all
jobs, because a class with other options is a variant with containers and snapshots of its own.
`seconds_for` is what the worker enforces."""

_SLOWEST: Final = 500
"""Tokens a second that a shard has at least: half of a small GPU, with room."""
_SHORTEST: Final = 900


def seconds_for(tokens: int) -> int:
    """Seconds that a shard of so many tokens may take in its container."""
    return min(TIMEOUT, max(_SHORTEST, tokens // _SLOWEST))
