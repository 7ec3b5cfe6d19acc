"""`ClientConfig`: the arguments of the client and the adapters, validated, and what follows.

Each is read from the argument, then from the variable `KALM_` + its name in capitals, then from
its default. Construction validates all of them and opens nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any, Self, Unpack

import numpy as np
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    WithJsonSchema,
    model_validator,
)

from kalm_integrations import backends, prompts
from kalm_integrations.backends import Backend, ResolvedBackend
from kalm_integrations.batching import RequestLimits
from kalm_integrations.environment import EnvironmentSettings
from kalm_integrations.identity import SpaceIdentity, VectorIdentity, fingerprint
from kalm_integrations.models import (
    DEFAULT_APP,
    EMBEDDED,
    KALM,
    ModelProfile,
    is_known,
    known_model,
    profile_of,
    read_space,
)
from kalm_integrations.options import ClientOptions, clear_arguments
from kalm_integrations.protocol import Truncate, VectorDtype
from kalm_integrations.result import Usage
from kalm_integrations.transports.base import Transport
from kalm_integrations.validation import MAX_CHARACTERS


def _clean_secret(value: SecretStr | None) -> SecretStr | None:
    """Without the white space that a file or a shell leaves around it; None if nothing is left."""
    secret = value.get_secret_value().strip() if value else ""
    if not secret.isprintable():
        raise ValueError("it holds control characters")
    return SecretStr(secret) if secret else None


def _read_urls(value: Any) -> Any:
    """One URL, or several with commas between them."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        value = ",".join(map(str, value))
    return value.strip() if isinstance(value, str) else value


# `doctor.machine` recognizes secrets by this type.
Secret = Annotated[SecretStr | None, AfterValidator(_clean_secret), Field(exclude=True)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]

_APP_ON_MODAL = ("app_name", "class_name", "environment_name")
_SERVICE = ("base_url", *_APP_ON_MODAL)
_CREDENTIALS = ("api_key", "modal_key", "modal_secret")


class ClientConfig(EnvironmentSettings):
    """`ClientOptions`, complete and validated. It cannot be changed.

    Raises:
        ConfigurationError: An argument is unknown, has a wrong type or value, or contradicts
            another. The message names the argument, its source and the remedy.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)
    variable_prefix = "KALM_"
    arguments_only = frozenset({"on_usage", "transport"})
    protected_fields = ("backend", "transport")

    backend: Backend = "auto"
    base_url: Annotated[str | None, BeforeValidator(_read_urls)] = None
    hedge: bool = False
    app_name: Annotated[str, Field(min_length=1)] = DEFAULT_APP
    class_name: Annotated[str, Field(min_length=1)] = "VLLMEmbeddingSnapshot"
    environment_name: str | None = None
    api_key: Secret = None
    modal_key: Secret = None
    modal_secret: Secret = None
    transport: Annotated[Transport | None, Field(exclude=True), WithJsonSchema({})] = None
    model: str | None = None
    profile: Annotated[str, AfterValidator(known_model)] | None = None
    dimensions: int | None = None
    query_instruction: str | None = None
    document_instruction: str | None = None
    truncate: Truncate = "error"
    batch_size: Annotated[int, Field(ge=1, le=2048)] = 128
    max_concurrency: Annotated[int, Field(ge=1, le=256)] = 16
    timeout: Seconds = 600.0
    connect_timeout: Seconds = 10.0
    keepalive_timeout: Seconds = 15.0
    max_retries: Annotated[int, Field(ge=0, le=100)] = 6
    vector_dtype: VectorDtype = "float16"
    show_progress: bool = False
    expected_identity: Annotated[SpaceIdentity | None, BeforeValidator(read_space)] = None
    on_usage: Annotated[
        Callable[[Usage], object] | None, Field(exclude=True), WithJsonSchema({})
    ] = None
    _resolved_backend: ResolvedBackend = PrivateAttr()

    def __init__(self, **options: Unpack[ClientOptions]) -> None:
        try:
            super().__init__(**options)  # type: ignore[misc]
        finally:
            clear_arguments(options)

    @classmethod
    def contradicted_by(cls, name: str, value: Any) -> Collection[str]:
        match name, value:
            case _, None | "auto":
                return ()
            case "backend", "local":
                return (*_SERVICE, "profile")
            case "backend", "modal":
                return ("base_url",)
            case "base_url", _:
                return _APP_ON_MODAL
            case "transport", _:
                return ("backend", *_SERVICE, *_CREDENTIALS)
        return ()

    def __copy__(self) -> Self:
        return self  # it cannot be changed

    def __deepcopy__(self, memo: object = None) -> Self:
        return self  # nor may its transport and its callback be copied

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickles lie in files and travel: they hold no secret. Unpickling reads those from the
        # environment, and nothing else. What was not set has its default there too.
        values = {n: v for n, v in self.__dict__.items() if n in self.model_fields_set}
        plain = {n: v for n, v in values.items() if not isinstance(v, SecretStr)}
        return _unpickled, (plain,)

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        """Arguments that differ from their defaults; no secrets, no callback."""
        fields = type(self).model_fields
        return [
            (name, value)
            for name, value in self.__dict__.items()
            if value != fields[name].default
            and not isinstance(value, SecretStr)
            and name != "on_usage"
        ]

    def model_post_init(self, context: object) -> None:
        """Resolve "auto" once, before `_check_values`: later the environment is not read."""
        self._resolved_backend = "transport"
        if self.transport is None:
            self._resolved_backend = backends.resolve(self.backend, self.base_url)

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        for url in self.base_urls:
            backends.check_url(url)
        if self.hedge and len(self.base_urls) == 1:
            raise ValueError("hedge=True needs several URLs in base_url")
        if self.resolved_backend == "local" and self.model not in (None, EMBEDDED.space.model):
            raise ValueError(f'model={self.model!r}: backend="local" runs {EMBEDDED.space.model!r}')
        if (self.modal_key is None) != (self.modal_secret is None):
            raise ValueError("modal_key and modal_secret go together: pass both or neither")
        if self.dimensions is not None and self.dimensions < 1:
            raise ValueError(f"dimensions={self.dimensions}: a positive number")
        if (known := self.model_profile.dimensions) and self.dimensions not in (None, *known):
            raise ValueError(
                f"dimensions={self.dimensions}: {self.served_model} has "
                f"{', '.join(map(str, known))}; leave dimensions out for its native number"
            )
        for name in ("query_instruction", "document_instruction"):
            instruction = getattr(self, name)
            try:
                prompts.resolve("none" if instruction is None else instruction)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return self

    @property
    def resolved_backend(self) -> ResolvedBackend:
        """What sends the requests: the backend, "auto" resolved, or the transport passed."""
        return self._resolved_backend

    @property
    def base_urls(self) -> list[str]:
        """The URLs in `base_url`, each once."""
        if self.base_url is None:
            return []
        return list(dict.fromkeys(url.strip() for url in self.base_url.split(",")))

    @property
    def served_model(self) -> str:
        """Name of the model that requests name."""
        default = EMBEDDED if self.resolved_backend == "local" else KALM
        return self.model or default.space.model

    @property
    def model_profile(self) -> ModelProfile:
        """What this client declares of the model behind its backend."""
        return profile_of(self.profile or self.served_model)

    @property
    def lacks_instruction(self) -> bool:
        """Whether queries get no instruction because the model is unknown, and nobody chose so."""
        unknown = not is_known(self.profile or self.served_model)
        return unknown and self.query_instruction is None

    @property
    def expected_space(self) -> SpaceIdentity:
        """The space that every answer is compared with."""
        return self.expected_identity or self.model_profile.space

    @property
    def vector_dimensions(self) -> int:
        """Dimensions that every answer must have; 0 for what the model has, if that is unknown."""
        return self.dimensions or next(iter(self.model_profile.dimensions), 0)

    @property
    def query_template(self) -> str:
        """What queries are set into, with `{text}` where the query goes."""
        if self.query_instruction is None:
            return self.model_profile.query_template
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
        tokens, cut = self.model_profile.max_tokens, None
        if self.truncate == "end":
            cut = MAX_CHARACTERS + 1  # the service cuts the last one, and reports it
        if self.resolved_backend != "modal":
            return RequestLimits(texts=self.batch_size, text_tokens=tokens, characters=cut)
        # Over 2 MiB, a request or an answer takes Modal's way through blob storage: two more
        # round trips. 64 KiB are for what is around vectors and texts.
        inline = 2 * 2**20 - 2**16
        row = np.dtype(self.vector_dtype).itemsize * self.vector_dimensions
        texts = min(self.batch_size, inline // row) if row else self.batch_size
        return RequestLimits(texts=texts, bytes=inline, text_tokens=tokens, characters=cut)

    def template(self, role: prompts.Role) -> str:
        """What texts of `role` are set into."""
        return self.query_template if role == "query" else self.document_template

    def _cache_namespace(self, role: prompts.Role, template: str) -> str:
        # Truncation moves the vectors of long texts only, and never the space: cache keys only.
        cut = self.model_profile.max_tokens if self.truncate == "end" else None
        key = {
            "space": self.expected_space.to_dict(),
            "dimensions": self.vector_dimensions,
            "template": template,
            "cut_at": cut,
        }
        return f"kalm-{role}-{fingerprint(key)}"


def _unpickled(fields: dict[str, Any]) -> ClientConfig:
    config = ClientConfig.__new__(ClientConfig)
    variables = config._variables(fields).items()
    config._validate(fields, {name: value for name, value in variables if name in _CREDENTIALS})
    return config
