"""`kalm serve`: its options. The key is read from a variable."""

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

_ENGINE_OPTIONS: Final = (
    *("model", "revision", "max_model_len"),
    *("quantization", "dtype", "enforce_eager"),
)


def add(verbs: Verbs) -> None:
    """Add the command."""
    from modal_backend.engines.registry import ENGINES

    engines = "; ".join(f"{engine.name}: {engine.description}" for engine in ENGINES.values())
    parser = verbs.add_parser(
        "serve",
        help="serve an engine over HTTP, with OpenAI's embeddings API",
        description="Serve an engine over HTTP, with OpenAI's embeddings API. Callers present the "
        "key that KALM_API_KEY holds.",
    )
    parser.add_argument(
        "--engine",
        choices=list(ENGINES),
        default="embedded",
        help=f"{engines}; default: %(default)s",
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
        "--insecure-no-auth", action="store_true", help="serve without a key; loopback address only"
    )
    parser.add_argument(
        "--cors-origin",
        type=_origin,
        action="append",
        default=[],
        metavar="ORIGIN",
        help="allow browser pages of this origin to call, for instance https://app.example.com; "
        "'*' allows all; may be repeated; default: none",
    )
    parser.add_argument(
        "--keep-alive",
        type=number(1, 3600),
        default=75,
        metavar="S",
        help="seconds that an idle connection is kept open; set it above your proxy's timeout; "
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
        help="what to do when the engine's vectors fail the service's own check: refuse to serve, "
        "or warn and serve; default: %(default)s",
    )
    vllm = parser.add_argument_group("with --engine vllm", argument_default=argparse.SUPPRESS)
    vllm.add_argument(
        "--model",
        metavar="PATH_OR_REPO",
        help="a folder, or a repository downloaded with `hf download`; default: KaLM",
    )
    vllm.add_argument(
        "--revision", metavar="R", help="commit of the repository; default: the tested one, or main"
    )
    vllm.add_argument(
        "--max-model-len",
        type=number(256),
        metavar="N",
        help="longest text in tokens, at least 256 for the canary's texts; default: 8192 for KaLM, "
        "the model's own limit for others",
    )
    vllm.add_argument(
        "--quantization",
        choices=["none", "fp8"],
        help="fp8 halves the memory of the weights, and is another vector space; default: none",
    )
    vllm.add_argument(
        "--dtype",
        choices=["auto", "bf16", "fp16", "fp32"],
        help="type of weights and arithmetic; default: auto, the model's own",
    )
    vllm.add_argument(
        "--enforce-eager",
        action="store_true",
        help="do not compile or capture CUDA graphs: starts sooner, runs slower",
    )
    parser.set_defaults(run=run, extra="server,local")


def run(arguments: argparse.Namespace) -> bool:
    """Serve until interrupted.

    Args:
        arguments: Those of `add`.

    Returns:
        True; every failure raises.

    Raises:
        ConfigurationError: An option of another engine, no key, or no free port.
        ImportError: An extra is not installed.
        KalmError: The engine cannot be loaded, failed its check, or died.
    """
    from modal_backend.engines.registry import ENGINES

    engine = ENGINES[arguments.engine]
    arguments.extra = f"server,{engine.extra}"
    options = {name: value for name, value in vars(arguments).items() if name in _ENGINE_OPTIONS}
    if other := sorted(options.keys() - engine.options, key=_ENGINE_OPTIONS.index):
        owner = next(each.name for each in ENGINES.values() if other[0] in each.options)
        option = f"--{other[0].replace('_', '-')}"
        raise ConfigurationError(f"{option} is for --engine {owner}, not for {engine.name}.")

    from modal_backend.http.serve import serve
    from modal_backend.http.server import ServerOptions

    key = os.environ.get("KALM_API_KEY")
    serve(
        engine,
        options,
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
    """Parse an option that takes an origin, as browsers write it in a header."""
    if value != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s?#@A-Z]+", value):
        raise argparse.ArgumentTypeError(
            f"{value!r} is not an origin: write scheme and host in lower case, a port only if it "
            "is not the default, and nothing after them, like https://app.example.com"
        )
    return value
