"""`kalm_integrations.mteb` with the real mteb, on a task of our own texts, in this process."""

from __future__ import annotations

from typing import Any

import mteb
import numpy as np
import pytest
from datasets import Dataset
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType
from retrieval_set import PASSAGES, QUERIES, RIGHT

from kalm_integrations import KalmClient, prompts
from kalm_integrations.models import KALM
from kalm_integrations.mteb import KalmModel


class OurPassages(AbsTaskRetrieval):
    metadata = TaskMetadata(
        name="OurPassages",
        description="Questions about short passages.",
        dataset={"path": "kalm-integrations/our-passages", "revision": "1"},
        type="Retrieval",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        prompt={"query": "Given a question, find its passage"},
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
        reference=None,
    )

    def load_data(self, **_: Any) -> None:
        split = RetrievalSplitData(
            corpus=Dataset.from_list(
                [{"id": f"d{i}", "title": "", "text": text} for i, text in enumerate(PASSAGES)]
            ),
            queries=Dataset.from_list(
                [{"id": f"q{i}", "text": text} for i, text in enumerate(QUERIES)]
            ),
            relevant_docs={f"q{i}": {f"d{row}": 1} for i, row in enumerate(RIGHT)},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


@pytest.fixture
def client() -> KalmClient:
    return KalmClient(backend="local")


def test_a_retrieval_task_gets_the_scores_of_the_same_vectors(client: KalmClient) -> None:
    model = KalmModel(client)
    (result,) = mteb.evaluate(
        model, OurPassages(), cache=None, show_progress_bar=False
    ).task_results
    (scores,) = result.scores["test"]
    template = prompts.mteb_template("Given a question, find its passage")
    own = client.with_options(query_instruction=template)
    similarities = own.embed(QUERIES, role="query").vectors @ own.embed(PASSAGES).vectors.T
    ranks = (similarities > similarities[np.arange(len(RIGHT)), list(RIGHT)][:, None]).sum(axis=1)
    assert scores["recall_at_1"] == pytest.approx((ranks == 0).mean(), abs=1e-4)
    gains = np.where(ranks < 10, 1 / np.log2(ranks + 2), 0)
    assert scores["ndcg_at_10"] == pytest.approx(gains.mean(), abs=1e-4)
    assert 0.2 < scores["ndcg_at_10"] < 0.95
    assert model.mteb_model_meta.revision == client.warm_up().fingerprint


def test_queries_and_documents_get_the_instructions_of_their_task(client: KalmClient) -> None:
    prompts_dict = mteb.get_model_meta(KALM.space.model).loader_kwargs["prompts_dict"]
    model = KalmModel(client, instructions=prompts_dict)

    def instructions(task: str) -> tuple[str, str]:
        metadata = mteb.get_task(task).metadata
        return (
            model.instruction(metadata, PromptType.query),
            model.instruction(metadata, PromptType.document),
        )

    assert instructions("SciFact") == (prompts.PRESETS["scientific"].task, "")
    assert instructions("ArguAna") == (prompts.PRESETS["argument"].task,) * 2
    sts = mteb.get_task("STS12").metadata
    assert model.instruction(sts, None) == prompts.PRESETS["sts"].task


def test_the_instruction_is_in_the_form_of_mteb_and_empty_texts_are_embedded(
    client: KalmClient,
) -> None:
    task = OurPassages().metadata
    model = KalmModel(client, instructions={"OurPassages": "Find it please"})
    texts = ["  How tall is K2?\n", ""]
    found = model.encode(
        [{"text": texts}],
        task_metadata=task,
        hf_split="test",
        hf_subset="default",
        prompt_type=PromptType.query,
    )
    expected = client.embed(["Instruct: Find it please \n Query: How tall is K2?"])
    assert np.allclose(found[:1], expected.vectors, atol=1e-3)
    assert found.shape == (2, 512)
