"""Every argument of the client and both adapters, declared once.

Each is read from the argument, then from `KALM_` + its name in capitals, then from its default;
all are checked on construction, which opens nothing. Unknown arguments are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator

from kalm_integrations import prompts
from kalm_integrations.batching import RequestLimits
from kalm_integrations.environment import EnvironmentSettings
from kalm_integrations.identity import SpaceIdentity, VectorIdentity, fingerprint
from kalm_integrations.models import EMBEDDED, KALM, NAMED_SPACES, ModelProfile, profile_of
from kalm_integrations.protocol import Truncate, VectorDtype
from kalm_integrations.result import Usage
from kalm_integrations.validation import MAX_CHARACTERS

NO_BACKEND = (
    'backend="auto" found no service to talk to. For a service on Modal install modal (the extra '
    '"modal") and run `modal setup`, or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET. For an HTTP '
    "service pass base_url= or set KALM_BASE_URL. For the embedded engine (a small model in this "
    'process, for learning, tests and CI) pass backend="local" or set KALM_BACKEND=local.'
)


def modal_is_configured() -> bool:
    """Whether Modal's package and a token are there; asks nobody, imports nothing."""
    if find_spec("modal") is None:
        return False
    token = "MODAL_TOKEN_ID" in os.environ and "MODAL_TOKEN_SECRET" in os.environ
    within = os.environ.get("MODAL_IS_REMOTE") == "1"
    file = Path(os.environ.get("MODAL_CONFIG_PATH") or "~/.modal.toml").expanduser()
    return token or within or file.is_file()


def _read_identity(value: Any) -> Any:
    if isinstance(value, VectorIdentity):
        return value.space
    if isinstance(value, str):
        if value.strip() in NAMED_SPACES:
            return NAMED_SPACES[value.strip()]
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(  # noqa: TRY004 (pydantic reports it)
                "expected_identity is neither the JSON of a space identity nor one of "
                f"{', '.join(NAMED_SPACES)}"
            )
    return SpaceIdentity.from_dict(value) if isinstance(value, dict) else value


def _clean_secret(value: SecretStr | None) -> SecretStr | None:
    """Without the white space that a file or a shell leaves around it; None if nothing is left."""
    if value is None:
        return None
    secret = value.get_secret_value().strip()
    if not secret.isprintable():
        raise ValueError("it holds control characters")
    return SecretStr(secret) if secret else None


DEFAULT_APP = "vllm-embedding-snapshot"
DEFAULT_CLASS = "VLLMEmbeddingSnapshot"
FIRST_START = 1800.0
"""Seconds that a start on Modal may take: the default of `kalm deploy --startup-timeout`."""
Secret = Annotated[SecretStr | None, AfterValidator(_clean_secret)]


class ClientConfig(EnvironmentSettings):
    """The arguments that `KalmClient` and both `KalmModalEmbeddings` share.

    Raises:
        ConfigurationError: An argument is unknown, of a wrong type or value, or does not go with
            another; the message says which, where it is from, and what would do.
    """

    variable_prefix = "KALM_"
    arguments_only = frozenset({"on_usage"})

    backend: Literal["auto", "modal", "http", "local"] = "auto"
    """Where vectors come from. "modal": the app that `kalm deploy` made, over Modal's RPC.
    "http": the service at `base_url`, or that app's HTTP door. "local": the embedded engine, in
    this process. "auto": HTTP if there is a `base_url`, else Modal if its package and a token are
    there, else an error; it never falls back to "local"."""

    base_url: str | None = None
    """Where the service is, with or without `/v1`: our server, or any with OpenAI's API. With
    backend="http" and no URL, the HTTP door of the app on Modal is looked up."""

    app_name: str = Field(DEFAULT_APP, min_length=1)
    """The app on Modal."""

    modal_class: str = Field(DEFAULT_CLASS, min_length=1, alias="class_name")
    """Its class. The argument is `class_name`; LlamaIndex has a method of that name."""

    environment_name: str | None = None
    """The environment on Modal; None is the token's own."""

    api_key: Secret = Field(default=None, exclude=True)
    """Bearer key of the service."""

    modal_key: Secret = Field(default=None, exclude=True)
    """Token id of a Modal proxy token, for a service on Modal that asks for one."""

    modal_secret: Secret = Field(default=None, exclude=True)
    """Its secret; both or neither."""

    model: str | None = None
    """The model's name. None is the embedded engine's with "local", KaLM with all others."""

    dimensions: int | None = None
    """Dimensions of the vectors; None is the model's native number."""

    query_instruction: str | None = None
    """A preset's name, a task sentence, or a template with {text}; see `prompts.resolve`. None is
    the model's own default: the model card's prompt for KaLM, nothing for the embedded engine."""

    document_instruction: str | None = None
    """The same for documents. None is nothing, except where `query_instruction` names a symmetric
    preset ("sts", "duplicates", ...): there documents carry the instruction too."""

    truncate: Truncate = "error"
    """A text over the model's length: "error" raises and names it, "end" embeds its beginning.
    Pipelines that must not stop are best served by "end"."""

    batch_size: int = Field(128, ge=1, le=2048)
    """Most texts in one request."""

    max_concurrency: int = Field(16, ge=1, le=256)
    """Most requests in flight, over all calls of this object; queries have as many again of
    their own, so that they never wait behind documents. Over HTTP, one text that a blocking call
    waits for comes on top."""

    timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds for a whole call, retries and cold start included; for each request of
    `iter_embed`, whose caller sets the pace."""

    connect_timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    """Seconds to reach the service; how long its answer may take is `timeout`'s matter."""

    keepalive_timeout: float = Field(15.0, gt=0, allow_inf_nan=False)
    """Seconds that an idle HTTP connection is kept for the next request. It must be shorter than
    the server and all proxies keep theirs, which is 60 s or more for most of them."""

    max_retries: int = Field(6, ge=0, le=100)
    """Most retries of one request, for failures that may pass."""

    vector_dtype: VectorDtype = "float16"
    """Type in which vectors travel. float16 is finer than the bf16 that KaLM computes in and
    takes half the bytes; float32 gives the engine's own bits."""

    show_progress: bool = False
    """A progress bar on stderr while documents are embedded."""

    expected_identity: Annotated[SpaceIdentity | None, BeforeValidator(_read_identity)] = None
    """The space that the service must report: a `SpaceIdentity`, its dict or its JSON, what
    `warm_up` returned, or "kalm-fp8". None expects the backend's own model."""

    on_usage: Callable[[Usage], None] | None = Field(default=None, exclude=True, repr=False)
    """Called with the `Usage` of each request that was answered, on the caller's thread or loop.
    What it raises is logged, and costs no vectors."""

    def __getstate__(self) -> dict[Any, Any]:
        # Pickles lie in files and travel: no secret goes along. Whoever unpickles reads the
        # environment again.
        state = super().__getstate__()
        fields = state["__dict__"].items()
        kept = {name: value for name, value in fields if not isinstance(value, SecretStr)}
        return state | {"__dict__": kept}

    def __setstate__(self, state: dict[Any, Any]) -> None:
        self.__init__(**state["__dict__"])  # type: ignore[misc]

    @model_validator(mode="after")
    def _check(self) -> ClientConfig:
        self._check_url()
        backend, profile = self.resolved_backend, self.profile
        if backend == "http" and self.base_url is None and not modal_is_configured():
            raise ValueError(
                'backend="http" needs base_url= or KALM_BASE_URL, or Modal\'s package and a token '
                "to look it up"
            )
        if backend == "local" and self.model not in (None, EMBEDDED.space.model):
            raise ValueError(f'model={self.model!r}: backend="local" runs {EMBEDDED.space.model!r}')
        if (self.modal_key is None) != (self.modal_secret is None):
            raise ValueError("modal_key and modal_secret go together: pass both or neither")
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions={self.dimensions}: a positive number")
        if profile.dimensions and self.dimensions not in (None, *profile.dimensions):
            offered = ", ".join(map(str, profile.dimensions))
            raise ValueError(
                f"dimensions={self.dimensions}: {profile.space.model} has {offered}; "
                "leave dimensions out for its native number"
            )
        for name in ("query_instruction", "document_instruction"):
            if (instruction := getattr(self, name)) is not None:
                try:
                    prompts.resolve(instruction)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
        return self

    def _check_url(self) -> None:
        if self.base_url is None:
            return
        url = urlsplit(self.base_url)
        _ = url.port  # raises for one that is none
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ValueError("base_url is not like https://host or http://host:8000/v1")
        if url.username is not None or url.password is not None:
            raise ValueError("base_url holds a credential, which logs would show: use api_key=")

    @property
    def resolved_backend(self) -> Literal["modal", "http", "local"]:
        """The backend, "auto" resolved.

        Raises:
            ValueError: It is "auto", and no service is configured.
        """
        if self.backend != "auto":
            return self.backend
        if self.base_url is not None:
            return "http"
        if not modal_is_configured():
            raise ValueError(NO_BACKEND)
        return "modal"

    @property
    def served_model(self) -> str:
        """The model that is asked for."""
        default = EMBEDDED if self.resolved_backend == "local" else KALM
        return self.model or default.space.model

    @property
    def profile(self) -> ModelProfile:
        """What this client declares of the model behind its backend."""
        return profile_of(self.served_model)

    @property
    def expected_space(self) -> SpaceIdentity:
        """The space that every answer is compared with."""
        return self.expected_identity or self.profile.space

    @property
    def vector_dimensions(self) -> int:
        """Dimensions that every answer must have; 0 for what the model has, if that is unknown."""
        return self.dimensions or (*self.profile.dimensions, 0)[0]

    @property
    def query_template(self) -> str:
        """What queries are set into, with `{text}` where the query goes."""
        if self.query_instruction is None:
            return self.profile.query_template
        return prompts.resolve(self.query_instruction)

    @property
    def document_template(self) -> str:
        """What documents are set into, with `{text}` where the document goes."""
        if self.document_instruction is not None:
            return prompts.resolve(self.document_instruction)
        if self.query_instruction is not None and prompts.is_symmetric(self.query_instruction):
            return self.query_template
        return prompts.AS_IS

    @property
    def vector_identity(self) -> VectorIdentity:
        """What an index of this client's document vectors holds. Declared: asks no service."""
        return VectorIdentity(
            space=self.expected_space,
            dimensions=self.vector_dimensions,
            document_template=self.document_template,
        )

    @property
    def cache_namespace(self) -> str:
        """A name that changes exactly when document vectors may: for `CacheBackedEmbeddings` and
        the like. Letters, digits and "-" only. Asks no service: so over HTTP another revision under
        the same name shows only where `expected_identity` is given."""
        return self._cache_namespace("document", self.document_template)

    @property
    def query_cache_namespace(self) -> str:
        """The same for queries. Never share one cache namespace between both roles."""
        return self._cache_namespace("query", self.query_template)

    @property
    def request_limits(self) -> RequestLimits:
        """How much goes into one request."""
        tokens, cut = self.profile.max_tokens, None
        if self.truncate == "end":
            cut = MAX_CHARACTERS
        if self.resolved_backend != "modal":
            return RequestLimits(texts=self.batch_size, text_tokens=tokens, characters=cut)
        # Over 2 MiB, a request or an answer takes Modal's way through blob storage: two more
        # round trips. 64 KiB are for what is around vectors and texts.
        inline = 2 * 2**20 - 2**16
        row = np.dtype(self.vector_dtype).itemsize * self.vector_dimensions
        texts = min(self.batch_size, inline // row) if row else self.batch_size
        return RequestLimits(texts=texts, bytes=inline, text_tokens=tokens, characters=cut)

    def without_client(self) -> ClientConfig:
        """These settings and nothing else: no framework, no connections."""
        fields = {name: getattr(self, name) for name in ClientConfig.model_fields}
        return ClientConfig.model_construct(**fields)

    def template(self, role: prompts.Role) -> str:
        """What texts of `role` are set into."""
        return self.query_template if role == "query" else self.document_template

    def _cache_namespace(self, role: prompts.Role, template: str) -> str:
        # Truncation moves the vectors of long texts only, and never the space: cache keys only.
        cut = self.profile.max_tokens if self.truncate == "end" else None
        key = {
            "space": self.expected_space.to_dict(),
            "dimensions": self.vector_dimensions,
            "template": template,
            "cut_at": cut,
        }
        return f"kalm-{role}-{fingerprint(key)}"
