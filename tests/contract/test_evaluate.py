"""`kalm eval quantization` against two real HTTP services: KaLM's name, and vectors of a test."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kalm import BF16, KalmEngine
from pydantic import SecretStr
from serving import FaultyServer, packed, serving

from kalm_integrations import prompts
from kalm_integrations.cli import main
from kalm_integrations.errors import (
    InputTooLongError,
    InvalidText,
    ServiceUnavailableError,
)
from kalm_integrations.evaluation import agreement
from kalm_integrations.evaluation.agreement import Spread, Vectored
from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.install_hints import install_command
from kalm_integrations.models import EMBEDDED, KALM, KALM_FP8
from kalm_integrations.protocol import EmbedResponse
from modal_backend.http.app import create_app
from modal_backend.http.middleware import BearerKeys
from modal_backend.service import EmbeddingService

KEY = "hunter2"
WORDS = ("mountain", "bread", "river", "engine", "letter", "moon", "winter", "glass", "song")
DOCUMENTS = [
    f"{first} {second}, and {WORDS[(i + j) % 9]}."
    for i, first in enumerate(WORDS)
    for j, second in enumerate(WORDS)
]
QUERIES = [f"where is the {word}" for word in WORDS] + ["bread of winter", "song and moon"]


class Rough(KalmEngine):
    """KaLM, each of whose vectors is moved a bit, in a direction of its text's own."""

    def __init__(self, amount: float, identity: SpaceIdentity) -> None:
        super().__init__(identity=identity)
        self.amount = amount
        self.fails: Callable[[Sequence[str]], None] = lambda texts: None

    async def embed(self, texts: Sequence[str], **how: Any) -> Any:
        self.fails(texts)
        return await super().embed(texts, **how)

    def right(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
        clean = super().right(texts)
        if not self.amount:
            return clean
        moved = clean + self.amount * super().right([f"{len(text)} {text[::-1]}" for text in texts])
        return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)

    def travelled(self, texts: Sequence[str], template: str) -> np.ndarray[Any, Any]:
        """What a client has of them."""
        prompted = [prompts.apply(template, text) for text in texts]
        return self.right(prompted).astype(np.float16)


@dataclass
class Run:
    """How one command ended."""

    status: int
    shown: str
    errors: str

    @property
    def words(self) -> str:
        return " ".join(self.shown.split())

    @property
    def complaint(self) -> str:
        """The last line on stderr."""
        return self.errors.splitlines()[-1]


@contextmanager
def served(engine: KalmEngine, key: str = KEY) -> Iterator[str]:
    keys = BearerKeys([SecretStr(key)])
    with serving(create_app(EmbeddingService(engine), keys=keys)) as url:
        yield url


@dataclass
class Sides:
    baseline: Rough
    candidate: Rough
    urls: tuple[str, str]


@pytest.fixture
def sides() -> Iterator[Sides]:
    baseline, candidate = Rough(0, KALM.space), Rough(0.4, KALM_FP8.space)
    with served(baseline) as one, served(candidate) as other:
        yield Sides(baseline, candidate, (one, other))


@pytest.fixture(autouse=True)
def variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KALM_API_KEY", KEY)
    monkeypatch.setenv("KALM_MAX_RETRIES", "0")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    return path


@pytest.fixture
def queries(tmp_path: Path) -> Path:
    path = tmp_path / "queries.txt"
    path.write_text("\n".join(QUERIES))
    return path


@pytest.fixture
def evaluate(capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    def evaluate(urls: tuple[str, str], corpus: Path, *arguments: object) -> Run:
        where = ["--baseline", urls[0], "--candidate", urls[1], "--corpus", str(corpus)]
        status = main(["eval", "quantization", *where, *map(str, arguments)])
        run = Run(status, *capfd.readouterr())
        assert KEY not in run.shown + run.errors
        return run

    return evaluate


Evaluate = Callable[..., Run]


def expected(sides: Sides, ks: Sequence[int]) -> tuple[np.ndarray, np.ndarray, agreement.Rankings]:
    baseline, candidate = (
        Vectored(
            engine.travelled(DOCUMENTS, prompts.AS_IS),
            engine.travelled(QUERIES, KALM.query_template),
        )
        for engine in (sides.baseline, sides.candidate)
    )
    return (
        agreement.cosines(baseline.documents, candidate.documents),
        agreement.cosines(baseline.queries, candidate.queries),
        agreement.compare(baseline, candidate, ks),
    )


def least_of(figures: np.ndarray) -> int:
    """The line that has it."""
    return int(np.argmin(figures)) + 1


def figures(found: dict[str, Any]) -> list[float]:
    return [found[name] for name in ("least", "p1", "p5", "median", "mean")]


def spread(right: np.ndarray) -> list[Any]:
    of = Spread.of(right)
    return [pytest.approx(x, abs=1e-7) for x in (of.least, of.p1, of.p5, of.median, of.mean)]


# --- what it finds


def test_the_figures_are_those_of_the_texts_own_vectors(
    evaluate: Evaluate,
    sides: Sides,
    corpus: Path,
    queries: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(agreement, "DEPTH", 20)  # the baseline's: others than the candidate's
    run = evaluate(sides.urls, corpus, "--queries", queries, "--k", "3,20", "--json")
    assert run.status == 0
    found = json.loads(run.shown)
    documents, asked, rankings = expected(sides, [1, 3, 20])
    assert figures(found["cosine"]["documents"]) == spread(documents)
    assert figures(found["cosine"]["queries"]) == spread(asked)
    assert [each["k"] for each in found["overlap"]] == [1, 3, 20]
    for each in found["overlap"]:
        assert figures(each) == spread(rankings.overlap[each["k"]])
        assert each["by_chance"] == each["k"] / 81
    assert figures(found["order"]) == spread(rankings.order)
    # It is no test of figures that could not be others.
    assert 0.85 < documents.min() < documents.max() < 0.97
    assert 0.2 < rankings.overlap[3].mean() < 0.95
    assert found["cosine"]["documents"]["least_at"] == f"corpus.jsonl line {least_of(documents)}"
    worst = least_of(rankings.overlap[20])
    assert found["overlap"][2]["least_at"] == f"queries.txt line {worst}"


def test_it_says_what_was_compared(
    evaluate: Evaluate, sides: Sides, corpus: Path, queries: Path
) -> None:
    found = json.loads(evaluate(sides.urls, corpus, "--queries", queries, "--json").shown)
    assert found["baseline"] == {
        "where": sides.urls[0],
        "model": KALM.space.model,
        "identity": KALM.space.to_dict(),
        "fingerprint": KALM.space.fingerprint,
    }
    assert found["candidate"]["identity"] == KALM_FP8.space.to_dict()
    assert found["dimensions"] == 3840
    assert found["corpus"] == {"from": str(corpus), "different": 81, "copies": 0}
    assert found["queries"] == {"from": str(queries), "different": 11, "copies": 0}
    assert found["compared"] == {"documents": 81, "queries": 11}
    assert [each["k"] for each in found["overlap"]] == [1, 10]  # there are no hundred
    assert (found["order"]["depth"], found["order"]["undefined"]) == (81, 0)
    assert found["warnings"] == []


def test_the_report_for_people(
    evaluate: Evaluate, sides: Sides, corpus: Path, queries: Path
) -> None:
    run = evaluate(sides.urls, corpus, "--queries", queries)
    assert run.status == 0
    documents, _, rankings = expected(sides, [1, 10])
    assert f"baseline {KALM.space.model}, bf16 (kalm-bf16, {KALM.space.fingerprint})" in run.words
    assert f"(kalm-fp8, {KALM_FP8.space.fingerprint}), {sides.urls[1]}" in run.words
    assert f"documents 81 different texts, {corpus}" in run.words
    table = dict(re.findall(r"^(\w\S+(?: \S+)*?) {2,}([\d.]+) ", run.shown, re.M))
    for name, right in {
        "cosine, documents": documents,
        "overlap@1": rankings.overlap[1],
        "overlap@10": rankings.overlap[10],
        "order of first 81": rankings.order,
    }.items():
        assert float(table[name]) == pytest.approx(np.nanmean(right), abs=1.01e-4)
    least = np.floor(documents.min() * 1e4) / 1e4
    place = f"corpus.jsonl line {least_of(documents)}"
    assert f"Least cosine, {place}: {least:.4f} Least overlap@10, queries.txt line" in run.words
    assert "never put vectors of both into one index" in run.words
    assert "this is agreement, not quality" in run.words
    assert "\n! " not in run.shown
    assert re.search(r"baseline: 100%.* 92/92 .*candidate: 100%.* 92/92 ", run.errors, re.DOTALL)


@pytest.mark.parametrize(
    "given",
    [
        {"KALM_EXPECTED_IDENTITY": "kalm-bf16"},
        {"KALM_EXPECTED_IDENTITY": "kalm-fp8", "KALM_MODEL": KALM.space.model},
        {"KALM_BASE_URL": "http://127.0.0.1:9/", "KALM_BACKEND": "local"},
        {"KALM_DIMENSIONS": "256"},
    ],
)
def test_variables_of_one_service_do_not_stand_in_the_way(
    evaluate: Evaluate,
    sides: Sides,
    corpus: Path,
    given: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run = evaluate(sides.urls, corpus, "--json")
    assert run.status == 0, run.errors
    wanted = int(given.get("KALM_DIMENSIONS", 3840))
    assert json.loads(run.shown)["dimensions"] == wanted
    assert json.loads(evaluate(sides.urls, corpus, "--json", "--dimensions", 64).shown)[
        "dimensions"
    ] == (64)


def test_without_queries_first_sentences_are_asked(
    evaluate: Evaluate, sides: Sides, corpus: Path
) -> None:
    corpus.write_text(json.dumps({"text": DOCUMENTS[0]}) + "\n" + corpus.read_text())
    found = json.loads(evaluate(sides.urls, corpus, "--json").shown)
    assert (found["queries"], found["corpus"]["copies"]) == (None, 1)
    assert found["compared"] == {"documents": 81, "queries": 81}
    assert found["overlap"][0]["by_chance"] == 1 / 80  # its own is left out
    assert "--queries takes a file of real queries" in found["warnings"][0]
    run = evaluate(sides.urls, corpus)
    assert "81 different texts" in run.words
    assert "1 copies left out" in run.words
    assert "queries first sentences of 81 of these documents" in run.words
    assert "ranked 80 documents for each query, its own left out" in run.words


@pytest.mark.parametrize(
    ("baseline", "candidate", "said"),
    [
        ("kalm", "kalm-fp8", "Wakes both deployments where they sleep. A start is paid"),
        ("http://localhost:8000", "https://a--b.modal.run", "Wakes the candidate where it sleeps"),
        ("https://kalm.example.org", "http://10.0.0.7", "Wakes the baseline where it sleeps"),
        ("http://127.0.0.1:8000", "http://[::1]:8001/v1", ""),
        ("http://gpu-box:8000", "http://192.168.1.5", ""),
    ],
)
def test_what_will_be_paid_is_said_where_something_may_be(
    evaluate: Evaluate,
    corpus: Path,
    baseline: str,
    candidate: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: object) -> None:
        raise ServiceUnavailableError("nobody there")

    monkeypatch.setattr("kalm_integrations.evaluation.quantization.connect", offline)
    run = evaluate((baseline, candidate), corpus)
    assert run.errors.startswith(said or "kalm eval quantization: nobody there")


def test_a_sample(evaluate: Evaluate, sides: Sides, corpus: Path, queries: Path) -> None:
    arguments = (corpus, "--queries", queries, "--sample", 9, "--json")
    found = json.loads(evaluate(sides.urls, *arguments).shown)
    assert found["compared"] == {"documents": 9, "queries": 9}
    assert "9 of 81 documents were drawn" in found["warnings"][0]
    sent = {text for texts, _ in sides.baseline.asked for text in texts}
    assert len(sent) == 18
    assert json.loads(evaluate(sides.urls, *arguments).shown) == found


def test_the_same_deployment_twice_shows_the_noise(
    evaluate: Evaluate, sides: Sides, corpus: Path
) -> None:
    run = evaluate((sides.urls[0], sides.urls[0] + "/v1"), corpus, "--json")
    assert run.status == 0
    found = json.loads(run.shown)
    assert {figures(each)[0] for each in found["overlap"]} == {1}
    assert figures(found["cosine"]["documents"]) == [1] * 5
    assert figures(found["order"]) == [1] * 5
    assert "Both report the same identity. These figures are the noise" in found["warnings"][0]
    assert "! Both report the same identity." in evaluate((sides.urls[0],) * 2, corpus).shown


def test_more_than_the_quantization_differs(evaluate: Evaluate, corpus: Path) -> None:
    with served(Rough(0, BF16)) as one, served(Rough(0, KALM_FP8.space)) as other:
        found = json.loads(evaluate((one, other), corpus, "--json").shown)
    assert "They differ in more than their quantization: revision: 'aaa" in found["warnings"][0]


def test_servers_that_report_no_identity(
    evaluate: Evaluate, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALM_MODEL", EMBEDDED.space.model)
    monkeypatch.setenv("KALM_EXPECTED_IDENTITY", "kalm-fp8")
    with FaultyServer(ours=False) as one, FaultyServer(ours=False) as other:
        found = json.loads(evaluate((one.url, other.url), corpus, "--json").shown)
        run = evaluate((one.url, other.url), corpus)
    assert (found["baseline"]["identity"], found["candidate"]["fingerprint"]) == (None, None)
    assert [warning[:35] for warning in found["warnings"][:2]] == [
        "The baseline reports no identity: t",
        "The candidate reports no identity: ",
    ]
    assert f"candidate {EMBEDDED.space.model}, no identity reported, {other.url}" in run.words


def test_a_candidate_that_tells_nothing_apart(
    evaluate: Evaluate, sides: Sides, corpus: Path
) -> None:
    sides.candidate.spoil = lambda vectors: np.repeat(vectors[:1] * 0 + 3840**-0.5, len(vectors), 0)
    found = json.loads(evaluate(sides.urls, corpus, "--json").shown)
    assert found["order"] == {"depth": 80, "undefined": 81}
    assert "For 81 queries all documents are equally near" in found["warnings"][-1]
    run = evaluate(sides.urls, corpus)
    assert run.status == 0
    assert re.search(r"^order of first 80 +undefined$", run.shown, re.M)


# --- what it refuses


def test_two_models(evaluate: Evaluate, sides: Sides, corpus: Path) -> None:
    other = Rough(0, replace(KALM.space, model="someone/else"))
    with served(other) as url:
        run = evaluate((sides.urls[0], url), corpus)
    assert (run.status, run.shown) == (2, "")
    said = f"the baseline serves {KALM.space.model}, the candidate someone/else: rankings by two"
    assert run.complaint.startswith(f"kalm eval quantization: {said}")
    assert not sides.baseline.asked


def test_another_model_than_was_asked_for(
    evaluate: Evaluate, sides: Sides, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KALM_MODEL", "someone/else")
    run = evaluate(sides.urls, corpus)
    assert run.status == 1
    assert re.search(r"the (baseline|candidate), http.*expected someone/else", run.complaint)


def test_other_dimensions(evaluate: Evaluate, corpus: Path) -> None:
    class Short(Rough):
        dimensions = (8,)

        def right(self, texts: Sequence[str]) -> np.ndarray[Any, Any]:
            cut = super().right(texts)[:, 8:16]
            return np.asarray(cut / np.linalg.norm(cut, axis=1, keepdims=True))

    unknown = replace(KALM.space, model="someone/else")
    with served(Rough(0, unknown)) as one, served(Short(0, unknown)) as other:
        run = evaluate((one, other), corpus)
    assert run.status == 2
    said = "the baseline's vectors have 3840 dimensions, the candidate's 8: --dimensions asks"
    assert said in run.complaint


@pytest.mark.parametrize("which", [0, 1])
def test_a_service_that_changes_within_the_run(
    evaluate: Evaluate, sides: Sides, corpus: Path, which: int
) -> None:
    engine = (sides.baseline, sides.candidate)[which]

    def redeployed(texts: Sequence[str]) -> None:
        if len(texts) > 1:  # after the first query
            engine.identity = BF16

    engine.fails = redeployed
    run = evaluate(sides.urls, corpus)
    assert (run.status, run.shown) == (1, "")
    name = ("baseline", "candidate")[which]
    assert f"the {name}, {sides.urls[which]}: the service changed from" in run.complaint
    assert ("The baseline had embedded all" in run.errors) == bool(which)


def test_a_candidate_that_fails_after_the_baseline_was_embedded(
    evaluate: Evaluate, sides: Sides, corpus: Path, queries: Path
) -> None:
    def fails(texts: Sequence[str]) -> None:
        if len(texts) > 1:
            raise ServiceUnavailableError("out of memory")

    sides.candidate.fails = fails
    run = evaluate(sides.urls, corpus, "--queries", queries, "--json")
    assert run.status == 1
    error = json.loads(run.shown)["error"]  # the one document, and no comparison
    assert (error["code"], error["exit_status"]) == ("service_unavailable", 1)
    said = " ".join(run.errors.split())
    assert "The baseline had embedded all 81 documents and 11 queries; then the candidate" in said
    assert f"kalm eval quantization: the candidate, {sides.urls[1]}: " in run.complaint
    assert "out of memory" in run.complaint


def test_a_candidate_that_cannot_embed_costs_no_corpus(
    evaluate: Evaluate, sides: Sides, corpus: Path
) -> None:
    def fails(texts: Sequence[str]) -> None:
        raise ServiceUnavailableError("out of memory")

    sides.candidate.fails = fails
    run = evaluate(sides.urls, corpus)
    assert (run.status, "had embedded" in run.errors) == (1, False)
    assert [len(texts) for texts, _ in sides.baseline.asked] == [1]


@pytest.mark.parametrize("which", [0, 1])
def test_a_wrong_key_and_a_port_where_nobody_listens(
    evaluate: Evaluate, sides: Sides, corpus: Path, which: int
) -> None:
    name = ("baseline", "candidate")[which]
    with served(Rough(0, KALM.space), key="another") as locked:
        urls = [sides.urls[0], sides.urls[0]]
        urls[which] = locked
        run = evaluate(tuple(urls), corpus)
    assert run.status == 1
    assert f"the {name}, {locked}: HTTP 401" in run.complaint
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        urls[which] = f"http://127.0.0.1:{free.getsockname()[1]}"
    run = evaluate(tuple(urls), corpus)
    assert run.status == 1
    assert f"the {name}, {urls[which]}: GET {urls[which]}/v1/models: " in run.complaint


@pytest.mark.parametrize("truncate", ["error", "end"])
def test_a_text_over_the_models_length_is_named_by_its_line(
    evaluate: Evaluate,
    sides: Sides,
    corpus: Path,
    truncate: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = DOCUMENTS[44]

    def fails(texts: Sequence[str]) -> None:
        if long in texts and truncate == "error":
            raise InputTooLongError.of([InvalidText([*texts].index(long), "is too long: 9 tokens")])

    sides.baseline.fails = fails
    monkeypatch.setenv("KALM_TRUNCATE", truncate)
    monkeypatch.setenv("KALM_BATCH_SIZE", "10")
    run = evaluate(sides.urls, corpus, "--sample", 60)
    if truncate == "end":
        assert run.status == 0
        assert {how["truncate"] for _, how in sides.candidate.asked} == {"end"}
        return
    assert (run.status, run.shown) == (2, "")
    said = f"the baseline, {sides.urls[0]}: corpus.jsonl line 45 is too long: 9 tokens. Mend"
    assert said in run.complaint
    assert "KALM_TRUNCATE=end" in run.complaint


def test_a_wrong_vector_is_never_a_figure(evaluate: Evaluate, corpus: Path) -> None:
    def longer(answer: EmbedResponse) -> EmbedResponse:
        return replace(answer, vectors=answer.vectors * 2)

    with FaultyServer([None, packed(longer)]) as one, FaultyServer() as other:
        run = evaluate((one.url, other.url), corpus)
    assert (run.status, run.shown) == (1, "")
    assert "a vector of length 2.0000 instead of 1" in run.complaint


# --- arguments and texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--k", "0"), "'0' is not whole numbers of at least 1"),
        (("--k", "1,,2"), "'1,,2' is not whole numbers of at least 1, like 1,10,100"),
        (("--k", "ten"), "'ten' is not whole numbers"),
        (("--sample", "0"), ">= 2"),
        (("--sample", "1"), ">= 2"),
        (("--dimensions", "-1"), "--dimensions"),
        (("--k", "5,81"), "--k 81: there are 80 different documents to rank for each query, the"),
        (("--k", "80"), "--k 80: there are 80 different documents"),
        (("--queries", "absent.txt"), "--queries: there is no absent.txt"),
    ],
)
def test_wrong_arguments(
    evaluate: Evaluate, corpus: Path, arguments: tuple[str, ...], said: str
) -> None:
    run = evaluate(("vllm-embedding-snapshot", "kalm-fp8"), corpus, *arguments)
    assert (run.status, run.shown) == (2, "")
    assert said in run.complaint
    assert run.errors.count("kalm eval quantization: ") == 1
    assert "Wakes both" not in run.errors


@pytest.mark.parametrize(
    ("urls", "said"),
    [
        (("http://127.0.0.1:9", "http://"), "the candidate, http://: base_url is not like https"),
        (("", "http://127.0.0.1:9"), "the baseline, : app_name: "),
        (("127.0.0.1:9", "http://127.0.0.1:9"), "Did you mean http://127.0.0.1:9 ?"),
        (("ftp://x", "http://127.0.0.1:9"), "base_url is not like https://host"),
        (("http://127.0.0.1:9", "http://me:hunter@x"), "base_url holds a credential"),
    ],
)
def test_a_deployment_that_cannot_be_one(
    evaluate: Evaluate, corpus: Path, urls: tuple[str, str], said: str
) -> None:
    run = evaluate(urls, corpus)
    assert said in run.complaint
    assert (run.status, run.shown) == (2, "")


def test_what_is_wrong_with_the_texts_is_said_before_anything_wakes(
    evaluate: Evaluate, corpus: Path
) -> None:
    lines = corpus.read_text().splitlines()
    lines[6] = '{"text": " "}'
    corpus.write_text("\n".join(lines))
    run = evaluate(("vllm-embedding-snapshot", "kalm-fp8"), corpus)
    assert (run.status, run.shown) == (2, "")
    assert "corpus.jsonl line 7 is white space only" in run.complaint
    assert "Wakes both" not in run.errors


def test_the_text_column(evaluate: Evaluate, sides: Sides, tmp_path: Path, queries: Path) -> None:
    plain = tmp_path / "corpus.txt"
    plain.write_text("\n".join(DOCUMENTS))
    run = evaluate(sides.urls, plain, "--text-column", "body")
    assert (run.status, "--text-column is for JSON Lines" in run.complaint) == (2, True)
    column = tmp_path / "corpus.jsonl"
    column.write_text("\n".join(json.dumps({"body": text}) for text in DOCUMENTS))
    one, other = (
        json.loads(evaluate(sides.urls, *arguments, "--queries", queries, "--json").shown)
        for arguments in ((plain,), (column, "--text-column", "body"))
    )
    assert one["overlap"] == other["overlap"]


def test_a_folder_needs_the_quickstarts_extra(
    evaluate: Evaluate, sides: Sides, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, text in enumerate(DOCUMENTS[:5]):
        (tmp_path / f"{number}.md").write_text(text)
    run = evaluate(sides.urls, tmp_path)
    assert "5 pieces of 5 files in" in run.words
    monkeypatch.setitem(sys.modules, "langchain_text_splitters", None)
    run = evaluate(sides.urls, tmp_path)
    assert run.status == 1
    assert install_command("quickstart") in run.complaint


def test_ctrl_c(
    evaluate: Evaluate, sides: Sides, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("kalm_integrations.evaluation.quantization.connect", interrupted)
    assert evaluate(sides.urls, corpus).status == 130
