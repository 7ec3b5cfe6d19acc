"""Every argument of the client and both adapters, declared once.

Each is read from the argument, then from `KALM_` + its name in capitals, then from its default;
all are checked on construction, which opens nothing. Unknown arguments are refused.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Set
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

from kalm_integrations import prompts
from kalm_integrations.batching import RequestLimits
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.identity import SpaceIdentity, VectorIdentity, fingerprint
from kalm_integrations.profiles import EMBEDDED, KALM, ModelProfile, profile_of
from kalm_integrations.result import Usage
from kalm_integrations.wire import Truncate, VectorDtype

ENVIRONMENT_PREFIX = "KALM_"

NO_BACKEND = (
    'backend="auto" found no service to talk to. For an HTTP service pass base_url= or set '
    "KALM_BASE_URL. For the embedded engine (a small model in this process, for learning, tests "
    'and CI) pass backend="local" or set KALM_BACKEND=local. The door to a service on Modal, RPC, '
    "is not in this version yet."
)


def _variables(names: Set[str]) -> dict[str, str]:
    """What the environment says of `names`; an empty variable is an unset one."""
    found = {name: os.environ.get(_variable(name), "") for name in names - {"on_usage"}}
    return {name: value for name, value in found.items() if value}


def _variable(name: str) -> str:
    return ENVIRONMENT_PREFIX + name.upper()


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{name}: there is no such argument.{hint} There are {', '.join(known)}."


def _explain(error: ValidationError, variables: Mapping[str, str]) -> str:
    """What is wrong, argument by argument; values, which may be secret, are left out."""
    wrong = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        name = str(item["loc"][0]) if item["loc"] else ""
        source = f" (from {_variable(name)})" if name in variables else ""
        message = item["msg"].removeprefix("Value error, ")
        wrong.append(f"{name}{source}: {message}" if name else message)
    return "; ".join(wrong) + "."


def _read_identity(value: Any) -> Any:
    if isinstance(value, VectorIdentity):
        return value.space
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(  # noqa: TRY004 (pydantic reports it)
                "expected_identity is not the JSON of a space identity"
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


Secret = Annotated[SecretStr | None, AfterValidator(_clean_secret)]


def _no_modal_yet(value: Any) -> Any:
    if value == "modal":
        raise ValueError(
            'the door to Modal, RPC, is not in this version yet; there are "http" and "local"'
        )
    return value


class ClientSettings(BaseModel):
    """The arguments that `KalmClient` and both `KalmModalEmbeddings` share.

    Raises:
        ConfigurationError: An argument is unknown, of a wrong type or value, or does not go with
            another; the message says which, where it is from, and what would do.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        protected_namespaces=(),
    )

    backend: Annotated[Literal["auto", "http", "local"], BeforeValidator(_no_modal_yet)] = "auto"
    """Where vectors come from. "http": the service at `base_url`. "local": the embedded engine,
    in this process. "auto" takes the service that is configured, and raises if none is; it never
    falls back to "local"."""

    base_url: str | None = None
    """Where the service is, with or without `/v1`: our server, or any with OpenAI's API."""

    api_key: Secret = Field(default=None, exclude=True)
    """Bearer key of the service."""

    modal_key: Secret = Field(default=None, exclude=True)
    """Token id of a Modal proxy token, for a service on Modal that asks for one."""

    modal_secret: Secret = Field(default=None, exclude=True)
    """Its secret; both or neither."""

    model: str | None = None
    """The model's name. None is the backend's own: KaLM over HTTP, the embedded engine's else."""

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
    their own, so that they never wait behind documents."""

    timeout: float = Field(600.0, gt=0, allow_inf_nan=False)
    """Seconds for a whole call, retries and cold start included; for each request of
    `iter_embed`, whose caller sets the pace."""

    connect_timeout: float = Field(10.0, gt=0, allow_inf_nan=False)
    """Seconds to reach the service; how long its answer may take is `timeout`'s matter."""

    max_retries: int = Field(6, ge=0, le=100)
    """Most retries of one request, for failures that may pass."""

    vector_dtype: VectorDtype = "float16"
    """Type in which vectors travel. float16 is finer than the bf16 that KaLM computes in and
    takes half the bytes; float32 gives the engine's own bits."""

    show_progress: bool = False
    """A progress bar on stderr while documents are embedded."""

    expected_identity: Annotated[SpaceIdentity | None, BeforeValidator(_read_identity)] = None
    """The space that the service must report: a `SpaceIdentity`, its dict or its JSON, or what
    `warm_up` returned. None expects the backend's own model."""

    on_usage: Callable[[Usage], None] | None = Field(default=None, exclude=True, repr=False)
    """Called with the `Usage` of each request that was answered, on the caller's thread or loop.
    What it raises is logged, and costs no vectors."""

    if not TYPE_CHECKING:  # type checkers and signatures show the arguments themselves

        def __init__(self, **arguments: Any) -> None:
            for name in arguments.keys() - type(self).model_fields.keys():
                raise ConfigurationError(_unknown(name, type(self).model_fields))
            variables = _variables(ClientSettings.model_fields.keys() - arguments.keys())
            try:
                super().__init__(**variables, **arguments)
            except ValidationError as error:
                raise ConfigurationError(_explain(error, variables)) from None

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
    def _check(self) -> ClientSettings:
        backend, profile = self.resolved_backend, self.profile
        if backend == "http":
            self._check_url()
        elif backend == "local" and self.model not in (None, EMBEDDED.space.model):
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
        _ = self.query_template, self.document_template  # raise for an instruction that is wrong
        return self

    def _check_url(self) -> None:
        if self.base_url is None:
            raise ValueError('backend="http" needs base_url= or KALM_BASE_URL')
        url = urlsplit(self.base_url)
        _ = url.port  # raises for one that is none
        if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
            raise ValueError("base_url is not like https://host or http://host:8000/v1")
        if url.username is not None or url.password is not None:
            raise ValueError("base_url holds a credential, which logs would show: use api_key=")

    @property
    def resolved_backend(self) -> Literal["http", "local"]:
        """The backend, "auto" resolved.

        Raises:
            ValueError: It is "auto", and no service is configured.
        """
        if self.backend != "auto":
            return self.backend
        if self.base_url is None:
            raise ValueError(NO_BACKEND)
        return "http"

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
        return RequestLimits(texts=self.batch_size, text_tokens=self.profile.max_tokens)

    def without_client(self) -> ClientSettings:
        """These settings and nothing else: no framework, no connections."""
        fields = {name: getattr(self, name) for name in ClientSettings.model_fields}
        return ClientSettings.model_construct(**fields)

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
