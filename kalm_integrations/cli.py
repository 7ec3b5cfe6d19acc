"""The command `kalm`. Exit status: 0 fine, 1 failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pydantic import SecretStr

import kalm_integrations
from kalm_integrations import cost, evaluation
from kalm_integrations.errors import ConfigurationError, KalmError
from kalm_integrations.extras import install_command

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[argparse.ArgumentParser]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: Of argparse: wrong usage (2), `--help` or `--version` (0).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal can show every character
            stream.reconfigure(errors="replace")
    arguments = _parser().parse_args(argv)
    try:
        return 0 if arguments.run(arguments) else 1
    except ConfigurationError as error:
        return _fail(arguments, str(error), status=2)
    except KalmError as error:
        return _fail(arguments, str(error), status=1)
    except ImportError as error:
        install = install_command(arguments.extra)
        return _fail(arguments, f"{error}. This command needs more: {install}", status=1)
    except KeyboardInterrupt:
        return 130


def _fail(arguments: argparse.Namespace, message: str, *, status: int) -> int:
    sys.stderr.write(f"kalm {arguments.verb}: {message}\n")
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kalm", description="KaLM embeddings for LangChain, LlamaIndex and numpy."
    )
    version = f"kalm-integrations {kalm_integrations.__version__}"
    parser.add_argument("--version", action="version", version=version)
    verbs = parser.add_subparsers(dest="verb", metavar="command", required=True)
    for add in VERBS:
        add(verbs)
    return parser


def _add_quickstart(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "quickstart",
        help="index real text through LangChain and LlamaIndex, and ask it a few questions",
        description="Index real text in a vector store through LangChain and through LlamaIndex, "
        "with the embedded engine, and ask it a few questions.",
    )
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="PATH",
        help="a folder of Markdown, reStructuredText and text files; "
        "without it, the docstrings of Python's standard library",
    )
    parser.add_argument("--question", metavar="TEXT", help="your own question")
    parser.set_defaults(run=_quickstart, extra="quickstart")


def _quickstart(arguments: argparse.Namespace) -> bool:
    from kalm_integrations.quickstart import run

    return run(arguments.docs, arguments.question)


def _add_serve(verbs: Verbs) -> None:
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
    parser.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    parser.add_argument(
        "--port", type=_port, default=8000, help="default: %(default)s; 0 takes a free one"
    )
    parser.add_argument(
        "--insecure-no-auth", action="store_true", help="no key; on a loopback address only"
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
        type=_length,
        metavar="N",
        help="longest text in tokens; default: 8192 for KaLM, what the model allows for others",
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
    parser.set_defaults(run=_serve, extra="server,local")


_VLLM_MODEL: Final = ("model", "revision")
_VLLM_OPTIONS: Final = ("max_model_len", "quantization", "dtype", "enforce_eager")


def _length(value: str) -> int:
    length = int(value)
    if length < 256:
        raise argparse.ArgumentTypeError(f"{length} is under 256, which the canary's texts need")
    return length


def _port(value: str) -> int:
    port = int(value)
    if not 0 <= port < 2**16:
        raise argparse.ArgumentTypeError(f"{port} is not between 0 and 65535")
    return port


def _serve(arguments: argparse.Namespace) -> bool:
    asked = vars(arguments)
    given = [name for name in (*_VLLM_MODEL, *_VLLM_OPTIONS) if name in asked]
    if arguments.engine == "vllm":
        arguments.extra = "server,vllm"
    elif given:
        option = f"--{given[0].replace('_', '-')}"
        raise ConfigurationError(f"{option} is for --engine vllm, not for {arguments.engine}.")

    from modal_backend.engines.vllm.config import VLLMOptions
    from modal_backend.serve import Model, serve

    options = VLLMOptions(**{name: asked[name] for name in given if name in _VLLM_OPTIONS})
    model = Model(**{name: asked[name] for name in given if name in _VLLM_MODEL}, options=options)
    key = os.environ.get("KALM_API_KEY")
    serve(
        model if arguments.engine == "vllm" else None,
        arguments.host,
        arguments.port,
        SecretStr(key) if key else None,
        insecure=arguments.insecure_no_auth,
    )
    return True


def _add_deploy(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "deploy",
        help="deploy the service to Modal",
        description="Deploy the service to Modal. Each option can be set as a variable too: "
        "KALM_DEPLOY_ and its name in capitals.",
    )
    parser.add_argument(
        "--accept-new-identity",
        action="store_true",
        help="replace a deployment of another vector space: its indexes must be embedded again",
    )
    parser.set_defaults(run=_deploy, extra="modal")
    parse = parser.parse_known_args

    def add_settings_and_parse(*arguments: Any) -> Any:
        # Not before this command is the one: no other shall need what settings import.
        from modal_backend.settings import DeploySettings

        for name, field in DeploySettings.model_fields.items():
            parser.add_argument(
                f"--{name.replace('_', '-')}",
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=f"{field.description} Default: {_shown(field.default)}.".replace("%", "%%"),
            )
        return parse(*arguments)

    setattr(parser, "parse_known_args", add_settings_and_parse)  # noqa: B010


def _shown(default: object) -> str:
    if default is None:
        return "none"
    return ",".join(default) if isinstance(default, tuple) else str(default)


def _deploy(arguments: argparse.Namespace) -> bool:
    from modal_backend.deploy import deploy
    from modal_backend.settings import DeploySettings

    known = DeploySettings.model_fields
    given = {name: value for name, value in vars(arguments).items() if name in known}
    deploy(DeploySettings(**given), accept_new_identity=arguments.accept_new_identity)
    return True


def _add_doctor(verbs: Verbs) -> None:
    parser = verbs.add_parser(
        "doctor",
        help="check packages, settings, credentials and the service, and say what to mend",
        description="Check what an application with these KALM_* variables would meet, and say "
        "what to mend. Starts no container, unless told to. Exit status: 0 nothing failed, "
        "1 something did, 2 wrong usage.",
    )
    parser.add_argument(
        "--wake",
        action="store_true",
        help="have the service embed, even where that starts a container, which costs money",
    )
    parser.add_argument(
        "--golden",
        action="store_true",
        help="--wake, and compare KaLM's vectors of a few texts with what they must be",
    )
    parser.add_argument("--json", action="store_true", help="one JSON document instead of text")
    parser.set_defaults(run=_doctor, extra="modal")


def _doctor(arguments: argparse.Namespace) -> bool:
    from kalm_integrations.doctor import run

    return run(wake=arguments.wake, golden=arguments.golden, as_json=arguments.json)


VERBS: Final[tuple[Callable[[Verbs], None], ...]] = (
    _add_quickstart,
    _add_serve,
    _add_deploy,
    _add_doctor,
    cost.add,
    evaluation.add,
)
"""Each adds a command with its defaults: what to `run`, which says whether all went well, and
the `extra` that it needs."""


if __name__ == "__main__":
    sys.exit(main())
