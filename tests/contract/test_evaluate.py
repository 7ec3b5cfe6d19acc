"""`kalm eval` against real HTTP services: KaLM's name with vectors of a test, and the embedded
engine."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jsonschema import Draft202012Validator
from kalm import KalmEngine
from pydantic import SecretStr
from serving import FaultyServer, serving

from kalm_integrations import cli as cli_package
from kalm_integrations.cli import main
from kalm_integrations.errors import InputTooLongError, InvalidText, ServiceUnavailableError
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.install_hints import install_command
from kalm_integrations.models import EMBEDDED, KALM, KALM_FP8
from modal_backend.http.app import create_app
from modal_backend.http.auth import BearerKeys
from modal_backend.service import EmbeddingService

KEY = "hunter2"
WORDS = ("mountain", "bread", "river", "engine", "letter", "moon", "winter", "glass", "song")
DOCUMENTS = [
    f"{first} {second}, and {WORDS[(i + j) % 9]}."
    for i, first in enumerate(WORDS)
    for j, second in enumerate(WORDS)
]
QUERIES = [f"where is the {word}" for word in WORDS] + ["bread of winter", "song and moon"]
RELEVANT = [9 * (n % 9) + n % 5 for n in range(len(QUERIES))]

Evaluate = Callable[..., Any]


class RoughEngine(KalmEngine):
    """KaLM, whose vectors are moved by `amount` in directions of their own."""

    def __init__(self, amount: float = 0, identity: SpaceIdentity = KALM.space) -> None:
        super().__init__(identity=identity)
        self.amount = amount
        self.before: Callable[[Sequence[str]], None] = lambda texts: None

    async def embed(self, texts: Sequence[str], **options: Any) -> Any:
        self.before(texts)
        return await super().embed(texts, **options)

    def right(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        noise = super().right([re.sub(r"\W", "", text) for text in texts])  # one word each
        moved = super().right(texts) + self.amount * noise
        return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


@contextmanager
def served(*engines: KalmEngine, key: str = KEY) -> Iterator[list[str]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                serving(create_app(EmbeddingService(each), keys=BearerKeys([SecretStr(key)])))
            )
            for each in engines
        ]


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_API_KEY", KEY)
    monkeypatch.setenv("KALM_MAX_RETRIES", "0")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """In BEIR's format; each query has one relevant document."""
    for name, texts in (("corpus", DOCUMENTS), ("queries", QUERIES)):
        rows = [{"_id": f"{name}-{row}", "text": text} for row, text in enumerate(texts)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_judgments(
        tmp_path, *(f"queries-{query}\tcorpus-{row}\t1" for query, row in enumerate(RELEVANT))
    )
    return tmp_path


def write_judgments(folder: Path, *rows: str) -> None:
    (folder / "qrels").mkdir(exist_ok=True)
    header = "query-id\tcorpus-id\tscore"
    (folder / "qrels" / "test.tsv").write_text("\n".join([header, *rows]))


@pytest.fixture
def evaluate(capfd: pytest.CaptureFixture[str]) -> Evaluate:
    """Runs a command. Returns its JSON document, or with another status its last error line."""

    def evaluate(*arguments: object, status: int = 0) -> Any:
        assert main(["eval", *map(str, arguments), "--json"]) == status
        shown, errors = capfd.readouterr()
        assert KEY not in shown + errors
        if status == 0:
            follows_the_schema(
                shown, "RetrievalReport" if arguments[0] == "retrieval" else "ComparisonReport"
            )
        return json.loads(shown) if status == 0 else errors.splitlines()[-1]

    return evaluate


def follows_the_schema(document: str, name: str) -> None:
    schema = json.loads((Path(cli_package.__file__).parent / "schema.json").read_text())
    Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]}).validate(
        json.loads(document)
    )


def ranks(engine: RoughEngine) -> np.ndarray[Any, Any]:
    """The rank of each query's relevant document, from 0."""
    prompted = [KALM.query_template.replace("{text}", query) for query in QUERIES]
    queries, documents = (engine.right(texts).astype(np.float16) for texts in (prompted, DOCUMENTS))
    scores = (queries.astype(float) @ documents.astype(float).T).round(6)
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.array([list(row).index(right) for row, right in zip(order, RELEVANT, strict=True)])


class TestRetrieval:
    def test_measures_are_those_of_the_vectors(self, evaluate: Evaluate, folder: Path) -> None:
        engine = RoughEngine(0.4)
        with served(engine) as (url,):
            document = evaluate("retrieval", folder, "--system", url, "--k", "5,20")
        (system,) = document["systems"]
        assert system["identity"] == KALM.space.to_dict()
        assert system["query_template"] == KALM.query_template
        rank = ranks(engine)
        means = {name: figure["mean"] for name, figure in system["measures"].items()}
        assert means == pytest.approx(
            {
                "nDCG@10": np.where(rank < 10, 1 / np.log2(rank + 2), 0).mean(),
                "MRR@10": np.where(rank < 10, 1 / (rank + 1), 0).mean(),
                "recall@5": (rank < 5).mean(),
                "recall@20": (rank < 20).mean(),
            }
        )
        assert 0 < means["recall@5"] < means["recall@20"] < 1
        for figure in system["measures"].values():
            assert figure["low"] < figure["mean"] < figure["high"]

    def test_a_worse_system_is_significantly_worse_and_an_equal_one_is_not(
        self, evaluate: Evaluate, folder: Path
    ) -> None:
        write_judgments(
            folder,
            *(f"queries-{n}\tcorpus-{row}\t1" for n in range(9) for row in range(9 * n, 9 * n + 9)),
        )
        engines = RoughEngine(), RoughEngine(), RoughEngine(50, KALM_FP8.space)
        with served(*engines) as urls:
            systems = [word for url in urls for word in ("--system", url)]
            _, equal, worse = evaluate("retrieval", folder, *systems)["systems"]
        difference = equal["measures"]["nDCG@10"]["difference"]
        assert (difference["mean"], difference["p"]) == (0, 1)
        difference = worse["measures"]["nDCG@10"]["difference"]
        assert difference["high"] < -0.1
        assert difference["p"] < 0.05

    def test_each_prompt_and_dimension_is_a_system_and_prompts_share_documents(
        self, evaluate: Evaluate, folder: Path
    ) -> None:
        engine = RoughEngine()
        with served(engine) as (url,):
            options = ["--query-instruction", "none", "--query-instruction", "web_search"]
            document = evaluate(
                *("retrieval", folder, "--system", url, "--dimensions", "512,64"), *options
            )
        names = [system["name"].removeprefix(url) for system in document["systems"]]
        assert names == [
            f" dimensions={dimensions} query_instruction={prompt}"
            for dimensions in (512, 64)
            for prompt in ("none", "web_search")
        ]
        embedded = [text for texts, _ in engine.asked for text in texts]
        assert embedded.count(DOCUMENTS[0]) == 2

    def test_a_server_of_the_openai_api_is_a_system(
        self, evaluate: Evaluate, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OTHER_KEY", "other-key")
        with FaultyServer(ours=False) as server:
            system = f"{server.url} model={EMBEDDED.space.model} api_key_variable=OTHER_KEY"
            (found,) = evaluate("retrieval", folder, "--system", system)["systems"]
            keys = {request.headers["authorization"] for request in server.posted}
        assert (found["model"], found["identity"]) == (EMBEDDED.space.model, None)
        assert keys == {"Bearer other-key"}

    def test_the_key_of_one_host_is_not_sent_to_another(
        self, evaluate: Evaluate, folder: Path
    ) -> None:
        systems = ("--system", "http://127.0.0.1:9", "--system", "http://other.invalid:9")
        message = evaluate("retrieval", folder, *systems, status=2)
        assert "http://other.invalid:9" in message
        assert "api_key_variable" in message

    def test_the_embedded_engine_is_a_system_beside_variables_of_a_service(
        self, evaluate: Evaluate, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KALM_BASE_URL", "http://127.0.0.1:9")
        (system,) = evaluate("retrieval", folder, "--system", "local")["systems"]
        assert system["model"] == EMBEDDED.space.model

    def test_graded_judgments_and_titles_count_and_the_query_itself_is_no_result(
        self, evaluate: Evaluate, tmp_path: Path
    ) -> None:
        corpus = [
            {"_id": "a", "title": "moon", "text": "winter"},
            {"_id": "b", "title": "", "text": "moon"},
            {"_id": "c", "title": None, "text": "glass"},
            {"_id": "d", "text": "glass and song"},
        ]
        queries = [{"_id": "b", "text": "moon"}, {"_id": "q", "text": "glass song"}]
        queries.append({"_id": "not judged", "text": "bread"})
        for name, rows in (("corpus", corpus), ("queries", queries)):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        write_judgments(tmp_path, "b\ta\t2", "q\tc\t1", "q\td\t2", "unknown\ta\t1", "q\tx\t0")
        with served(RoughEngine()) as (url,):
            system = f"{url} query_instruction=none"
            document = evaluate("retrieval", tmp_path, "--system", system)
        assert (document["documents"], document["queries"]) == (4, 2)
        measures = document["systems"][0]["measures"]
        assert measures["nDCG@10"]["mean"] == pytest.approx(1)
        assert measures["recall@10"]["mean"] == 1

    def test_a_plot_is_drawn(self, evaluate: Evaluate, folder: Path) -> None:
        evaluate("retrieval", folder, "--system", "local", "--plot", folder / "plot.png")
        assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")

    @pytest.mark.parametrize(
        ("file", "content", "named"),
        [
            ("qrels/test.tsv", "queries-0 corpus-0 1", "test.tsv"),
            ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nqueries-0\tcorpus-0\tyes", "test.tsv"),
            ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nqueries-0\tother\t1", "test.tsv"),
            ("corpus.jsonl", '{"text": "a"}', "corpus.jsonl line 1"),
            ("corpus.jsonl", '{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}', "line 2"),
            ("corpus.jsonl", '{"_id": "1", "text": " "}', "corpus.jsonl line 1"),
            ("queries.jsonl", '{"_id": "1"}', "queries.jsonl line 1"),
            ("queries.jsonl", "{", "queries.jsonl line 1"),
        ],
    )
    def test_a_malformed_file_is_named_before_a_service_is_started(
        self, evaluate: Evaluate, folder: Path, file: str, content: str, named: str
    ) -> None:
        (folder / file).write_text(content)
        assert named in evaluate("retrieval", folder, "--system", "http://127.0.0.1:9", status=2)

    def test_a_missing_split_is_named(self, evaluate: Evaluate, folder: Path) -> None:
        assert "dev.tsv" in evaluate("retrieval", folder, "--split", "dev", status=1)

    def test_a_missing_package_is_named_with_its_extra(
        self, evaluate: Evaluate, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "ir_measures", None)
        error = evaluate("retrieval", folder, "--system", "local", status=1)
        assert install_command("eval") in error


class TestCompare:
    @pytest.fixture
    def texts(self, folder: Path) -> tuple[object, ...]:
        return ("--corpus", folder / "corpus.jsonl", "--queries", folder / "queries.jsonl")

    def test_a_deployment_agrees_with_itself(
        self, evaluate: Evaluate, texts: tuple[object, ...]
    ) -> None:
        with served(RoughEngine()) as (url,):
            document = evaluate("compare", url, f"{url}/v1", *texts)
        assert (document["documents"], document["queries"]) == (81, 11)
        assert [*document["figures"]] == [
            *("overlap@1", "overlap@10", "rank correlation@81"),  # there are no 100 documents
            *("cosine of queries", "cosine of documents"),
        ]
        for figure in document["figures"].values():
            assert figure["lowest"] == pytest.approx(1)

    def test_another_quantization_agrees_in_part(
        self, evaluate: Evaluate, texts: tuple[object, ...]
    ) -> None:
        engines = RoughEngine(), RoughEngine(0.4, KALM_FP8.space)
        with served(*engines) as urls:
            document = evaluate("compare", *urls, *texts, "--k", "3")
        assert document["candidate"]["identity"] == KALM_FP8.space.to_dict()
        figures = document["figures"]
        cosines = np.einsum("td,td->t", *(engine.right(DOCUMENTS) for engine in engines))
        found = figures["cosine of documents"]
        assert found["mean"] == pytest.approx(cosines.mean(), abs=1e-4)
        assert found["p5"] == pytest.approx(np.percentile(cosines, 5), abs=1e-4)
        assert found["lowest_at"] == f"corpus.jsonl line {cosines.argmin() + 1}"
        assert 0.2 < figures["overlap@3"]["mean"] < 0.95
        assert figures["overlap@3"]["lowest_at"].startswith("queries.jsonl line ")
        assert 0.2 < figures["rank correlation@81"]["mean"] < 0.95

    def test_without_queries_documents_are_searched_for_and_do_not_find_themselves(
        self, evaluate: Evaluate, folder: Path
    ) -> None:
        engines = RoughEngine(), RoughEngine(50, KALM_FP8.space)
        with served(*engines) as urls:
            document = evaluate("compare", *urls, "--corpus", folder / "corpus.jsonl")
        assert document["queries"] == 81
        assert "rank correlation@80" in document["figures"]
        assert document["figures"]["overlap@1"]["mean"] < 0.5

    def test_a_sample_is_always_the_same(
        self, evaluate: Evaluate, texts: tuple[object, ...]
    ) -> None:
        engines = RoughEngine(), RoughEngine(0.4)
        with served(*engines) as urls:
            arguments = ("compare", *urls, *texts, "--sample", 9)
            document = evaluate(*arguments)
            assert (document["documents"], document["queries"]) == (9, 9)
            assert evaluate(*arguments) == document

    def test_two_models_are_compared_by_their_rankings_only(
        self, evaluate: Evaluate, texts: tuple[object, ...]
    ) -> None:
        with served(RoughEngine()) as (url,):
            document = evaluate("compare", url, "local", *texts)
        assert document["candidate"]["model"] == EMBEDDED.space.model
        assert "overlap@10" in document["figures"]
        assert not [name for name in document["figures"] if name.startswith("cosine")]

    def test_a_candidate_that_distinguishes_nothing_has_no_rank_correlation(
        self, evaluate: Evaluate, texts: tuple[object, ...], tmp_path: Path
    ) -> None:
        candidate = RoughEngine()
        candidate.spoil = lambda vectors: np.full_like(vectors, 3840**-0.5)
        with served(RoughEngine(), candidate) as urls:
            document = evaluate("compare", *urls, *texts, "--plot", tmp_path / "plot.svg")
        assert document["figures"]["rank correlation@81"] == {}
        assert (tmp_path / "plot.svg").is_file()

    def test_the_table_has_the_figures(
        self, texts: tuple[object, ...], capfd: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["eval", "compare", "local", "local", *map(str, texts)]) == 0
        shown = capfd.readouterr().out
        assert "81 documents, 11 queries" in shown
        (line,) = (line for line in shown.splitlines() if line.startswith("overlap@10"))
        assert line.split()[1:3] == ["1.0000", "1.0000"]

    def test_too_few_documents_are_refused(self, evaluate: Evaluate, tmp_path: Path) -> None:
        (tmp_path / "corpus.txt").write_text("bread\nmoon\nbread\n")
        arguments = ("compare", "local", "local", "--corpus", tmp_path / "corpus.txt")
        assert "too few" in evaluate(*arguments, status=2)


class TestSystems:
    @pytest.mark.parametrize(
        "system",
        [
            "127.0.0.1:9",
            "ftp://host",
            "http://me:secret@host",
            "http://host model",
            "local query_instruction='Find",
            "local timeout=2,5",
            "http://host api_key=abc",
            "http://host api_key_variable=NO_SUCH_VARIABLE",
            "http://host dimension=64",
            "local query_instruction=web_serch",
        ],
    )
    def test_what_cannot_be_a_system_is_refused(
        self, evaluate: Evaluate, folder: Path, system: str
    ) -> None:
        evaluate("retrieval", folder, "--system", system, status=2)

    def test_a_secret_in_an_argument_is_not_repeated(
        self, evaluate: Evaluate, folder: Path
    ) -> None:
        error = evaluate("retrieval", folder, "--system", f"local api_key={KEY}", status=2)
        assert "api_key_variable" in error

    @pytest.mark.parametrize("position", [0, 1])
    def test_the_system_that_fails_is_named(
        self, evaluate: Evaluate, folder: Path, position: int
    ) -> None:
        engines = [RoughEngine(), RoughEngine()]

        def fail(texts: Sequence[str]) -> None:
            raise ServiceUnavailableError("out of memory")

        engines[position].before = fail
        with served(*engines) as urls:
            systems = [word for url in urls for word in ("--system", url)]
            error = evaluate("retrieval", folder, *systems, status=1)
        assert urls[position] in error
        assert not {DOCUMENTS[0]} & {text for texts, _ in engines[0].asked for text in texts}

    @pytest.mark.parametrize("dimensions", ["65", "many"])
    def test_dimensions_that_the_model_lacks_are_refused(
        self, evaluate: Evaluate, folder: Path, dimensions: str
    ) -> None:
        with served(RoughEngine()) as (url,):
            system = f"{url} dimensions={dimensions}"
            assert "dimensions" in evaluate("retrieval", folder, "--system", system, status=2)

    def test_a_wrong_key_is_reported_for_its_system(self, evaluate: Evaluate, folder: Path) -> None:
        with served(RoughEngine(), key="another") as (url,):
            assert url in evaluate("retrieval", folder, "--system", url, status=1)

    def test_a_service_that_changes_its_vectors_ends_the_run(
        self, evaluate: Evaluate, folder: Path
    ) -> None:
        engine = RoughEngine()

        def redeploy(texts: Sequence[str]) -> None:
            if DOCUMENTS[0] in texts:
                engine.identity = KALM_FP8.space

        engine.before = redeploy
        with served(engine) as (url,):
            evaluate("retrieval", folder, "--system", url, status=1)

    def test_another_model_than_the_named_one_is_refused(
        self, evaluate: Evaluate, folder: Path
    ) -> None:
        with served(RoughEngine(identity=replace(KALM.space, model="someone/else"))) as (url,):
            found = evaluate("retrieval", folder, "--system", url)
            assert found["systems"][0]["model"] == "someone/else"
            evaluate("retrieval", folder, "--system", f"{url} model=third/model", status=1)

    def test_a_text_that_the_model_refuses_is_named(self, evaluate: Evaluate, folder: Path) -> None:
        def refuse(texts: Sequence[str]) -> None:
            if DOCUMENTS[44] in texts:
                index = list(texts).index(DOCUMENTS[44])
                raise InputTooLongError.of([InvalidText(index, "is too long: 9 tokens")])

        engine = RoughEngine()
        engine.before = refuse
        with served(engine) as (url,):
            error = evaluate("retrieval", folder, "--system", url, status=2)
        assert "corpus-44 is too long" in error
        assert "truncate=end" in error
