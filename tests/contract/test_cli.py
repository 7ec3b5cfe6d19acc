"""The command line as a whole: what is the same in all commands, and that docs/cli.md tells it.

What single commands do is tested in test_quickstart.py, test_serve.py, test_doctor.py, test_cost.py
and test_evaluate.py.
"""

from __future__ import annotations

import argparse
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

from kalm_integrations import cli, cost_options
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


def parsers(parser: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that does something, with its parser: "cost", "eval compare"."""
    (within,) = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)] or [None]
    if within is None:
        if parser.prepare:
            parser.prepare()
            parser.prepare = None
        yield name, parser
        return
    for word, inner in within.choices.items():
        yield from parsers(inner, f"{name} {word}".strip())


COMMANDS: dict[str, Any] = dict(parsers(cli._parser()))
OPTIONS = {
    name: {a.option_strings[0]: a for a in parser._actions if a.option_strings}
    for name, parser in COMMANDS.items()
}
for options in OPTIONS.values():
    del options["-h"]
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


def helped(capsys: Capture, *command: str) -> str:
    with pytest.raises(SystemExit) as end:
        cli.main([*command, "--help"])
    assert end.value.code == 0
    shown, errors = capsys.readouterr()
    assert errors == ""
    return shown


class TestHelp:
    def test_that_of_kalm_fits_a_screen(
        self, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "80")
        lines = helped(capsys).splitlines()
        assert len(lines) <= 24
        assert max(map(len, lines)) <= 80
        for word in {name.split()[0] for name in COMMANDS}:
            assert [line for line in lines if re.match(rf"  {word} +[a-z]", line)], word
        assert "Exit status: 0 fine, 1 failed" in " ".join(map(str.strip, lines))

    @pytest.mark.parametrize("columns", [60, 80])
    @pytest.mark.parametrize("name", COMMANDS)
    def test_that_of_each_command_fits_the_width(
        self, capsys: Capture, monkeypatch: pytest.MonkeyPatch, name: str, columns: int
    ) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        shown = helped(capsys, *name.split())
        assert shown.startswith(f"usage: kalm {name} [-h]")
        assert max(map(len, shown.splitlines())) <= columns
        assert "None" not in shown  # Python's word, not a user's

    @pytest.mark.parametrize("name", COMMANDS)
    def test_every_option_is_explained(self, name: str) -> None:
        for option, action in OPTIONS[name].items():
            assert len(action.help or "") > 4, option

    def test_the_same_option_takes_the_same_everywhere(self) -> None:
        assert len(SHARED) > 8
        for option, names in SHARED.items():
            actions = [OPTIONS[name][option] for name in names]
            assert len({frozenset(action.choices or ()) for action in actions}) == 1, option
            assert len({action.nargs for action in actions}) == 1, option

    def test_no_option_takes_a_secret(self) -> None:
        """It would be seen by everybody who lists processes."""
        suspicious = {option for option in USED_BY if re.search("key|token|secret|passw", option)}
        counts, names = (
            {"--tokens"},
            {"--api-key-secret", "--hf-secret", "--bucket-secret"},
        )
        assert suspicious == counts | names
        for option in names:
            command = "embed" if option == "--bucket-secret" else "deploy"
            assert "he Modal Secret that holds" in OPTIONS[command][option].help


class TestThePage:
    """docs/cli.md says what the parsers say."""

    def test_every_command_is_there_and_no_other(self) -> None:
        table = rows(PAGE.split("\n## ")[0])
        assert list(table) == [f"kalm {name}" for name in COMMANDS]
        assert re.findall("^## kalm (.+)$", PAGE, re.MULTILINE) == list(COMMANDS)

    def test_the_extras_are_the_commands_own(self) -> None:
        for name, (_, extra, _) in rows(PAGE.split("\n## ")[0]).items():
            needed = COMMANDS[name.removeprefix("kalm ")].get_default("extra").split(",")
            # The doctor looks at Modal if it can, and the prices need nothing.
            assert bool(extra) == (name not in ("kalm doctor", "kalm cost"))
            assert not extra or all(f"`{each}`" in extra for each in needed)

    def test_shared_options_are_in_one_table_with_their_commands(self) -> None:
        table = rows(section("What is the same in all"))
        assert {
            option: sorted(re.findall("`(.+?)`", names)) for option, (names, _) in table.items()
        } == {option: sorted(names) for option, names in SHARED.items()}

    @pytest.mark.parametrize("name", COMMANDS)
    def test_all_others_are_in_their_commands_section(self, name: str) -> None:
        said = set(re.findall(r"`(--[a-z-]+)", section(f"kalm {name}")))
        own = {option for option in OPTIONS[name] if option not in SHARED}
        if name == "deploy":
            settings = rows((ROOT / "docs/deploy.md").read_text().split("## Settings")[1])
            assert settings.keys() >= own
            own = {"--accept-new-identity"}
        negations = {strings[-1] for a in OPTIONS[name].values() if (strings := a.option_strings)}
        assert own <= said
        assert said <= OPTIONS[name].keys() | negations

    def test_the_exit_statuses(self) -> None:
        documented = set(map(int, rows(section("Exit status"))))
        serves = 128 + signal.SIGTERM  # test_serve.py
        known = {cli.FAILED, cli.WRONG_USAGE, cli.INTERRUPTED, cli.NOBODY_READS}
        assert documented == {0, *known, serves}

    def test_the_errors_it_shows(self, capsys: Capture) -> None:
        (line,) = re.findall(r"```text\n(kalm serve: .*\n)```", PAGE)
        assert cli.main(["serve", "--port", "70000"]) == 2
        assert capsys.readouterr().err == line
        (document,) = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
        assert cli.main(["cost", "--tokens", "many", "--json"]) == 2
        assert capsys.readouterr().out == document

    def test_the_fields_that_its_examples_take(
        self, capsys: Capture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        examples = re.findall(r"^kalm (.*--json) \| jq -?\w* '(.*)'$", PAGE, re.MULTILINE)
        assert [command.partition(" --")[0] for command, _ in examples] == WITH_JSON
        for command, query in examples:
            fields = set(re.findall(r"\.([a-z_]+)", query))
            if command.startswith("eval"):  # the page of its fields is checked by test_evaluate.py
                known = set(re.findall(r"`(\w+)`", (ROOT / "docs/evaluate.md").read_text()))
            else:
                cli.main(shlex.split(command))
                known = set(re.findall(r'"(\w+)": ', capsys.readouterr().out))
            assert fields
            assert fields <= known


WRONG = [
    ([], "kalm: name one of quickstart, serve, deploy, doctor, embed, cost, eval."),
    (["--json"], "kalm: name one of quickstart, serve, deploy, doctor, embed, cost, eval."),
    (["serv"], "Did you mean serve?"),
    (["eval"], "kalm eval: name one of retrieval, compare."),
    (["eval", "retreival"], "Did you mean retrieval?"),
    (
        ["eval", "compare"],
        "kalm eval compare: the following arguments are required: A, B, --corpus",
    ),
    (["doctor", "--awake"], "kalm doctor: --awake: there is no such option. Did you mean --wake?"),
    (["cost", "--token", "5"], "kalm cost: --token: there is no such option. Did you mean --token"),
    (["cost", "--util", "0.5"], "kalm cost: --util: there is no such option."),
    (["cost", "corpus.txt"], "kalm cost: 'corpus.txt': it takes no such argument."),
    (["cost", "--tokens"], "kalm cost: --tokens: expected one argument."),
    (["cost", "--tokens", "0"], "kalm cost: --tokens: '0' is not a whole number from 1 to 1,000,"),
    (["cost", "--utilization", "7"], "'7' is not a share: above 0, and up to 1."),
    (["cost", "--corpus", "nowhere"], "kalm cost: --corpus: there is no nowhere."),
    (["cost", "--corpus", "~nobody-has-this-name/x"], "kalm cost: --corpus: ~nobody-has-this-name"),
    (["cost", "--corpus", "x" * 5000], "…: File name too long."),
    (["quickstart", "--corpus", "nowhere"], "kalm quickstart: --corpus: there is no nowhere."),
    (["quickstart", "--question", ""], "kalm quickstart: the question is empty."),
    (["serve", "--port", "http"], "kalm serve: --port: 'http' is not a whole number from 0 to 65"),
    (["serve", "--max-model-len", "9"], "--max-model-len: '9' is not a whole number of at least"),
    (["deploy", "--timeout", "1"], "--timeout: '1' is not a whole number from 10 to 86400."),
    (["deploy", "--gpu-memory-utilization", "2"], "'2' is not a share: above 0, and up to 1."),
    (["deploy", "--snapshot", "sleep"], "--snapshot: invalid choice: 'sleep' (choose from "),
    (["deploy", "--gpu", "H99"], "there is no such GPU"),
    (["deploy", "--startup-timeout", "4000"], "from 60 to 3600; with vLLM at least 1080."),
]
NAMES = [" ".join(["kalm", *arguments])[:40] for arguments, _ in WRONG]


class TestErrors:
    @pytest.mark.parametrize(("arguments", "said"), WRONG, ids=NAMES)
    def test_wrong_usage_is_one_line_and_where_to_read_on(
        self, capsys: Capture, arguments: list[str], said: str
    ) -> None:
        assert cli.main(arguments) == 2
        shown, errors = capsys.readouterr()
        assert shown == "" or "--json" in arguments
        assert said in errors
        assert re.fullmatch(r"kalm.*[.?)] `kalm[a-z ]* --help` lists what it takes\.\n", errors)

    @pytest.mark.parametrize(("arguments", "said"), WRONG, ids=NAMES)
    def test_with_json_it_is_one_document_too(
        self, capsys: Capture, arguments: list[str], said: str
    ) -> None:
        assert cli.main([*arguments, "--json"]) == 2
        shown, errors = capsys.readouterr()
        error = json.loads(shown)["error"]
        assert (error["code"], error["exit_status"]) == ("invalid_request", 2)
        assert errors.endswith(f": {error['message']} {error['remedy']}\n")

    def test_a_key_in_an_argument_is_not_repeated(self, capsys: Capture) -> None:
        for given in (["--api-key", "hunter2"], ["--api-key=hunter2"]):
            for name in ("serve", "doctor", "deploy"):
                assert cli.main([name, *given]) == 2
                errors = capsys.readouterr().err
                assert "hunter2" not in errors
                assert "read from variables, such as KALM_API_KEY" in errors

    @pytest.mark.parametrize(
        ("error", "status", "code"),
        [
            (ServiceUnavailableError("out of memory"), 1, "service_unavailable"),
            (NotDeployedError("there is no such app"), 1, "not_deployed"),
            (ImportError("No module named 'rich'"), 1, "missing_package"),
            (PermissionError(13, "Permission denied", "secret.txt"), 1, "os_error"),
        ],
    )
    def test_what_fails_ends_with_1_and_says_what_to_do(
        self,
        capsys: Capture,
        monkeypatch: pytest.MonkeyPatch,
        error: Exception,
        status: int,
        code: str,
    ) -> None:
        def fails(_: object) -> bool:
            raise error

        monkeypatch.setattr(cost_options, "run", fails)
        assert cli.main(["cost", "--json"]) == status
        shown, errors = capsys.readouterr()
        document = json.loads(shown)["error"]
        assert (document["code"], document["exit_status"]) == (code, status)
        assert errors.startswith(f"kalm cost: {document['message']}")
        if code == "missing_package":
            assert install_command("bulk") in document["remedy"]
        if code == "not_deployed":  # variables: arguments of Python are none of this command's
            assert "KALM_APP_NAME" in document["remedy"]
            assert "app_name=" not in document["remedy"]
        if code == "os_error":
            assert document["message"] == "secret.txt: Permission denied."

    def test_a_bug_of_ours_is_not_hidden(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cost_options, "run", lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            cli.main(["cost"])


def test_json_is_all_of_stdout(capsys: Capture, tmp_path: Path) -> None:
    """test_evaluate.py shows the same of `kalm eval`, which needs services."""
    assert WITH_JSON == ["doctor", "embed", "cost", "eval retrieval", "eval compare"]
    (tmp_path / "in.txt").write_text("K2 is 8,611 metres high.")
    embed = ["embed", str(tmp_path / "in.txt"), "--backend", "local", "--json"]
    assert cli.main([*embed, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["texts"] == 1
    assert cli.main([*embed, "--output", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 1
    assert cli.main(["cost", "--json"]) == 0
    assert "choices" in json.loads(capsys.readouterr().out)
    assert cli.main(["doctor", "--json"]) == 1  # no service is configured here
    assert json.loads(capsys.readouterr().out)["ok"] is False


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

    @pytest.mark.parametrize("command", ["cost", "cost --json", "doctor", "nothing --json"])
    def test_a_reader_that_has_gone(self, command: str) -> None:
        gone = "exec 3> >(:); wait $!; "  # nobody reads there any more
        done = self.run(f"{gone} kalm {command} >&3")
        assert (done.returncode, done.stdout) == (141, "")
        assert len(done.stderr.splitlines()) == (command == "nothing --json")

    def test_head(self) -> None:
        done = self.run("kalm cost | head -1")
        assert done.stdout.startswith("GPU ")
        assert (done.returncode, done.stderr) == (0, "")

    def test_the_quickstarts_reader_has_gone(self, tmp_path: Path) -> None:
        (tmp_path / "a.md").write_text("# Bread\n\nMix flour, water and salt.\n")
        gone = "exec 3> >(:); wait $!; "
        done = self.run(f"{gone} kalm quickstart --corpus {tmp_path} >&3")
        assert (done.returncode, done.stderr) == (141, "")

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
    def test_a_full_disk(self) -> None:
        done = self.run("kalm cost > /dev/full")
        assert (done.returncode, done.stderr) == (1, "kalm cost: No space left on device.\n")

    def test_closed_streams(self) -> None:
        assert self.run("kalm cost >&-").returncode == 0
        assert self.run("kalm cost --tokens x 2>&-").returncode == 2
        assert self.run("kalm cost <&- >&- 2>&-").returncode == 0

    def test_ctrl_c_is_quiet(self) -> None:
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
                    assert process.communicate(timeout=30) == ("", "")
            assert process.returncode == 130

    def test_no_terminal_no_colours_and_any_width(self) -> None:
        for columns in ("60", "80"):
            done = self.run("kalm cost", COLUMNS=columns, NO_COLOR="1", TERM="dumb")
            assert done.returncode == 0
            assert "\x1b" not in done.stdout
            assert max(map(len, done.stdout.splitlines())) <= int(columns)
