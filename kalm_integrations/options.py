"""The arguments of the client and the adapters, documented for callers and type checkers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypedDict, cast

from pydantic import SecretStr

from kalm_integrations.backends import Backend
from kalm_integrations.identity import SpaceIdentity, VectorIdentity
from kalm_integrations.protocol import Truncate, VectorDtype
from kalm_integrations.result import Usage
from kalm_integrations.transports.base import Transport

STARTUP_TIMEOUT: Final = 1800.0
"""Seconds that a start on Modal may take: the default of `kalm deploy --startup-timeout`."""


class ClientOptions(TypedDict, total=False):
    """Arguments of `KalmClient` and of each `KalmModalEmbeddings`."""

    backend: Backend
    """Where vectors come from. "modal": the app of `kalm deploy`, over Modal's RPC. "http":
    the service at `base_url`, or that app's HTTP endpoint. "local": the embedded engine, in this
    process. "auto": HTTP if there is a `base_url`, else Modal if its package and a token are
    present, else an error; it never falls back to "local". Default: "auto"."""

    base_url: str | Sequence[str] | None
    """URL of the service, with or without `/v1`: our server, or any with OpenAI's API; or several
    of equal servers, in a list or with commas between them (docs/failover.md). With
    backend="http" and no URL, the endpoint of the app on Modal is looked up. Default: None."""

    hedge: bool
    """With several URLs: send a slow query to a second server, at most 5 % of all queries.
    Default: False."""

    app_name: str
    """Name of the app on Modal. Default: "vllm-embedding-snapshot"."""

    class_name: str
    """Name of the app's class on Modal. Default: "VLLMEmbeddingSnapshot"."""

    environment_name: str | None
    """Modal environment of the app; None is the token's own. Default: None."""

    api_key: str | SecretStr | None
    """Bearer key of the service. Default: None."""

    modal_key: str | SecretStr | None
    """Token ID of a Modal proxy token, for a service on Modal that needs one. Default: None."""

    modal_secret: str | SecretStr | None
    """Token secret that belongs to `modal_key`; pass both or neither. Default: None."""

    transport: Transport | None
    """An object that sends requests instead of a backend; see docs/architecture.md. It
    excludes the arguments above. Default: None."""

    model: str | None
    """Name of the model. None is the embedded engine's with backend="local", else KaLM. Default:
    None."""

    profile: str | None
    """The known model that `model` names, where a server has it under another name: "kalm",
    "kalm-mini", or a full name. It decides the query instruction, the dimensions and the identity
    that is declared. Default: None."""

    dimensions: int | None
    """Dimensions of the vectors; None is the model's native number. Default: None."""

    query_instruction: str | None
    """Instruction for queries: a preset's name, a task in one sentence, or a template with {text}.
    None is the model's own: the model card's prompt for KaLM, nothing for the embedded engine.
    Default: None."""

    document_instruction: str | None
    """Instruction for documents, in the same forms. None is nothing, except where
    `query_instruction` names a symmetric preset ("sts", "duplicates", ...): then documents get
    that instruction too. Default: None."""

    truncate: Truncate
    """What to do with a text over the model's length: "error" raises and names it, "end" embeds its
    beginning. Use "end" in pipelines that must not stop. Default: "error"."""

    batch_size: int
    """Maximum number of texts in one request, 1 to 2048. Default: 128."""

    max_concurrency: int
    """Maximum number of concurrent requests, 1 to 256, over all calls of this object. Queries have
    as many of their own, so that they never wait behind documents. Default: 16."""

    timeout: float
    """Seconds for a whole call, including retries and a cold start; for each request of
    `iter_embed`, whose caller sets the pace. Default: 600."""

    connect_timeout: float
    """Seconds to reach the service. Default: 10."""

    keepalive_timeout: float
    """Seconds that an idle HTTP connection is kept for the next request. It must be shorter than
    the server and all proxies keep theirs, which is 60 s or more for most of them. Default: 15."""

    max_retries: int
    """Maximum number of retries of one request after temporary failures, 0 to 100. Default: 6."""

    vector_dtype: VectorDtype
    """Type in which vectors are transferred. float16 is finer than the bf16 that KaLM computes in
    and takes half the bytes; float32 gives the engine's own bits. Default: "float16"."""

    show_progress: bool
    """Show a progress bar on stderr while documents are embedded. Default: False."""

    expected_identity: SpaceIdentity | VectorIdentity | Mapping[str, Any] | str | None
    """The space that the service must report: a `SpaceIdentity`, its dict or its JSON, what
    `warm_up` returned, "kalm-fp8" or "kalm-int8". None expects the backend's own model. Default:
    None."""

    on_usage: Callable[[Usage], object] | None
    """Called with the `Usage` of each answered request, on the caller's thread or event loop. Its
    exceptions are logged and lose no vectors. Default: None."""


def clear_arguments(options: object) -> None:
    """Empty the arguments of a call: tracebacks may show them, and some are secret."""
    cast(dict[str, Any], options).clear()
