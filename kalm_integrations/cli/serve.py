"""`kalm serve`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Final, Literal

from cyclopts import Group, Parameter

from kalm_integrations.cli.failures import needs
from kalm_integrations.cli.parameters import Canary, between
from kalm_integrations.errors import ConfigurationError
from kalm_integrations.models import Quantization
from modal_backend.engines.registry import ENGINES

_VLLM: Final = Group("With --engine vllm")


def _check_origin(_: type, origin: str) -> None:
    if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+", origin):
        raise ValueError(
            "Write scheme and host of an origin in lower case, a port only if it is not the "
            "default, and nothing after them, like https://app.example.com."
        )


def serve(
    *,
    engine: Annotated[
        str,
        Parameter(
            choices=tuple(ENGINES),
            help="; ".join(f"{each.name}: {each.description}" for each in ENGINES.values()) + ".",
        ),
    ] = "embedded",
    host: Annotated[str, Parameter(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int,
        Parameter(validator=between(0, 65535), help="Port to listen on; 0 takes a free one."),
    ] = 8000,
    insecure_no_auth: Annotated[
        bool, Parameter(help="Serve without a key; on a loopback address only.")
    ] = False,
    cors_origin: Annotated[
        tuple[Annotated[str, Parameter(validator=_check_origin)], ...],
        Parameter(
            help="Allow browser pages of this origin to call, for instance "
            "https://app.example.com; '*' allows all. Can be repeated.",
        ),
    ] = (),
    keep_alive: Annotated[
        int,
        Parameter(
            validator=between(1, 3600),
            help="Seconds that an idle connection is kept open; set it above your proxy's timeout.",
        ),
    ] = 75,
    grace: Annotated[
        int,
        Parameter(
            validator=between(0, 3600),
            help="Seconds that requests in progress have to finish after SIGTERM or Ctrl-C.",
        ),
    ] = 10,
    canary: Annotated[
        Canary,
        Parameter(
            help="Refuse to serve an engine whose vectors fail the service's own check, or warn "
            "and serve it."
        ),
    ] = "refuse",
    model: Annotated[
        str | None,
        Parameter(
            group=_VLLM,
            help="A folder, or a repository downloaded with `hf download`. Default: KaLM.",
        ),
    ] = None,
    revision: Annotated[
        str | None,
        Parameter(
            group=_VLLM,
            help="Commit of the repository. Default: the tested one, or main.",
        ),
    ] = None,
    max_model_len: Annotated[
        int | None,
        Parameter(
            group=_VLLM,
            validator=between(256),
            help="Longest text in tokens, at least 256 for the canary's texts. Default: 8192 for "
            "KaLM, the model's own limit for others.",
        ),
    ] = None,
    quantization: Annotated[
        Quantization | None,
        Parameter(
            group=_VLLM,
            help="int8 halves the memory of the weights, which `kalm quantize` writes first; fp8 "
            "halves it too, and is less exact. Each is another vector space. Default: none.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"] | None,
        Parameter(
            group=_VLLM,
            help="Type of weights and arithmetic. Default: auto, the model's own.",
        ),
    ] = None,
    enforce_eager: Annotated[
        bool,
        Parameter(
            group=_VLLM,
            help="Do not compile or capture CUDA graphs: starts sooner, runs slower.",
        ),
    ] = False,
) -> None:
    """Serve an engine until interrupted."""
    chosen = ENGINES[engine]
    values = {
        "model": model,
        "revision": revision,
        "max_model_len": max_model_len,
        "quantization": quantization,
        "dtype": dtype,
        "enforce_eager": enforce_eager or None,
    }
    options = {name: value for name, value in values.items() if value is not None}
    if other := [name for name in options if name not in chosen.options]:
        owner = next(each.name for each in ENGINES.values() if other[0] in each.options)
        option = f"--{other[0].replace('_', '-')}"
        raise ConfigurationError(f"{option} is for --engine {owner}, not for {engine}.")
    with needs(f"server,{chosen.extra}"):
        from pydantic import SecretStr

        from modal_backend.http.serve import serve
        from modal_backend.http.server import ServerOptions

        key, file = os.environ.get("KALM_API_KEY"), os.environ.get("KALM_API_KEYS_FILE")
        serve(
            chosen,
            options,
            host,
            port,
            SecretStr(key) if key else None,
            insecure=insecure_no_auth,
            keys_file=Path(file) if file else None,
            canary_mode=canary,
            options=ServerOptions(keep_alive=keep_alive, grace=grace, cors_origins=cors_origin),
        )
