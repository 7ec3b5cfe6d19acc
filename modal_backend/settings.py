"""The settings of a deployment.

They are read where `kalm deploy` or `modal deploy` runs, from `KALM_DEPLOY_` and the name in
capitals, and stored in the image, so that the container reads the same.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from kalm_integrations.environment import EnvironmentSettings
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import (
    DEFAULT_APP,
    KALM,
    NAMED_SPACES,
    SCHEMES,
    Quantization,
    profile_of,
)
from modal_backend import gpus
from modal_backend.engines.registry import ENGINES, EngineType

Snapshot = Literal["off", "awake", "asleep"]
Auth = Literal["proxy", "proxy+bearer", "bearer-public"]
CanaryMode = Literal["refuse", "warn"]

REGION: Final = 1.75
"""Highest factor on prices of a pinned region."""
WINDOWS: Final = (2, 3600)
"""Range of `scaledown_window`, in seconds."""

LOAD_ATTEMPTS: Final = 2
"""Loads for which a start has time: the first one, and another after a failure."""
AROUND_STARTS: Final = 60
"""Seconds before and after the loads, for imports and commits of volumes."""
AROUND_LOADS: Final = 210
"""Seconds of an attempt besides vLLM's start: importing vLLM and checking the weights (90), warm-up
(30), canary (30), sleep (60; 12 were measured)."""
SHORTEST_LOAD: Final = 300
"""Least seconds for vLLM's start: 23.5 GB at 200 MB/s take 120, and compiling about as long."""
SHORTEST_START: Final = AROUND_STARTS + LOAD_ATTEMPTS * (SHORTEST_LOAD + AROUND_LOADS)
"""Least `startup_timeout` with vLLM, in seconds."""


def _split(value: Any) -> Any:
    if isinstance(value, list):  # of an option, each of whose values may have commas
        value = ",".join(value)
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _engine_name(name: str) -> str:
    if name not in ENGINES:
        raise ValueError(f"{name!r} is not an engine; there are {', '.join(ENGINES)}")
    return name


class DeploySettings(EnvironmentSettings):
    """Every field is also an option of `kalm deploy`.

    Raises:
        ConfigurationError: A value is invalid or contradicts another.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)  # the options' help
    variable_prefix = "KALM_DEPLOY_"

    engine: Annotated[
        str, AfterValidator(_engine_name), Field(json_schema_extra={"enum": list(ENGINES)})
    ] = "vllm"
    """"vllm": KaLM on a GPU. "embedded": the small model on a CPU, to see everything else work."""

    model: str = KALM.space.model
    """Repository of the model that vLLM runs. Any embedding model works; KaLM and KaLM mini have a
    profile here."""

    revision: Annotated[str | None, Field(pattern="^[0-9a-f]{40}$")] = None
    """Its commit, all 40 digits. Default: the pinned commit of a known model, or the newest
    downloaded one."""

    app_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = DEFAULT_APP
    """The app's name on Modal."""

    environment_name: str | None = None
    """The environment on Modal. Default: that of the token."""

    gpu: Annotated[tuple[str, ...], BeforeValidator(_split)] = ("A100-40GB",)
    """GPU types in order of preference; "!" pins a type ("H100!" is never an H200)."""

    quantization: Quantization = "none"
    """"int8" halves the weights, which `quantize_model_weights` writes first. "fp8" halves them too
    and is 1.5 times as fast, on GPUs that support it, but less exact. Each is another vector
    space."""

    max_model_len: Annotated[int | None, Field(ge=256, le=32_768)] = None
    """Longest text in tokens. Default: 8192 for KaLM, 512 for KaLM mini, the model's own limit for
    others."""

    enforce_eager: bool = False
    """No compilation and no CUDA graphs: a faster first start, but slower embedding."""

    gpu_memory_utilization: Annotated[float | None, Field(gt=0, le=1)] = None
    """Share of the GPU for weights and KV cache. Default: the KV cache of two steps, which is
    enough for embedding and keeps snapshots small."""

    snapshot: Snapshot = "asleep"
    """State of the engine in the snapshot: "asleep" is the smallest; "off" loads in each start."""

    min_containers: Annotated[int, Field(ge=0, le=100)] = 0
    """Containers that stay up, and are billed, when idle."""

    max_containers: Annotated[int, Field(ge=1, le=100)] = 1
    """Most containers; limits the $ an hour."""

    scaledown_window: Annotated[int, Field(ge=WINDOWS[0], le=WINDOWS[1])] = 300
    """Seconds that an idle container waits for the next call."""

    concurrency: Annotated[int, Field(ge=8, le=1000)] = 128
    """Concurrent calls of a container, at most three quarters of them over HTTP. From half of them
    on, another container starts, up to `max_containers`."""

    timeout: Annotated[int, Field(ge=10, le=86_400)] = 600
    """Seconds for a call."""

    startup_timeout: Annotated[int, Field(ge=60, le=3600)] = 1800
    """Seconds for the start of a container, then Modal kills it and starts another. At least 1080
    with vLLM, for two attempts to load."""

    canary: CanaryMode = "refuse"
    """If the engine's vectors fail the service's own check: "refuse" serves nothing; "warn" serves
    them, and logs, `describe`, metrics, a response header and `kalm doctor` report it."""

    auth: Auth = "proxy"
    """Credentials for HTTP. "proxy": Modal's proxy tokens, checked before a container starts.
    "proxy+bearer": also a bearer key. "bearer-public": only the key; strangers can start the
    container at your expense."""

    api_key_secret: str = "kalm-api-key"  # noqa: S105 (a name)
    """Modal Secret with KALM_API_KEY, for `auth` with bearer."""

    hf_secret: str | None = None
    """Modal Secret with HF_TOKEN, if the download needs one."""

    region: str | None = None
    """Region of the containers, for 1.5 to 1.75 times the price."""

    hf_cache_volume: str = "hf-embedding-cache"
    """Volume of the weights."""

    jit_cache_volume: str = "vllm-jit-cache"
    """Volume of compiled kernels."""

    bulk_volume: str = "kalm-bulk"
    """Volume for the input and shards of bulk jobs. Created as version 2, which supports commits of
    many containers at the same time."""

    @model_validator(mode="after")
    def _check(self) -> DeploySettings:
        least, most = self.min_containers, self.max_containers
        if least > most:
            raise ValueError(f"--min-containers {least} is over --max-containers {most}")
        if self.on_gpu:
            for name in self.gpu:
                self._check_gpu(name)
            if not self.gpu:
                raise ValueError("gpu names none")
            # Modal must not kill a container that still has time for a load: it would start
            # another one, which would end in the same way, and each start is billed.
            if self.engine_ready_timeout < SHORTEST_LOAD:
                raise ValueError(
                    f"--startup-timeout {self.startup_timeout} is too short: vLLM needs at least "
                    f"{SHORTEST_START} s for {LOAD_ATTEMPTS} attempts to load the model"
                )
        unsupported = {name for engine in ENGINES.values() for name in engine.options}
        unsupported |= set() if self.on_gpu else {"gpu"}
        for name in sorted(unsupported - self.engine_type.options):
            value = getattr(self, name, None)
            if name in type(self).model_fields and value != type(self).model_fields[name].default:
                text = ",".join(value) if isinstance(value, tuple) else value
                option = f"--{name.replace('_', '-')} {text}"
                raise ValueError(f"{option}: the {self.engine} engine has no such option")
        return self

    def _check_gpu(self, name: str) -> None:
        gpus.gpu_named(name)
        kind = self.quantization
        *others, last = [gpu for gpu in gpus.GPUS if not self._gpu_problem(gpu, kind)]
        if not (problem := self._gpu_problem(name, kind)):
            return
        default = " (the default)" if "gpu" not in self.model_fields_set else ""
        advice = f"--gpu {name}{default} {problem}. Use --gpu {', '.join(others)} or {last}"
        if gpus.lacks_fp8(name, kind):
            raise ValueError(f"{advice}, or drop --quantization fp8")
        if smaller := [each for each in gpus.QUANTIZATIONS if not self._gpu_problem(name, each)]:
            advice += f", or --quantization {' or '.join(smaller)}, which is another vector space"
        raise ValueError(advice)

    def _gpu_problem(self, name: str, quantization: Quantization) -> str:
        """Why the model does not run on this GPU; the size of other models is unknown."""
        problem = gpus.lacks_fp8(name, quantization)
        if self.model == KALM.space.model:
            problem = problem or gpus.too_small(name, quantization, self.max_model_len)
        return problem

    @property
    def engine_type(self) -> EngineType:
        """The engine's entry in the registry."""
        return ENGINES[self.engine]

    @property
    def engine_options(self) -> dict[str, Any]:
        """The options with which the engine is loaded."""
        fields = type(self).model_fields
        return {name: getattr(self, name) for name in self.engine_type.options & fields.keys()}

    @property
    def on_gpu(self) -> bool:
        """Whether containers have a GPU."""
        return self.engine_type.gpu

    @property
    def attempt_timeout(self) -> int:
        """Seconds for one attempt to load, including warm-up, canary and sleep."""
        around = AROUND_STARTS if self.on_gpu else 0
        return (self.startup_timeout - around) // LOAD_ATTEMPTS

    @property
    def engine_ready_timeout(self) -> int:
        """Seconds for vLLM to load the model: its VLLM_ENGINE_READY_TIMEOUT_S."""
        return self.attempt_timeout - AROUND_LOADS

    @property
    def memory_mib(self) -> int:
        """Host memory of a container."""
        gib = gpus.HOST_GIB[self.quantization] if self.on_gpu else self.engine_type.memory_gib
        return gib * 1024

    @property
    def cpu(self) -> float:
        """Cores of a container."""
        return gpus.CORES if self.on_gpu else self.engine_type.cores

    @property
    def dollars_per_hour(self) -> float:
        """Price of one container with its most expensive GPU."""
        second = gpus.machine_dollars(self.cpu, self.memory_mib / 1024)
        if self.on_gpu:
            second = gpus.container_dollars(self.gpu, self.quantization)
        return 3600 * second * (REGION if self.region else 1.0)

    @property
    def http_concurrency(self) -> int:
        """Most concurrent calls over HTTP; the rest is for RPC."""
        return self.concurrency * 3 // 4

    @property
    def space(self) -> SpaceIdentity:
        """The space that should be served; of an unknown model, only its name."""
        if self.engine_type.profile is not None:
            return self.engine_type.profile.space
        space = profile_of(self.model).space
        if not space.declared:
            return space
        scheme = SCHEMES.get(self.quantization, space.quantization)
        return replace(space, quantization=scheme, revision=self.revision or space.revision)

    @property
    def client_arguments(self) -> dict[str, str]:
        """Arguments with which a client finds this deployment and expects its vectors."""
        arguments = {}
        if self.app_name != DEFAULT_APP:
            arguments["app_name"] = self.app_name
        if self.environment_name:
            arguments["environment_name"] = self.environment_name
        if self.space.model != KALM.space.model:
            arguments["model"] = self.space.model
        if self.space.declared and self.space != profile_of(self.space.model).space:
            named = (name for name, space in NAMED_SPACES.items() if space == self.space)
            arguments["expected_identity"] = next(named, json.dumps(self.space.to_dict()))
        return arguments

    @property
    def needs_bearer(self) -> bool:
        """Whether callers need the bearer key."""
        return self.auth != "proxy"

    def as_variables(self) -> dict[str, str]:
        """Return the variables from which `DeploySettings()` reads the same values."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            self.variables()[name]: ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in values.items()
            if value is not None
        }
