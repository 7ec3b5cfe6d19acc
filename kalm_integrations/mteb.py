"""A deployment as a model of `mteb` (2.x), to repeat tasks of its leaderboard.

    import mteb
    from kalm_integrations import KalmClient
    from kalm_integrations.mteb import KalmModel

    model = KalmModel(KalmClient(truncate="end"))
    mteb.evaluate(model, mteb.get_tasks(["SciFact"]))

The published results cut texts to 512 tokens: deploy with `--max-model-len 512` to repeat them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import mteb
import numpy as np
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray

from kalm_integrations import prompts
from kalm_integrations.client import KalmClient

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata

_EMPTY: Final = "."
"""Stands for an empty text, which the client refuses and some tasks contain."""


class KalmModel(AbsEncoder):  # type: ignore[misc]  # mteb is optional
    """Embeds the texts of `mteb` tasks with a `KalmClient`.

    Texts get the instruction of the task in the form of mteb and of the authors' evaluation code,
    and are stripped, as by sentence-transformers.

    Args:
        client: The deployment, with its `dimensions` and `truncate`; its instructions are not used.
        instructions: A sentence by "TASK-query", "TASK-document" or "TASK", where TASK is a name
            or a type of tasks. Documents of searches get those of "TASK-document" only. None is
            mteb's own dictionary for the model; the task's prompt comes next.
    """

    def __init__(
        self, client: KalmClient, *, instructions: Mapping[str, str] | None = None
    ) -> None:
        identity = client.warm_up(timeout=max(client.config.timeout, 1800))
        self.model = None
        self._client = client.with_options(query_instruction="none", document_instruction="none")
        name = identity.space.model
        known = {meta.name: meta for meta in mteb.get_model_metas()}.get(name)
        if instructions is None and known:
            instructions = known.loader_kwargs.get("prompts_dict")
        self._instructions = dict(instructions or {})
        changes = {
            "loader": None,
            "name": name if "/" in name else f"kalm-integrations/{name}",
            "revision": identity.fingerprint,  # of the deployment's vectors, dimensions included
            "embed_dim": identity.dimensions or None,
            "similarity_fn_name": ScoringFunction.COSINE,
        }
        self.mteb_model_meta = (
            known.model_copy(update=changes) if known else ModelMeta.create_empty(changes)
        )

    def instruction(self, task: TaskMetadata, prompt_type: PromptType | None) -> str:
        """The sentence for a task's queries, documents, or (None) texts of one kind; or ""."""
        role = prompt_type.value if prompt_type else "text"
        for key in (task.name, task.type):
            for name in (f"{key}-{role}", key):
                if name in self._instructions and (role != "document" or name != key):
                    return self._instructions[name]
        if role == "document":
            return task.prompt.get(role, "") if isinstance(task.prompt, dict) else ""
        return str(self.get_instruction(task, prompt_type))

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **_: Any,
    ) -> NDArray[np.float32]:
        """Embed the texts of a task: unit vectors, shape (texts, dimensions). See `AbsEncoder`."""
        task = self.instruction(task_metadata, prompt_type)
        template = prompts.mteb_template(task) if task else prompts.AS_IS
        texts = [text.strip() or _EMPTY for batch in inputs for text in batch["text"]]
        role: prompts.Role = "query" if prompt_type == PromptType.query else "document"
        prompted = [prompts.apply(template, text) for text in texts]
        return self._client.embed(prompted, role=role).vectors
