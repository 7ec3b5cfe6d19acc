"""How the service is deployed: every choice, declared and checked once.

Read where `kalm deploy` or `modal deploy` runs, from `KALM_DEPLOY_` + the name in capitals, and
baked into the image, so that the container reads the same.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, model_validator

from kalm_integrations.environment import EnvironmentSettings
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.models import DEFAULT_APP, FP8, KALM, KALM_FP8, profile_of
from modal_backend import gpus
from modal_backend.engines.registry import ENGINES, EngineType
from modal_backend.gpus import Quantization

Snapshot = Literal["off", "awake", "asleep"]
Auth = Literal["proxy", "proxy+bearer", "bearer-public"]
CanaryMode = Literal["refuse", "warn"]


REGION: Final = 1.75
"""What a pinned region multiplies prices by, at most."""
WINDOWS: Final = (2, 3600)
"""Seconds that `scaledown_window` may be."""

LOAD_ATTEMPTS: Final = 2
"""Loads that a start has time for: the first one, and another after a failure."""
AROUND_STARTS: Final = 60
"""Seconds for what comes before and after the loads: imports, commits of volumes."""
AROUND_LOADS: Final = 210
"""Seconds for what comes around vLLM's start in each attempt: importing vLLM and checking the
weights (90), warm-up (30), canary (30), sleep (60; 12 were measured)."""
SHORTEST_LOAD: Final = 300
"""Seconds for which vLLM has to be waited for at least: 23.5 GB at 200 MB/s take 120, compiling
takes about as long."""
SHORTEST_START: Final = AROUND_STARTS + LOAD_ATTEMPTS * (SHORTEST_LOAD + AROUND_LOADS)
"""Seconds that `startup_timeout` has to be with vLLM."""


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
    """What `kalm deploy` takes; every field is an option of it too.

    Raises:
        ConfigurationError: A choice is unknown, or does not go with another.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)  # the options' help

    variable_prefix = "KALM_DEPLOY_"

    engine: Annotated[
        str, AfterValidator(_engine_name), Field(json_schema_extra={"enum": list(ENGINES)})
    ] = "vllm"
    """"vllm": KaLM on a GPU. "embedded": the small model on a CPU, to see everything else work."""

    model: str = KALM.space.model
    """The repository of the model that vLLM runs; any embedding model of vLLM's, though only KaLM
    and its sibling have a profile here."""

    revision: str | None = Field(None, pattern="^[0-9a-f]{40}$")
    """Its commit, all 40 digits; without it the one that we pin for a model that we know, else the
    newest that was downloaded."""

    app_name: str = Field(DEFAULT_APP, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The app's name on Modal."""

    environment_name: str | None = None
    """The environment on Modal; without it the token's own."""

    gpu: Annotated[tuple[str, ...], BeforeValidator(_split)] = ("A100-40GB",)
    """GPU types, the first that is free is taken; "!" pins ("H100!" is never an H200)."""

    quantization: Quantization = "none"
    """"fp8" halves the weights and is half as fast again, on GPUs that compute in it; another
    vector space than "none"."""

    max_model_len: int | None = Field(None, ge=256, le=32_768)
    """Longest text, in tokens; without it 8192 for KaLM, 512 for its sibling, and the model's own
    limit for others."""

    enforce_eager: bool = False
    """Neither compile nor capture CUDA graphs: a faster first start, and slower ever after."""

    gpu_memory_utilization: float | None = Field(None, gt=0, le=1)
    """Share of the GPU that weights and KV cache may fill; without it what two steps need, which
    is enough for embedding and keeps snapshots small."""

    snapshot: Snapshot = "asleep"
    """What a container comes back from: "asleep" is the smallest, "off" loads each time."""

    min_containers: int = Field(0, ge=0, le=100)
    """Containers that are kept up, and paid, when idle."""

    max_containers: int = Field(1, ge=1, le=100)
    """Most containers, and so most $ an hour."""

    scaledown_window: int = Field(300, ge=WINDOWS[0], le=WINDOWS[1])
    """Seconds that an idle container waits for the next call."""

    concurrency: int = Field(128, ge=8, le=1000)
    """Calls that a container takes at a time; HTTP may take three quarters of them. From half of
    them on, another container is started, up to `max_containers`."""

    timeout: int = Field(600, ge=10, le=86_400)
    """Seconds that a call may take."""

    startup_timeout: int = Field(1800, ge=60, le=3600)
    """Seconds that a container may take to start; Modal kills it then, and starts another. vLLM
    gets two attempts in it: at least 1080 are needed."""

    canary: CanaryMode = "refuse"
    """What becomes of an engine whose vectors fail the service's own check. "refuse": nothing is
    served. "warn": it is served, and logs, `describe`, metrics, a response header and `kalm doctor`
    report it."""

    auth: Auth = "proxy"
    """Of the HTTP endpoint. "proxy": Modal's proxy tokens, checked before a container wakes.
    "proxy+bearer": our bearer key too. "bearer-public": the key alone; strangers can wake the
    container, which you pay."""

    api_key_secret: str = "kalm-api-key"  # noqa: S105 (a name)
    """The Modal Secret that holds KALM_API_KEY, for `auth` with bearer."""

    hf_secret: str | None = None
    """The Modal Secret that holds HF_TOKEN, if the download needs one."""

    region: str | None = None
    """Pins the containers to a region, for 1.5 to 1.75 times the price."""

    hf_cache_volume: str = "hf-embedding-cache"
    """Volume of the weights."""

    jit_cache_volume: str = "vllm-jit-cache"
    """Volume of compiled kernels."""

    bulk_volume: str = "kalm-bulk"
    """Volume of bulk jobs: their input, and their shards. Made of version 2, which takes commits
    of many containers at a time."""

    @model_validator(mode="after")
    def _check(self) -> DeploySettings:
        if self.min_containers > self.max_containers:
            raise ValueError(
                f"--min-containers {self.min_containers} is over --max-containers "
                f"{self.max_containers}"
            )
        if self.on_gpu:
            self._check_gpus()
            self._check_startup()
        of_others = {option for other in ENGINES.values() for option in other.options}
        of_others |= set() if self.on_gpu else {"gpu"}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name in of_others - self.engine_type.options and value != field.default:
                shown = ",".join(value) if isinstance(value, tuple) else value
                option = f"--{name.replace('_', '-')} {shown}"
                raise ValueError(f"{option}: the {self.engine} engine has no such option")
        return self

    def _check_gpus(self) -> None:
        if not self.gpu:
            raise ValueError("gpu names none")
        for name in self.gpu:
            gpus.gpu_named(name)
            if wrong := gpus.lacks_fp8(name, self.quantization):
                default = " (the default)" if "gpu" not in self.model_fields_set else ""
                raise ValueError(
                    f"--gpu {name}{default} {wrong}. Use --gpu {self._fitting('fp8')}, or drop "
                    "--quantization fp8"
                )
            if self.model != KALM.space.model:
                continue  # of others, nobody has told us what they need
            if wrong := gpus.too_small(name, self.quantization, self.max_model_len):
                larger = self._fitting(self.quantization)
                raise ValueError(f"--gpu {name} {wrong}. Use --gpu {larger}{self._or_fp8(name)}")

    def _check_startup(self) -> None:
        """Modal must not kill a container that still has an attempt to load: it would start
        another one, which would end in the same way, and each start is billed."""
        if self.engine_ready_timeout < SHORTEST_LOAD:
            raise ValueError(
                f"--startup-timeout {self.startup_timeout} is too short: vLLM needs at least "
                f"{SHORTEST_START} s for {LOAD_ATTEMPTS} attempts to load the model"
            )

    def _fitting(self, quantization: Quantization) -> str:
        """The GPUs that the model runs on, for a message."""

        def fits(name: str) -> bool:
            if gpus.lacks_fp8(name, quantization):
                return False
            known = self.model == KALM.space.model
            return not (known and gpus.too_small(name, quantization, self.max_model_len))

        *others, last = filter(fits, gpus.GPUS)
        return f"{', '.join(others)} or {last}"

    def _or_fp8(self, name: str) -> str:
        """A hint, where it helps."""
        none = gpus.lacks_fp8(name, "fp8") or gpus.too_small(name, "fp8", self.max_model_len)
        return "" if none else ", or --quantization fp8, which is another vector space"

    @property
    def engine_type(self) -> EngineType:
        """The engine's entry in the registry."""
        return ENGINES[self.engine]

    @property
    def engine_options(self) -> dict[str, Any]:
        """What the engine is loaded with."""
        fields = type(self).model_fields
        return {name: getattr(self, name) for name in self.engine_type.options & fields.keys()}

    @property
    def on_gpu(self) -> bool:
        """Whether containers have a GPU."""
        return self.engine_type.gpu

    @property
    def attempt_timeout(self) -> int:
        """Seconds that one attempt to load may take, warm-up, canary and sleep included."""
        around = AROUND_STARTS if self.on_gpu else 0
        return (self.startup_timeout - around) // LOAD_ATTEMPTS

    @property
    def engine_ready_timeout(self) -> int:
        """Seconds that vLLM may take to load the model: its VLLM_ENGINE_READY_TIMEOUT_S."""
        return self.attempt_timeout - AROUND_LOADS

    @property
    def memory_mib(self) -> int:
        """Host memory."""
        gib = gpus.HOST_GIB[self.quantization] if self.on_gpu else self.engine_type.memory_gib
        return gib * 1024

    @property
    def cpu(self) -> float:
        """Cores."""
        return gpus.CORES if self.on_gpu else self.engine_type.cores

    @property
    def dollars_per_hour(self) -> float:
        """Of one container, at its dearest GPU."""
        if self.on_gpu:
            second = gpus.container_dollars(self.gpu, self.quantization)
        else:
            second = gpus.machine_dollars(self.cpu, self.memory_mib / 1024)
        return 3600 * second * (REGION if self.region else 1.0)

    @property
    def http_concurrency(self) -> int:
        """Calls that may come over HTTP at a time, so that they leave RPC its share."""
        return self.concurrency * 3 // 4

    @property
    def space(self) -> SpaceIdentity:
        """The space that is meant to be served; of a model that we do not know, its name only."""
        if self.engine_type.profile is not None:
            return self.engine_type.profile.space
        space = profile_of(self.model).space
        if not space.declared:
            return space
        if self.quantization == "fp8":
            space = replace(space, quantization=FP8)
        return replace(space, revision=self.revision or space.revision)

    @property
    def client_arguments(self) -> dict[str, str]:
        """What a client must be told to find this deployment and to expect its vectors."""
        arguments = {}
        if self.app_name != DEFAULT_APP:
            arguments["app_name"] = self.app_name
        if self.environment_name:
            arguments["environment_name"] = self.environment_name
        if self.space.model != KALM.space.model:
            arguments["model"] = self.space.model
        if self.space == KALM_FP8.space:
            arguments["expected_identity"] = "kalm-fp8"
        elif self.space.declared and self.space != profile_of(self.space.model).space:
            arguments["expected_identity"] = json.dumps(self.space.to_dict())
        return arguments

    @property
    def needs_bearer(self) -> bool:
        """Whether callers present our key."""
        return self.auth != "proxy"

    def as_variables(self) -> dict[str, str]:
        """The variables from which `DeploySettings()` reads the same again."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {
            self.variables()[name]: ",".join(value) if isinstance(value, tuple) else str(value)
            for name, value in values.items()
            if value is not None
        }
