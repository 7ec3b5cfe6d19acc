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
