"""LangChain's `index` over the LangChain class: a record manager lets only what changed be
embedded, in every store, after a failure and in another process, and the wrong ways fail.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_classic.indexes import SQLRecordManager
from langchain_core.indexing import InMemoryRecordManager, RecordManager, aindex
from langchain_stores import (
    FACTS,
    documents_of,
    documents_sent,
    every_kind,  # noqa: F401 - a fixture
    index_all,
    key_of,
    name_of,
    opened,
    quiet_chroma,
    sql_records,
)
from scripted import ScriptedTransport

from kalm_integrations import KalmModalEmbeddings
from kalm_integrations.errors import AuthenticationError

pytestmark = quiet_chroma


class TestIndexing:
    @pytest.fixture(params=["in memory", "sql"])
    def records(
        self, request: pytest.FixtureRequest, tmp_path: Path
    ) -> Iterator[InMemoryRecordManager | SQLRecordManager]:
        if request.param == "sql":
            with sql_records(tmp_path, "facts") as records:
                yield records
        else:
            yield InMemoryRecordManager("facts")

    def test_only_what_changed_is_embedded(
        self, over: Any, kind: str, records: RecordManager, tmp_path: Path
    ) -> None:
        transport = ScriptedTransport()
        embeddings = over(transport, KalmModalEmbeddings)

        def embedded(texts: list[str], **options: Any) -> tuple[dict[str, int], list[str]]:
            already = len(transport.sent)
            result = index_all(documents_of(texts), records, store, **options)
            return result, transport.sent[already:]

        with opened(kind, tmp_path, embeddings) as store:
            assert embedded(["a", "b", "c"]) == ({"num_added": 3}, ["a", "b", "c"])
            assert embedded(["a", "b", "c"]) == ({"num_skipped": 3}, [])
            changed = ["a", "B", "d", "c"]
            result = {"num_added": 2, "num_skipped": 2, "num_deleted": 1}
            assert embedded(changed) == (result, ["B", "d"])
            assert embedded(["a"]) == ({"num_skipped": 1, "num_deleted": 3}, [])
            (left,) = store.similarity_search("b", k=4)
            assert (left.page_content, left.metadata["source"]) == ("a", "facts")
            if kind != "faiss":
                updated = embedded(["a"], force_update=True)
                assert updated == ({"num_updated": 1}, ["a"])

    async def test_async(self, over: Any, kind: str, tmp_path: Path) -> None:
        transport, records = ScriptedTransport(), InMemoryRecordManager("facts")
        with opened(kind, tmp_path, over(transport, KalmModalEmbeddings)) as store:
            for texts in (["a", "b"], ["a", "c"]):
                await aindex(
                    documents_of(texts), records, store, cleanup="full", key_encoder=key_of
                )
            assert transport.sent == ["a", "b", "c"]
            stored = await store.asimilarity_search("b", k=3)
            assert {document.page_content for document in stored} == {"a", "c"}

    def test_a_failure_leaves_records_and_store_consistent(
        self, over: Any, kind: str, records: RecordManager, tmp_path: Path
    ) -> None:
        transport = ScriptedTransport([None, None, AuthenticationError("no")])
        embeddings = over(transport, KalmModalEmbeddings)
        with opened(kind, tmp_path, embeddings) as store:
            assert index_all(documents_of(["old"]), records, store) == {"num_added": 1}
            texts = ["a", "b", "c", "d", "e"]
            with pytest.raises(AuthenticationError):
                index_all(documents_of(texts), records, store, batch_size=2)
            assert documents_sent(transport) == ["old", "a", "b", "c", "d"]
            # What is in the store is on record, and nothing was deleted for what failed.
            stored = {document.page_content for document in store.similarity_search("a", k=9)}
            assert stored == {"old", "a", "b"}
            on_record = records.exists([key_of(d) for d in documents_of(["old", *texts])])
            assert on_record == [True, True, True, False, False, False]
            result = index_all(documents_of(texts), records, store, batch_size=2)
            assert result == {"num_added": 3, "num_skipped": 2, "num_deleted": 1}
            assert documents_sent(transport)[5:] == ["c", "d", "e"]
            stored = {document.page_content for document in store.similarity_search("a", k=9)}
            assert stored == set(texts)

    def test_pitfall_records_of_old_vectors_leave_the_new_store_empty(
        self, over: Any, tmp_path: Path
    ) -> None:
        old = over(ScriptedTransport(), KalmModalEmbeddings)
        new = over(ScriptedTransport(), KalmModalEmbeddings, document_instruction="sts")
        documents, anyones = documents_of(FACTS), InMemoryRecordManager("facts")
        with opened("chroma", tmp_path, old) as store:
            assert index_all(documents, anyones, store) == {"num_added": 5}
        with opened("chroma", tmp_path, new) as store:
            assert index_all(documents, anyones, store) == {"num_skipped": 5}
            assert store.similarity_search("K2") == []
            own = InMemoryRecordManager(name_of(new))
            assert index_all(documents, own, store) == {"num_added": 5}
