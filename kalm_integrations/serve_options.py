"""`kalm serve`: which engine, and where. The key is a variable's."""

from __future__ import annotations

import argparse
import os
import re
from typing import TYPE_CHECKING, Final

from pydantic import SecretStr

from kalm_integrations.argparsing import number
from kalm_integrations.errors import ConfigurationError

if TYPE_CHECKING:
    from kalm_integrations.argparsing import Verbs

_VLLM_MODEL: Final = ("model", "revision")
_VLLM_OPTIONS: Final = ("max_model_len", "quantization", "dtype", "enforce_eager")


def add(verbs: Verbs) -> None:
    """Add the command."""
    parser = verbs.add_parser(
        "serve",
        help="serve an engine over HTTP, with OpenAI's embeddings API",
        description="Serve an engine over HTTP, with OpenAI's embeddings API. Callers present the "
        "key that KALM_API_KEY holds.",
    )
    parser.add_argument(
        "--engine",
        choices=["embedded", "vllm"],
        default="embedded",
        help="embedded: a small model on the CPU, to learn with. vllm: KaLM, or another embedding "
        "model, on your GPU; `pip install vllm==0.32.0` first. Default: %(default)s",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on; default: %(default)s"
    )
    parser.add_argument(
        "--port",
        type=number(0, 2**16 - 1),
        default=8000,
        metavar="N",
        help="port to listen on; 0 takes a free one; default: %(default)s",
    )
    parser.add_argument(
        "--insecure-no-auth", action="store_true", help="no key; on a loopback address only"
    )
    parser.add_argument(
        "--cors-origin",
        type=_origin,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin call from a browser, https://app.example.com for instance; "
        "'*' lets every page; may be repeated; default: none",
    )
    parser.add_argument(
        "--keep-alive",
        type=number(1, 3600),
        default=75,
        metavar="S",
        help="seconds that an idle connection is kept; more than your proxy keeps it; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--grace",
        type=number(0, 3600),
        default=10,
        metavar="S",
        help="seconds that requests in progress have to finish after SIGTERM or Ctrl-C; "
        "default: %(default)s",
    )
    parser.add_argument(
        "--canary",
        choices=["refuse", "warn"],
        default="refuse",
        help="an engine whose vectors fail the service's own check: refuse to serve it, or warn "
        "and serve it; default: %(default)s",
    )
    vllm = parser.add_argument_group("with --engine vllm", argument_default=argparse.SUPPRESS)
    vllm.add_argument(
        "--model",
        metavar="PATH_OR_REPO",
        help="a folder, or a repository that `hf download` has put on this machine; default: KaLM",
    )
    vllm.add_argument(
        "--revision", metavar="R", help="of the repository; default: the one tested, or main"
    )
    vllm.add_argument(
        "--max-model-len",
        type=number(256),
        metavar="N",
        help="longest text in tokens, at least 256, which the canary's texts need; default: 8192 "
        "for KaLM, what the model allows for others",
    )
    vllm.add_argument(
        "--quantization",
        choices=["none", "fp8"],
        help="fp8 halves the weights while they are loaded; another vector space; default: none",
    )
    vllm.add_argument(
        "--dtype",
        choices=["auto", "bf16", "fp16", "fp32"],
        help="of weights and arithmetic; default: auto, the model's own",
    )
    vllm.add_argument(
        "--enforce-eager",
        action="store_true",
        help="neither compile nor capture CUDA graphs: starts sooner, runs slower",
    )
    parser.set_defaults(run=run, extra="server,local")


def run(arguments: argparse.Namespace) -> bool:
    """Serve until it is told to stop.

    Args:
        arguments: Those of `add`.

    Returns:
        True: what could fail raises.

    Raises:
        ConfigurationError: An option is for another engine, there is no key, or no free port.
        ImportError: An extra is not installed.
        KalmError: The engine cannot be loaded, cannot be trusted, or died.
    """
    asked = vars(arguments)
    given = [name for name in (*_VLLM_MODEL, *_VLLM_OPTIONS) if name in asked]
    if arguments.engine == "vllm":
        arguments.extra = "server,vllm"
    elif given:
        option = f"--{given[0].replace('_', '-')}"
        raise ConfigurationError(f"{option} is for --engine vllm, not for {arguments.engine}.")

    from modal_backend.engines.vllm.config import VLLMOptions
    from modal_backend.http.serve import Model, serve
    from modal_backend.http.server import ServerOptions

    options = VLLMOptions(**{name: asked[name] for name in given if name in _VLLM_OPTIONS})
    model = Model(**{name: asked[name] for name in given if name in _VLLM_MODEL}, options=options)
    key = os.environ.get("KALM_API_KEY")
    serve(
        model if arguments.engine == "vllm" else None,
        arguments.host,
        arguments.port,
        SecretStr(key) if key else None,
        insecure=arguments.insecure_no_auth,
        canary_mode=arguments.canary,
        options=ServerOptions(
            keep_alive=arguments.keep_alive,
            grace=arguments.grace,
            cors_origins=tuple(arguments.cors_origin),
        ),
    )
    return True


def _origin(value: str) -> str:
    """The type of an option that takes an origin, as browsers write it in a header."""
    if value != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+", value):
        raise argparse.ArgumentTypeError(
            f"{value!r} is not an origin: a scheme and a host in small letters, with a port if it "
            "is not the usual one, and nothing after them, like https://app.example.com"
        )
    return value
