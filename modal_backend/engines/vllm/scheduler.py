"""In which order vLLM computes: a query waits for the step that runs, and for a small one.

vLLM's priorities decide who is next, not how much is done until then: a step that takes a query
along is filled with documents, and the chunk of a long document that was begun comes before all
that waits. Runs in the engine core's process; vLLM calls this interface not public, so it is for
the pinned version.
"""

from __future__ import annotations

from typing import Any, Final

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from modal_backend.engines.priority_lock import PRIORITY

FILL: Final = 512
"""Tokens of a step that has queries, filled up with documents: few, and a card is used well."""


class QueriesFirst(AsyncScheduler):  # type: ignore[misc]  # vLLM is not installed everywhere
    """vLLM's scheduler, whose steps are small while a query waits."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.step: int = self.scheduler_config.max_num_batched_tokens
        self.fill = min(FILL, self.step // 2)
        self._queries: list[Request] = []

    def add_request(self, request: Request) -> None:
        """See vLLM's."""
        if request.priority == PRIORITY["query"]:
            self._queries.append(request)
        super().add_request(request)

    def schedule(self, *arguments: Any, **named: Any) -> Any:
        """See vLLM's."""
        self._queries = [query for query in self._queries if not query.is_finished()]
        queries = [left for left in map(_left, self._queries) if left > 0]
        begun = 0
        if queries:
            documents = (each for each in self.running if each.priority != PRIORITY["query"])
            begun = sum(_left(document) > 0 for document in documents)
        step, share = step_for(queries, begun, self.step, self.fill)
        self.max_num_scheduled_tokens = step
        self.scheduler_config.long_prefill_token_threshold = share
        return super().schedule(*arguments, **named)


def _left(request: Request) -> int:
    """Its tokens that no step has taken yet."""
    left: int = request.num_tokens - request.num_computed_tokens
    return left


def step_for(queries: list[int], begun: int, step: int, fill: int) -> tuple[int, int]:
    """How many tokens the next step takes.

    Args:
        queries: Tokens left to compute of each query.
        begun: Documents of which a part is computed; vLLM goes on with them first of all.
        step: Most tokens of a step.
        fill: Tokens of a step with queries, where they do not need more.

    Returns:
        Tokens of the step, and how many of them one text may have; 0 is any number.
    """
    if not queries:
        return step, 0
    if not begun:
        return min(step, max(fill, sum(queries))), 0
    # No text may have more: that is how documents are held back, so it must do for the queries.
    share = max((fill - sum(queries)) // begun, *queries)
    share = max(1, min(share, step // 2 // begun))
    return min(step, begun * share + sum(queries)), share
