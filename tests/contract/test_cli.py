"""The command line as a whole: what all commands share, and that docs/cli.md describes it.

What single commands do is tested in test_quickstart.py, test_serve.py, test_doctor.py, test_cost.py
and test_evaluate.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App
from jsonschema import Draft202012Validator

from kalm_integrations import cli
from kalm_integrations.bulk.command import LIMIT_REACHED
from kalm_integrations.cli import build_app, cost, failures
from kalm_integrations.cli.documents import schema
from kalm_integrations.errors import NotDeployedError, ServiceUnavailableError
from kalm_integrations.install_hints import install_command

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/cli.md").read_text()
KALM = [sys.executable, "-W", "error", "-X", "dev", "-m", "kalm_integrations.cli"]

LISTENING = """
import signal, sys
from kalm_integrations.cli import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # who started us may ignore it
sys.exit(main())
"""

Capture = pytest.CaptureFixture[str]


def commands(app: App, name: str = "") -> Iterator[tuple[str, App]]:
    """Every command that does something: "cost", "eval compare"."""
    if app.default_command is not None:
        yield name, app
        return
    for word in app:
        if not word.startswith("-"):
            yield from commands(app[word], f"{name} {word}".strip())


COMMANDS: dict[str, App] = dict(commands(build_app()))
OPTIONS: dict[str, dict[str, Any]] = {
    name: {
        argument.name: argument
        for argument in app.assemble_argument_collection()
        if argument.name.startswith("--") and argument.show
    }
    for name, app in COMMANDS.items()
}
WITH_JSON = [name for name, options in OPTIONS.items() if "--json" in options]
USED_BY: dict[str, list[str]] = defaultdict(list)
for name, options in OPTIONS.items():
    for option in options:
        USED_BY[option].append(name)
SHARED = {option: names for option, names in USED_BY.items() if len(names) > 1}


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(text: str) -> dict[str, list[str]]:
    """A table's cells by the first of each row, less its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return {name.strip("`"): rest for name, *rest in cells}


def help_of(capsys: Capture, *command: str) -> str:
    assert cli.main([*command, "--help"]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    return printed


class TestHelp:
    def test_kalm_lists_every_command(self, capsys: Capture) -> None:
        printed = help_of(capsys)
        for word in {name.split()[0] for name in COMMANDS}:
            assert re.search(rf"\b{word} +[A-Z]", printed), word

    @pytest.mark.parametrize("name", ["", *COMMANDS])
    def test_it_fits_the_terminal(
        self, capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.setenv("COLUMNS", "60")
        assert max(map(len, help_of(capsys, *name.split()).splitlines())) <= 60

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_option_is_explained(self, name: str) -> None:
        for option, argument in OPTIONS[name].items():
            assert len(argument.parameter.help or "") > 4, option

    def test_an_option_takes_the_same_values_in_every_command(self) -> None:
        assert len(SHARED) > 8
        for option, names in SHARED.items():
            arguments = [OPTIONS[name][option] for name in names]
            choices = {frozenset(each.get_choices() or ()) for each in arguments} - {frozenset()}
            assert len(choices) <= 1, option
            assert len({each.token_count()[0] for each in arguments}) == 1, option

    def test_no_option_takes_a_secret(self) -> None:
        """Everybody who lists processes would see it."""
        suspicious = {option for option in USED_BY if re.search("key|token|secret|passw", option)}
        counts, names = (
            {"--tokens"},
            {"--api-key-secret", "--hf-secret", "--bucket-secret"},
        )
        assert suspicious == counts | names
        for option in names:
            command = "embed" if option == "--bucket-secret" else "deploy"
            assert "Modal Secret" in OPTIONS[command][option].parameter.help

    @pytest.mark.slow
    def test_it_imports_nothing_heavy(self) -> None:
        """`kalm --help` takes 0.2 s; pydantic or numpy alone would take half as much again."""
        heavy = ["pydantic", "numpy", "aiohttp", "modal", "modal_backend"]
        code = (
            "import sys; from kalm_integrations.cli import main; main(['--help'])\n"
            f"print(*[name for name in {heavy} if name in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        assert done.stderr.split() == []

    @pytest.mark.slow
    def test_the_library_does_not_import_the_command(self) -> None:
        code = (
            "import sys; from kalm_integrations import KalmClient; KalmClient(backend='local')\n"
            "print(*[name for name in ('cyclopts', 'rich') if name in sys.modules])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        )
        assert done.stdout.split() == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(capsys: Capture, shell: str) -> None:
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for word in (*COMMANDS["doctor"].name, "compare", "queries-per-day"):
        assert word in script


class TestThePage:
    """docs/cli.md lists commands and exit statuses."""

    def test_every_command_is_there_and_no_other(self) -> None:
        table = rows(PAGE.split("\n## ")[0])
        assert set(table) == {f"kalm {name}" for name in COMMANDS}

    def test_the_exit_statuses(self) -> None:
        documented = set(map(int, rows(section("Exit status"))))
        serves = 128 + signal.SIGTERM  # test_serve.py
        known = {
            LIMIT_REACHED,
            cli.FAILED,
            failures.WRONG_USAGE,
            cli.INTERRUPTED,
            cli.OUTPUT_CLOSED,
        }
        assert documented == {0, *known, serves}

    def test_the_errors_it_shows(self, capsys: Capture) -> None:
        (line,) = re.findall(r"```text\n(kalm serve: .*\n)```", PAGE)
        assert cli.main(["serve", "--port", "70000"]) == 2
        assert capsys.readouterr().err == line
        assert cli.main(["cost", "--tokens", "many", "--json"]) == 2
        error = json.loads(capsys.readouterr().out)["error"]
        assert all(f"`{name}`" in section("JSON") for name in error)


WRONG = [
    ([], "deploy, quantize, doctor"),
    (["--json"], "deploy, quantize, doctor"),
    (["serv"], '"serve"'),
    (["eval"], "retrieval"),
    (["eval", "retreival"], '"retrieval"'),
    (["eval", "compare"], "A"),
    (["doctor", "--awake"], "--wake"),
    (["cost", "--token", "5"], "--tokens"),
    (["cost", "--util", "0.5"], "--util"),
    (["cost", "corpus.txt"], "corpus.txt"),
    (["cost", "--tokens"], "--tokens"),
    (["cost", "--tokens", "0"], "1 to 1,000,000,000,000,000"),
    (["cost", "--tokens", "5", "--corpus", __file__], "--corpus does not go with --tokens"),
    (["cost", "--utilization", "7"], "<= 1"),
    (["cost", "--corpus", "nowhere"], "there is no nowhere"),
    (["cost", "--corpus", "~nobody-has-this-name/x"], "~nobody-has-this-name"),
    (["cost", "--corpus", "x" * 5000], "--corpus"),
    (["quickstart", "--corpus", "nowhere"], "there is no nowhere"),
    (["serve", "--port", "http"], "--port"),
    (["serve", "--port", "70000"], "65535"),
    (["serve", "--max-model-len", "9"], "256"),
    (["serve", "--cors-origin", "HTTPS://x"], "https://app.example.com"),
    (["deploy", "--timeout", "1"], "--timeout"),
    (["deploy", "--gpu-memory-utilization", "2"], "--gpu-memory-utilization"),
    (["deploy", "--snapshot", "sleep"], "asleep"),
    (["deploy", "--gpu", "H99"], "H100"),
    (["deploy", "--startup-timeout", "4000"], "3600"),
    (["completion", "tcsh"], '"bash"'),
    (["embed"], "INPUT"),
    (["embed", "x.txt"], "--output"),
    (["embed", "x.txt", "--detach"], "--on modal"),
    (["embed", "--status", "job", "--gpu", "L4"], "--gpu"),
    (["embed", "modal://v/x", "--output", "x"], "--on modal"),
]
NAMES = [" ".join(["kalm", *arguments])[:40] for arguments, _ in WRONG]


class TestErrors:
    @pytest.mark.parametrize(("arguments", "names"), WRONG, ids=NAMES)
    def test_wrong_usage_is_one_line_that_names_the_argument(
        self, capsys: Capture, arguments: list[str], names: str
    ) -> None:
        assert cli.main([*arguments, "--json"]) == 2
        printed, errors = capsys.readouterr()
        error = json.loads(printed)["error"]
        assert (error["code"], error["exit_status"]) == ("invalid_request", 2)
        assert names in error["message"]
        assert errors.endswith(f": {error['message']} {error['remedy']}".rstrip() + "\n")
        assert len(errors.splitlines()) == 1

    def test_the_help_is_named_only_where_an_option_is_wrong(self, capsys: Capture) -> None:
        assert cli.main(["serve", "--port", "http"]) == 2
        assert "`kalm serve --help`" in capsys.readouterr().err
        assert cli.main(["serve"]) == 2  # without KALM_API_KEY
        assert "--help" not in capsys.readouterr().err

    def test_a_key_in_an_argument_is_not_repeated(self, capsys: Capture) -> None:
        for given in (["--api-key", "hunter2"], ["--api-key=hunter2"]):
            for name in ("serve", "doctor", "deploy"):
                assert cli.main([name, *given]) == 2
                errors = capsys.readouterr().err
                assert "hunter2" not in errors
                assert "KALM_API_KEY" in errors

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (ServiceUnavailableError("out of memory"), "service_unavailable"),
            (NotDeployedError("there is no such app"), "not_deployed"),
            (failures.MissingPackageError("No module named 'x'", "modal"), "missing_package"),
            (PermissionError(13, "Permission denied", "secret.txt"), "os_error"),
            (ZeroDivisionError("division by zero"), "internal_error"),
        ],
    )
    def test_a_failure_has_a_code_a_remedy_and_status_1(
        self, capsys: Capture, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
    ) -> None:
        def fails(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(cost, "report", fails)
        assert cli.main(["cost", "--json"]) == 1
        printed, errors = capsys.readouterr()
        document = json.loads(printed)["error"]
        assert (document["code"], document["exit_status"]) == (code, 1)
        assert f"kalm cost: {document['message']}" in errors
        if code == "missing_package":
            assert install_command("modal") in document["remedy"]
        if code == "not_deployed":  # variables: the command takes no arguments of Python
            assert "KALM_APP_NAME" in document["remedy"]
            assert "app_name=" not in document["remedy"]
        if code == "os_error":
            assert document["message"] == "secret.txt: Permission denied."

    def test_debug_shows_the_traceback(
        self, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for arguments in (["--debug", "cost", "--gpu", "H99"], ["cost", "--gpu", "H99", "--debug"]):
            assert cli.main(arguments) == 2
            assert "Traceback" in capsys.readouterr().err
        assert cli.main(["cost", "--gpu", "H99"]) == 2
        assert "Traceback" not in capsys.readouterr().err

    def test_a_bug_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cost, "report", lambda *_, **__: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(["cost"])


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        (["cost", "--tokens", "5", "--tokens", "7k"], "tokens", 7000),
        (["cost", "--gpu", "L4", "--gpu", "H100,B200"], "gpu", ("H100", "B200")),
        (["serve", "--port", "1", "--port", "2"], "port", 2),
        (
            ["serve", "--cors-origin", "http://a", "--cors-origin", "*"],
            "cors_origin",
            ("http://a", "*"),
        ),
    ],
)
def test_the_last_value_of_an_option_counts(arguments: list[str], name: str, value: object) -> None:
    """Aliases and scripts append options."""
    _, bound, _ = build_app().parse_args(arguments, exit_on_error=False, print_error=False)
    assert bound.arguments[name] == value


def test_version(capsys: Capture) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"kalm-integrations \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


SCHEMA = json.loads((ROOT / "kalm_integrations/cli/schema.json").read_text())


def check(document: object, name: str) -> None:
    """Asserts that the published schema allows `document`."""
    Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}).validate(document)


def test_the_published_schema_is_that_of_the_models() -> None:
    """`python -m kalm_integrations.cli.documents > kalm_integrations/cli/schema.json` renews it."""
    assert json.loads(schema()) == SCHEMA


def test_json_is_all_of_stdout_and_follows_the_schema(capsys: Capture, tmp_path: Path) -> None:
    """test_evaluate.py shows the same of `kalm eval`, which needs services."""
    assert set(WITH_JSON) == {"doctor", "embed", "cost", "eval retrieval", "eval compare"}
    (tmp_path / "in.txt").write_text("K2 is 8,611 metres high.")
    embed = ["embed", str(tmp_path / "in.txt"), "--backend", "local", "--json"]
    runs: list[tuple[list[str], int, str]] = [
        ([*embed, "--dry-run"], 0, "EmbedForecast"),
        ([*embed, "--dry-run", "--gpu", "L40S"], 0, "EmbedForecast"),
        ([*embed, "--dry-run", "--gpu", "L40S", "--on", "modal"], 2, "ErrorDocument"),
        ([*embed, "--output", str(tmp_path / "out")], 0, "EmbedOutcome"),
        (["doctor", "--json"], 1, "DoctorReport"),  # no service is configured here
        (["cost", "--tokens", "x", "--json"], 2, "ErrorDocument"),
        (["cost", "--tokens", "1M", "--queries-per-day", "200", "--json"], 0, "CostReport"),
    ]
    for arguments, status, name in runs:
        assert cli.main(arguments) == status
        document = json.loads(capsys.readouterr().out)
        check(document, name)
        assert set(document) & set(SCHEMA["$defs"][name]["required"])


@pytest.mark.slow
class TestAsAProgram:
    """What a shell does to it. Python's warnings are errors, and its complaints at the end show."""

    def run(self, shell: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", shell.replace("kalm", shlex.join(KALM))],
            check=False,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            env=os.environ | variables,
        )

    @pytest.mark.parametrize("command", ["cost --json", "doctor", "nothing --json"])
    def test_a_reader_that_has_gone(self, command: str) -> None:
        gone = "exec 3> >(:); wait $!; "  # nobody reads there any more
        done = self.run(f"{gone} kalm {command} >&3")
        assert (done.returncode, done.stdout) == (141, "")
        assert len(done.stderr.splitlines()) == (command == "nothing --json")

    def test_head(self) -> None:
        done = self.run("kalm cost | head -1")
        assert len(done.stdout.splitlines()) == 1
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
    def test_a_full_disk(self) -> None:
        done = self.run("kalm cost > /dev/full")
        assert (done.returncode, done.stderr) == (1, "kalm cost: No space left on device.\n")

    def test_closed_streams(self) -> None:
        assert self.run("kalm cost >&-").returncode == 0
        assert self.run("kalm cost --tokens x 2>&-").returncode == 2
        assert self.run("kalm cost <&- >&- 2>&-").returncode == 0

    def test_ctrl_c_ends_with_130_and_no_traceback(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            with subprocess.Popen(
                [sys.executable, "-c", LISTENING, "doctor", "--json"],
                env=os.environ | {"KALM_BASE_URL": url},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            ) as process:
                with silent.accept()[0]:  # it waits for an answer
                    process.send_signal(signal.SIGINT)
                    printed, errors = process.communicate(timeout=30)
            assert errors == ""
            assert json.loads(printed)["error"]["code"] == "interrupted"
            assert process.returncode == 130

    def test_no_terminal_no_colours_and_any_width(self) -> None:
        done = self.run("kalm cost", COLUMNS="60", NO_COLOR="1", TERM="dumb")
        assert done.returncode == 0
        assert "\x1b" not in done.stdout
        assert max(map(len, done.stdout.splitlines())) <= 60
