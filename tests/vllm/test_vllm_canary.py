"""Which corruptions of a loaded model the canary catches, when it is loaded and after a restore.

benchmarks/canary/NOTES.md has the same as a table, which is checked here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from corrupting import CORRUPTIONS, SHAPES
from reference import cosines as row_cosines
from running import SMALL, Texts, embed, running

from kalm_integrations.errors import CanaryFailedError, EngineLoadError, InvalidResponseError
from modal_backend import canary
from modal_backend.engines.vllm import process
from modal_backend.engines.vllm.config import VLLMOptions, check, identity_of
from modal_backend.engines.vllm.engine import VLLMEngine
from modal_backend.weights import locate

pytestmark = pytest.mark.asyncio(loop_scope="session")

PAGE = Path(__file__).parents[2] / "benchmarks/canary/NOTES.md"
CONTROLS = {
    "nothing: a copy of the same weights",
    "rotary base of the sliding layers, recomputed unchanged",
}
FORM = {"every weight zero", "one weight NaN", "final norm zero"}
"""What leaves no vectors at all."""
DIFFERENCES = {"attention zero in every layer"}
"""What makes different texts equal."""
ROWS = {"rows of a step in reverse order"}
"""What gives a text another one's vector."""
TOO_LITTLE = {"one layer's weights off by a thousandth of their size"}
NEAR = 0.03
"""How far a cosine may be from the documented one: other processors round otherwise."""


@dataclass(frozen=True)
class Seen:
    """What a corruption does."""

    least: float
    most: float
    at_load: str
    after_a_restore: str


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def corruptible(gemma: Path) -> AsyncIterator[tuple[VLLMEngine, dict[str, Any]]]:
    """An engine in bfloat16 whose model can be corrupted, and vLLM's arguments."""
    arguments: dict[str, Any] = {}
    original = process.engine_arguments

    def with_corruption(*args: Any, **kwargs: Any) -> dict[str, Any]:
        arguments.update(original(*args, **kwargs), worker_extension_cls="corrupting.Corrupting")
        return arguments

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "engine_arguments", with_corruption)
        async with running(gemma, dtype="bf16") as engine:
            yield engine, arguments


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def before(corruptible: tuple[VLLMEngine, dict[str, Any]]) -> canary.Vectors:
    """The canary's vectors of the healthy model."""
    return await canary.check(corruptible[0])


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def seen(
    corruptible: tuple[VLLMEngine, dict[str, Any]], before: canary.Vectors
) -> dict[str, Seen]:
    """Of every corruption, each on its own."""
    engine, _ = corruptible
    seen = {}
    for how in CORRUPTIONS:
        await engine._llm.collective_rpc("corrupt_model", args=(how,))
        vectors = (await embed(engine, canary.TEXTS, "query")).vectors
        cosines = np.einsum("ij,ij->i", vectors, before)
        seen[how] = Seen(
            float(cosines.min()),
            float(cosines.max()),
            await verdict(engine),
            await verdict(engine, before),
        )
    await engine._llm.collective_rpc("corrupt_model", args=(None,))
    return seen


async def verdict(engine: VLLMEngine, before: canary.Vectors | None = None) -> str:
    """What the canary says; nothing if all is well."""
    try:
        await canary.check(engine, before)
    except CanaryFailedError as error:
        return str(error.args[0])
    return ""


async def test_prefix_caching_is_off(
    corruptible: tuple[VLLMEngine, dict[str, Any]],
) -> None:
    """Otherwise the vectors after a restore could come from the cache."""
    engine, _ = corruptible
    assert engine._llm.vllm_config.cache_config.enable_prefix_caching is False


async def test_a_healthy_model_passes_at_load_and_after_a_restore(
    corruptible: tuple[VLLMEngine, dict[str, Any]], seen: dict[str, Seen], before: canary.Vectors
) -> None:
    for control in CONTROLS:
        assert (seen[control].at_load, seen[control].after_a_restore) == ("", "")
    assert np.array_equal(await canary.check(corruptible[0], before), before)


async def test_the_check_at_load_detects_impossible_vectors(
    seen: dict[str, Seen],
) -> None:
    """Without the right vectors to compare with, those of wrong weights look as good."""
    said = {how: found.at_load for how, found in seen.items() if found.at_load}
    assert said.keys() == FORM | DIFFERENCES | ROWS
    assert all("that they have alone" in said[how] for how in ROWS)
    assert said["every weight zero"] == said["final norm zero"]
    assert "vector of length 0.0000" in said["final norm zero"]
    assert "values that are not finite" in said["one weight NaN"]
    assert said["attention zero in every layer"].startswith("two different texts have one vector")


async def test_the_check_after_a_restore_detects_every_moved_vector(
    seen: dict[str, Seen],
) -> None:
    moved = {how for how, found in seen.items() if not found.least >= canary.SAME}
    assert moved == CORRUPTIONS.keys() - CONTROLS - TOO_LITTLE
    assert {how for how, found in seen.items() if found.after_a_restore} == moved
    for how in moved - FORM - DIFFERENCES - ROWS:
        assert seen[how].after_a_restore.startswith("vectors are not those of before the snapshot")


async def test_the_documented_table_is_right(seen: dict[str, Seen]) -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    _, *rows = [row for row in cells if len(row) == 5]  # the first is the table's head
    documented = {name: (at_load, restored) for name, _, at_load, restored, _ in rows}
    assert documented == {
        how: (yes(found.at_load), yes(found.after_a_restore)) for how, found in seen.items()
    }
    for name, cell, *_, published in rows:
        found = seen[name]
        if cell == "no number":
            assert np.isnan(found.least)
            assert published == "yes"
            continue
        if name in ROWS:  # which texts share a step is a matter of time
            assert cell == "those of other texts"
            assert found.least < 0.9
            assert published == "perhaps"
            continue
        least, most = map(float, cell.split(" to "))
        assert (found.least, found.most) == pytest.approx((least, most), abs=NEAR)
        # With a cosine of 0.988 to the right ones, no vectors passed; with 0.997, most did.
        expected = "yes" if found.most < 0.988 else "no" if found.least > 0.999 else "perhaps"
        assert published == expected


def yes(failure: str) -> str:
    return "yes" if failure else "no"


async def test_bfloat16_stays_near_the_reference(
    corruptible: tuple[VLLMEngine, dict[str, Any]], ladder: Texts, pool: Texts
) -> None:
    engine, _ = corruptible
    assert engine.identity.quantization == "bf16"
    for texts in (ladder, pool):
        output = await embed(engine, texts.texts)
        assert row_cosines(output.vectors, texts.vectors).min() >= 0.999


@pytest.mark.parametrize(("dtype", "name"), [("float32", "fp32"), ("float16", "fp16")])
async def test_a_different_dtype_is_refused_by_the_check_of_the_load(
    corruptible: tuple[VLLMEngine, dict[str, Any]],
    gemma: Path,
    before: canary.Vectors,
    dtype: str,
    name: str,
) -> None:
    """The canary cannot tell: such vectors are about as good."""
    engine, arguments = corruptible
    options = VLLMOptions(**{**SMALL, "dtype": "bf16"})
    weights = locate(str(gemma))
    (inspected,) = await engine._llm.collective_rpc("inspect_model_as", args=(dtype,))
    with pytest.raises(EngineLoadError, match=f"dtype: 'bf16' != '{name}'"):
        check(engine._llm.vllm_config, identity_of(weights, inspected), options, arguments)
    (inspected,) = await engine._llm.collective_rpc("inspect_model")
    check(engine._llm.vllm_config, identity_of(weights, inspected), options, arguments)
    assert np.array_equal(await canary.check(engine, before), before)


@pytest.mark.parametrize("how", SHAPES)
async def test_a_wrong_output_shape_is_an_error(
    corruptible: tuple[VLLMEngine, dict[str, Any]], before: canary.Vectors, how: str
) -> None:
    engine, _ = corruptible
    await engine._llm.collective_rpc("corrupt_model", args=(how,))
    try:
        with pytest.raises(InvalidResponseError, match=r"instead of \(128,\)"):
            await embed(engine, ["a", "b"])
    finally:
        await engine._llm.collective_rpc("corrupt_model", args=(None,))
    assert np.array_equal(await canary.check(engine, before), before)


async def test_the_canary_texts_have_distant_vectors(before: canary.Vectors) -> None:
    cosines = before @ before.T - 2 * np.eye(len(before))
    assert cosines.max() < canary.SAME - 0.01
