"""LlamaIndex's events around an embedding call, for tracing and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding
from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.embedding import (
    EmbeddingEndEvent,
    EmbeddingStartEvent,
)
from llama_index_instrumentation.dispatcher import Dispatcher
from llama_index_instrumentation.event_handlers import NullEventHandler


@contextmanager
def observed(
    model: BaseEmbedding, dispatcher: Dispatcher, texts: list[str]
) -> Iterator[Callable[[list[Embedding]], None]]:
    """Report the start and the end of a call; yield a function that receives its vectors."""
    if not (model.callback_manager.handlers or _has_handlers(dispatcher)):
        yield lambda _: None
        return
    described = {
        "class_name": model.class_name(),
        "model_name": model.model_name,
        "embed_batch_size": model.embed_batch_size,
    }
    dispatcher.event(EmbeddingStartEvent(model_dict=described))
    with model.callback_manager.event(
        CBEventType.EMBEDDING, payload={EventPayload.SERIALIZED: described}
    ) as event:
        vectors: list[Embedding] = []
        yield vectors.extend
        event.on_end({EventPayload.CHUNKS: texts, EventPayload.EMBEDDINGS: vectors})
    # The constructor would validate, and so copy, every vector.
    ended = EmbeddingEndEvent(chunks=[], embeddings=[])
    dispatcher.event(ended.model_copy(update={"chunks": texts, "embeddings": vectors}))


def _has_handlers(dispatcher: Dispatcher) -> bool:
    """Whether anything handles events: creating one takes longer than all else that LlamaIndex
    does for a query."""
    while all(type(handler) is NullEventHandler for handler in dispatcher.event_handlers):
        if not dispatcher.propagate:
            return False
        dispatcher = dispatcher.parent
    return True
