"""vLLM's scheduler with small steps while a query waits.

With vLLM's priorities alone, a step with a query is filled up with documents, and a document that
was begun comes before all waiting texts. Runs in the engine core's process. The interface is not
public: check it when the pin of vLLM changes.
"""

from __future__ import annotations

from typing import Any, Final

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.request import Request

from modal_backend.engines.base import PRIORITY

FILL: Final = 512
"""Tokens to which documents fill up a step with queries: few, but enough to use a card well."""


class QueryFirstScheduler(AsyncScheduler):  # type: ignore[misc]  # vLLM is not installed everywhere
    """Limits the tokens of a step, and of each text in it, while there are queries."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.step: int = self.scheduler_config.max_num_batched_tokens
        self.fill = min(FILL, self.step // 2)
        self._queries: list[Request] = []

    def add_request(self, request: Request) -> None:
        if request.priority == PRIORITY["query"]:
            self._queries.append(request)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        self._queries = [query for query in self._queries if not query.is_finished()]
        queries = [tokens for tokens in map(_remaining_tokens, self._queries) if tokens > 0]
        begun = 0
        if queries:
            documents = (each for each in self.running if each.priority != PRIORITY["query"])
            begun = sum(_remaining_tokens(document) > 0 for document in documents)
        step, share = step_for(queries, begun, self.step, self.fill)
        self.max_num_scheduled_tokens = step
        self.scheduler_config.long_prefill_token_threshold = share
        return super().schedule(*args, **kwargs)


def _remaining_tokens(request: Request) -> int:
    """Its tokens that are not scheduled yet."""
    tokens: int = request.num_tokens - request.num_computed_tokens
    return tokens


def step_for(queries: list[int], begun: int, step: int, fill: int) -> tuple[int, int]:
    """Return the size of the next step and the most tokens that a text may have in it, 0 for any.

    Args:
        queries: Remaining tokens of each query.
        begun: Number of documents that are computed in part; vLLM continues those first.
        step: Most tokens of a step.
        fill: Tokens of a step with queries, unless the queries need more.
    """
    if not queries:
        return step, 0
    if not begun:
        return min(step, max(fill, sum(queries))), 0
    # The share holds documents back. It applies to every text, so it must suffice for the queries.
    share = max((fill - sum(queries)) // begun, *queries)
    share = max(1, min(share, step // 2 // begun))
    return min(step, begun * share + sum(queries)), share
