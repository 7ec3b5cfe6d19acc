"""The command `kalm`: docs/cli.md lists its commands, exit statuses and JSON documents."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from typing import Any, Final

from cyclopts import App, CycloptsError, Parameter

from kalm_integrations.cli import console
from kalm_integrations.cli.failures import Failure, MissingPackageError, missing_command
from kalm_integrations.errors import KalmError
from kalm_integrations.version import __version__

FAILED: Final = 1
INTERRUPTED: Final = 130  # 128 and the number of the signal, as shells count
OUTPUT_CLOSED: Final = 141

_COMMANDS: Final = {
    "quickstart": """Index real text in two frameworks, and ask a few questions.

LangChain and LlamaIndex index it with the embedded engine, in this process.""",
    "serve": """Serve an engine over HTTP, with OpenAI's embeddings API.

Runs until interrupted. Callers present the key that KALM_API_KEY holds, or one of the file
KALM_API_KEYS_FILE.""",
    "deploy": """Deploy the service to Modal.

Each setting is also a variable: KALM_DEPLOY_ and its name in capitals.""",
    "quantize": """Write a model's weights in int8, for --quantization int8.

Halves them, on a CPU. Run the same command again to resume, or to verify what is written.""",
    "doctor": """Check settings, keys and the service, and show how to fix them.

Checks what an application with these KALM_* variables would meet. Starts no container without
--wake.""",
    "embed": """Embed a corpus into Parquet, resuming where it was interrupted.

Run the same command again to resume. The service is the one that the KALM_* variables name.""",
    "cost": """Show what KaLM costs on each GPU.

Covers a million tokens, your corpus and your traffic. Sends nothing, starts nothing. N may end
in k, M or B.""",
    "completion": """Print the completion script of a shell.

For bash: kalm completion bash > ~/.local/share/bash-completion/completions/kalm""",
}
_EVALUATIONS: Final = {
    "retrieval": """Measure nDCG, recall and MRR on texts with relevance judgments.

Starts the services, which costs money on Modal.""",
    "compare": """Tell how far two systems find the same, without relevance judgments.

Starts the services, which costs money on Modal.""",
}
_DESCRIPTION_FORMATS: Final = {"deploy": "markdown"}  # its settings' docstrings have line breaks


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: Of status 143, by SIGTERM to `kalm serve`.
    """
    console.prepare_streams()
    try:
        try:
            return _run(list(sys.argv[1:] if argv is None else argv))
        finally:
            sys.stdout.flush()  # while a closed pipe can still be reported
    except BrokenPipeError:
        console.discard_output()
        return OUTPUT_CLOSED
    except OSError as error:  # a full disk
        console.discard_output()
        sys.stderr.write(f"kalm: cannot write the output: {error.strerror}.\n")
        return FAILED
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # how rich reports it
            return OUTPUT_CLOSED
        raise


def build_app() -> App:
    """All commands; each one's module is imported when it is used."""
    app = App(
        name="kalm",
        help="KaLM embeddings for LangChain, LlamaIndex and numpy.",
        help_epilogue="Services and keys are read from KALM_* variables. --debug shows the "
        "traceback of an error. Exit status: 0 done, 1 failed or found a problem, 2 wrong usage, "
        "130 interrupted.",
        help_format="plaintext",
        version=f"kalm-integrations {__version__}",
        console=console.stdout(),
        default_parameter=Parameter(
            negative_bool=(),
            negative_iterable=(),
            show_default=_shown_default,
            allow_repeating=True,  # the last one counts
        ),
        suppress_keyboard_interrupt=False,
    )
    for place, (name, help_) in enumerate(_COMMANDS.items()):
        app.command(
            f"kalm_integrations.cli.{name}:{name}",
            name=name,
            help=help_,
            sort_key=place,
            help_format=_DESCRIPTION_FORMATS.get(name, "plaintext"),
        )
    evaluations = App(
        name="eval", help="Compare deployments, models, prompts and dimensions on your texts."
    )
    for name, help_ in _EVALUATIONS.items():
        evaluations.command(f"kalm_integrations.cli.evaluate:{name}", name=name, help=help_)
    app.command(evaluations)
    return app


def _shown_default(value: Any) -> Any:
    """The default as the help shows it; None for flags and empty lists."""
    if value is False or value == ():
        return None
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


def _run(arguments: list[str]) -> int:
    as_json, debug = "--json" in arguments, "--debug" in arguments
    if debug:
        arguments.remove("--debug")
    command = "kalm"
    try:
        app = build_app()
        chain, apps, rest = app.parse_commands(arguments)
        command = " ".join(("kalm", *chain))
        if apps[-1].default_command is None and set(rest) <= {"--json"}:
            raise missing_command(apps[-1])
        done = app(
            arguments, exit_on_error=False, print_error=False, verbose=False,
            result_action="return_value",
        )  # fmt: skip
        return int(not done) if isinstance(done, bool) else done or 0
    except BrokenPipeError:
        raise
    except (CycloptsError, KalmError, MissingPackageError, OSError) as error:
        if debug:
            traceback.print_exc()
        failure = Failure.of(error, command)
    except KeyboardInterrupt as error:
        progress = str(error)  # what is finished, where the command knows it
        failure = Failure("interrupted", progress or "interrupted.", "", INTERRUPTED)
        if progress:
            sys.stderr.write(f"{command}: {progress}\n")
    except Exception as error:
        if not as_json:
            raise
        traceback.print_exc()
        failure = Failure.of(error, command)
    if failure.exit_status != INTERRUPTED:
        sys.stderr.write(f"{command}: {failure.message} {failure.remedy}".strip() + "\n")
    if as_json:  # also where the arguments were not understood
        from kalm_integrations.cli.documents import Error, ErrorDocument

        console.print_document(ErrorDocument(error=Error(**failure._asdict())))
    return failure.exit_status
