"""The table of GPUs: memory, throughput and prices, and that `kalm deploy` follows it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from kalm_integrations.errors import ConfigurationError
from modal_backend import gpus
from modal_backend.engines.vllm.config import VLLMOptions
from modal_backend.gpus import GPUS, MEASURED, QUANTIZATIONS
from modal_backend.settings import DeploySettings

ROOT = Path(__file__).parents[2]
BOTH = [(gpu, quantization) for gpu in GPUS for quantization in QUANTIZATIONS]


class TestMemory:
    @pytest.fixture
    def step(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
        options = replace(VLLMOptions(), max_num_batched_tokens=request.param)
        monkeypatch.setattr(gpus, "VLLMOptions", lambda: options)

    @pytest.mark.parametrize("step", [8192], indirect=True)
    def test_weights_two_steps_and_working_memory_have_to_fit(self, step: None) -> None:
        token = 2 * 48 * 8 * 256 * 2
        assert gpus.kv_gib() == pytest.approx(1.25 * 2 * 8192 * token / 2**30, rel=0.001)
        assert gpus.needed_gib("none") == pytest.approx((22 + 7.5 + 3) / 0.95, rel=0.001)
        assert gpus.needed_gib("fp8") == pytest.approx((13 + 7.5 + 3) / 0.95, rel=0.001)

    def test_a_text_longer_than_two_steps_has_to_fit(self) -> None:
        assert gpus.kv_gib(32_768) == pytest.approx(15, rel=0.001)
        assert gpus.too_small("L4", "fp8", 32_768)
        assert not gpus.too_small("L4", "fp8")

    @pytest.mark.parametrize(("step", "fits"), [(8192, False), (4096, True)], indirect=["step"])
    def test_an_l4_in_fp8_is_accepted_if_steps_are_short_enough(
        self, step: None, fits: bool
    ) -> None:
        assert (gpus.problem("L4", "fp8") == "") is fits
        with pytest.raises(ConfigurationError) as caught:
            DeploySettings(gpu="L4")
        assert ("--quantization fp8 or int8" in str(caught.value)) is fits
        if fits:
            assert DeploySettings(gpu="L4", quantization="fp8").quantization == "fp8"
        else:
            with pytest.raises(ConfigurationError, match="Use --gpu"):
                DeploySettings(gpu="L4", quantization="fp8")

    @pytest.mark.parametrize(("gpu", "quantization"), BOTH)
    def test_deploy_refuses_exactly_what_the_table_refuses(
        self, gpu: str, quantization: gpus.Quantization
    ) -> None:
        problem = gpus.problem(gpu, quantization)
        if not problem:
            assert DeploySettings(gpu=gpu, quantization=quantization).gpu == (gpu,)
            return
        with pytest.raises(ConfigurationError, match=re.escape(problem)):
            DeploySettings(gpu=gpu, quantization=quantization)

    def test_the_memory_of_other_models_is_not_judged(self) -> None:
        assert DeploySettings(gpu="A10", model="some/model").gpu == ("A10",)
        with pytest.raises(ConfigurationError, match="does not compute in fp8"):
            DeploySettings(gpu="A10", model="some/model", quantization="fp8")

    def test_the_vllm_page_names_the_same_memory(self) -> None:
        page = " ".join((ROOT / "docs" / "vllm.md").read_text().split())
        match = re.search(r"GPU with (\d+) GiB of free memory, or (\d+) for .*fp8` or `int8`", page)
        assert match
        none, fp8, int8 = (f"{gpus.needed_gib(quantization):.0f}" for quantization in QUANTIZATIONS)
        assert [*match.groups(), fp8] == [none, fp8, int8]
        assert f"longest text takes {gpus.kv_gib():.1f} GiB".replace(".0 ", " ") in page

    def test_the_quantization_page_names_the_same_memory_and_gpus(self) -> None:
        page = (ROOT / "docs" / "quantization.md").read_text()
        none, fp8, int8 = (f"{gpus.needed_gib(quantization):.0f}" for quantization in QUANTIZATIONS)
        assert f"| GPU memory needed, GiB | {none} | {int8} | {fp8} |" in page
        fit = [gpu for gpu in gpus.GPUS if not gpus.problem(gpu, "fp8")]
        assert f"| {', '.join(fit)} |" in page


class TestDefaults:
    def test_the_default_gpu_fits_and_costs_what_the_table_says(self) -> None:
        settings = DeploySettings()
        (gpu,) = settings.gpu
        assert gpus.problem(gpu, settings.quantization) == ""
        second = gpus.container_dollars([gpu], settings.quantization)
        assert settings.dollars_per_hour == pytest.approx(3600 * second)

    @pytest.mark.parametrize("quantization", QUANTIZATIONS)
    def test_a_container_requests_the_machine_that_is_priced(
        self, quantization: gpus.Quantization
    ) -> None:
        settings = DeploySettings(gpu="H100", quantization=quantization)
        assert settings.memory_mib == 1024 * gpus.HOST_GIB[quantization]
        assert settings.cpu == gpus.CORES


class TestRates:
    @pytest.mark.parametrize(("gpu", "quantization"), MEASURED)
    def test_measured_throughput_is_reported_unchanged(
        self, gpu: str, quantization: gpus.Quantization
    ) -> None:
        rate = gpus.rate(gpu, quantization)
        assert rate == MEASURED[gpu, quantization]
        assert rate.measured
        assert re.search(r"\d{4}", rate.source)  # a date
        assert (ROOT / rate.source.split(", ")[-1]).is_file()

    @pytest.mark.parametrize(("gpu", "quantization"), [key for key in BOTH if key not in MEASURED])
    def test_other_throughput_is_calculated_from_the_peaks(
        self, gpu: str, quantization: gpus.Quantization
    ) -> None:
        card, reference = GPUS[gpu], GPUS[gpus.REFERENCE]
        ratio = card.bf16 / reference.bf16
        if quantization == "fp8" and card.fp8 and reference.fp8:
            ratio = card.fp8 / reference.fp8
        rate = gpus.rate(gpu, quantization)
        assert not rate.measured
        if quantization != "fp8" or card.fp8:
            known = MEASURED[gpus.REFERENCE, quantization].tokens
            assert rate.tokens == pytest.approx(known * ratio, abs=51)

    def test_a_new_measurement_replaces_the_calculation(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        new = gpus.Rate(1.0, measured=True, source="here")
        monkeypatch.setitem(MEASURED, ("L40S", "none"), new)
        assert gpus.rate("L40S", "none") == new
        assert not gpus.rate("L40S", "fp8").measured

    @pytest.mark.parametrize("card", GPUS.values(), ids=GPUS)
    def test_fp8_is_twice_as_fast_as_bf16_on_data_sheets(self, card: gpus.Gpu) -> None:
        assert card.fp8 is None or card.fp8 / card.bf16 == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize(
    ("name", "hint"), [("T4", "L4, A10"), ("h200!", "mean H200"), ("A100", "mean A100-40GB")]
)
def test_an_unknown_gpu_is_refused_with_a_similar_one(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        gpus.gpu_named(name)


def test_a_container_is_billed_for_its_gpu_its_cores_and_its_memory() -> None:
    assert gpus.container_dollars(["L4"], "fp8") == pytest.approx(
        0.000222 + 4 * 0.0000131 + 28 * 0.00000222
    )
    most_expensive = gpus.container_dollars(["L40S", "H100!"], "none")
    assert most_expensive == pytest.approx(gpus.container_dollars(["H100"], "none"))
