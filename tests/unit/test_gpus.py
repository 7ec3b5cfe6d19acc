"""Memory, speed and price of GPUs."""

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

VLLM_PAGE = (Path(__file__).parents[2] / "docs" / "vllm.md").read_text()
BOTH = [(gpu, quantization) for gpu in GPUS for quantization in QUANTIZATIONS]


class TestMemory:
    def test_it_is_the_sum_of_weights_kv_cache_and_working_memory(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        token = 2 * 48 * 8 * 256 * 2
        monkeypatch.setattr(gpus, "step_tokens", lambda: 8192)
        assert gpus.kv_gib() == pytest.approx(1.25 * 2 * 8192 * token / 2**30, rel=0.001)
        assert gpus.needed_gib("none") == pytest.approx((22 + 7.5 + 3) / 0.95, rel=0.001)
        assert gpus.needed_gib("fp8") == pytest.approx((13 + 7.5 + 3) / 0.95, rel=0.001)
        assert gpus.kv_gib(32_768) == pytest.approx(15, rel=0.001)
        monkeypatch.setattr(gpus, "step_tokens", lambda: 2048)
        assert gpus.kv_gib() == pytest.approx(3.75, rel=0.001)  # KaLM's longest text, not 2 steps

    def test_the_step_is_the_engines_own(self) -> None:
        assert gpus.step_tokens() == VLLMOptions().max_num_batched_tokens

    @pytest.mark.parametrize(("step", "fits"), [(8192, False), (4096, True), (2048, True)])
    def test_an_l4_in_fp8_is_accepted_with_short_steps(
        self, step: int, fits: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpus, "step_tokens", lambda: step)
        assert (gpus.problem("L4", "fp8") == "") is fits
        assert gpus.problem("L4", "none")
        with pytest.raises(ConfigurationError) as caught:
            DeploySettings(gpu="L4")
        assert ("--quantization fp8" in str(caught.value)) is fits
        if fits:
            assert DeploySettings(gpu="L4", quantization="fp8").quantization == "fp8"
        else:
            with pytest.raises(ConfigurationError, match=r"has 24 GiB; .* take 25\. Use --gpu"):
                DeploySettings(gpu="L4", quantization="fp8")

    @pytest.mark.parametrize(("gpu", "quantization"), BOTH)
    def test_settings_refuse_the_gpus_that_have_a_problem(
        self, gpu: str, quantization: gpus.Quantization
    ) -> None:
        problem = gpus.problem(gpu, quantization)
        if not problem:
            assert DeploySettings(gpu=gpu, quantization=quantization).gpu == (gpu,)
            return
        with pytest.raises(ConfigurationError, match=re.escape(problem)):
            DeploySettings(gpu=gpu, quantization=quantization)

    def test_the_memory_of_other_models_is_not_checked(self) -> None:
        assert DeploySettings(gpu="A10", model="some/model").gpu == ("A10",)
        with pytest.raises(ConfigurationError, match="does not compute in fp8"):
            DeploySettings(gpu="A10", model="some/model", quantization="fp8")

    def test_the_page_on_vllm_has_the_same_figures(self) -> None:
        said = re.search(r"GPU with (\d+) GiB of free memory, or (\d+) for", VLLM_PAGE)
        assert said
        needed = [f"{gpus.needed_gib(quantization):.0f}" for quantization in QUANTIZATIONS]
        assert list(said.groups()) == needed
        assert f"longest text takes {gpus.kv_gib():.1f} GiB".replace(".0 ", " ") in VLLM_PAGE


class TestDefaults:
    """The deploy settings' own follow the table."""

    DEFAULT = DeploySettings()

    def test_the_default_runs_and_costs_what_the_table_says(self) -> None:
        (gpu,) = self.DEFAULT.gpu
        assert gpus.problem(gpu, self.DEFAULT.quantization) == ""
        second = gpus.container_dollars([gpu], self.DEFAULT.quantization)
        assert self.DEFAULT.dollars_per_hour == pytest.approx(3600 * second)

    def test_no_measured_gpu_is_cheaper_by_the_hour_and_by_the_token(self) -> None:
        (gpu,) = self.DEFAULT.gpu
        kind = self.DEFAULT.quantization
        ours = gpus.container_dollars([gpu], kind)
        for made in MEASURED:
            if made.quantization == kind and made.gpu != gpu:
                theirs = gpus.container_dollars([made.gpu], kind)
                faster = made.tokens_per_second / theirs > gpus.rate(gpu, kind).tokens / ours
                assert theirs > ours or not faster, made

    def test_the_container_requests_the_priced_resources(self) -> None:
        for quantization in QUANTIZATIONS:
            made = DeploySettings(gpu="H100", quantization=quantization)
            assert made.memory_mib == 1024 * gpus.HOST_GIB[quantization]
            assert made.cpu == gpus.CORES
            # An engine asleep lies in it, and the snapshot is of that.
            assert gpus.COLD_STARTS[quantization].gib <= gpus.HOST_GIB[quantization]


class TestRates:
    @pytest.mark.parametrize("made", MEASURED, ids=lambda made: f"{made.gpu} {made.quantization}")
    def test_measured_rates_are_returned_with_their_source(self, made: gpus.Measurement) -> None:
        rate = gpus.rate(made.gpu, made.quantization)
        assert (rate.tokens, rate.measured, rate.source) == (
            made.tokens_per_second,
            True,
            made.source,
        )
        assert re.search(r"\d{4}", made.source)  # a date
        assert (Path(__file__).parents[2] / made.source.split(", ")[-1]).is_file()
        assert made.gpu in GPUS
        assert made.tokens_per_text <= 1024  # where flop_per_token holds

    def test_measurements_are_unique_and_include_the_reference(self) -> None:
        keys = [(made.gpu, made.quantization) for made in MEASURED]
        assert len(keys) == len(set(keys))
        assert {(gpus.REFERENCE, quantization) for quantization in QUANTIZATIONS} <= set(keys)

    @pytest.mark.parametrize(("gpu", "quantization"), BOTH)
    def test_other_rates_are_calculated_from_the_peaks(
        self, gpu: str, quantization: gpus.Quantization
    ) -> None:
        if any((made.gpu, made.quantization) == (gpu, quantization) for made in MEASURED):
            return
        rate, known = gpus.rate(gpu, quantization), gpus.measured_reference(quantization)
        assert not rate.measured
        ratio = GPUS[gpu].peak(quantization) / GPUS[gpus.REFERENCE].peak(quantization)
        assert rate.tokens == pytest.approx(known.tokens_per_second * ratio)
        assert "data sheet" in rate.source

    def test_calculated_figures_follow_a_new_measurement(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = gpus.rate("L40S", "none").tokens
        faster = [replace(made, tokens_per_second=2 * made.tokens_per_second) for made in MEASURED]
        monkeypatch.setattr(gpus, "MEASURED", faster)
        assert gpus.rate("L40S", "none").tokens == pytest.approx(2 * before)
        own = replace(faster[0], gpu="L40S", tokens_per_second=1.0, source="seen")
        monkeypatch.setattr(gpus, "MEASURED", [*faster, own])
        assert gpus.rate("L40S", "none") == gpus.Rate(1.0, measured=True, source="seen")
        assert gpus.rate("L40S", "fp8").measured is False

    def test_the_flop_of_a_token(self) -> None:
        # 2 for each of 10.76 billion parameters, and a little for attention.
        assert gpus.flop_per_token(512) == pytest.approx(21.7e9, rel=0.002)
        assert gpus.flop_per_token(1) == pytest.approx(21.52e9, rel=0.001)

    @pytest.mark.parametrize("made", MEASURED, ids=lambda made: f"{made.gpu} {made.quantization}")
    def test_measurements_are_below_the_data_sheet(self, made: gpus.Measurement) -> None:
        assert 0.2 < gpus.share_of_peak(made) < 0.9

    def test_a_query_takes_as_long_as_reading_the_weights(self) -> None:
        # 21.5 GB of weights at 3.35 TB/s; half of that in fp8.
        assert gpus.query_seconds("H100", "none") == pytest.approx(0.0064, rel=0.01)
        assert gpus.query_seconds("H100", "fp8") == pytest.approx(0.0032, rel=0.01)

    @pytest.mark.parametrize("gpu", GPUS)
    def test_fp8_has_twice_the_peak_of_bf16(self, gpu: str) -> None:
        kind = GPUS[gpu]
        assert kind.fp8 is None or kind.fp8 / kind.bf16 == pytest.approx(2, rel=0.02)
        assert kind.peak("none") == 1e12 * kind.bf16
        assert kind.peak("fp8") == 1e12 * (kind.fp8 or kind.bf16)


class TestColdStart:
    def test_it_is_the_sum_of_container_wake_and_reading(self) -> None:
        start = gpus.ColdStart(container=1, wake=2, gib=10)
        assert start.seconds(2.0) == pytest.approx(3 + 10 * 2**30 / 2e9)

    def test_the_default_is_between_the_fastest_and_the_slowest_reading(self) -> None:
        slow, fast = gpus.READING
        for quantization in QUANTIZATIONS:
            budget = gpus.COLD_STARTS[quantization]
            assert budget.seconds(fast) < gpus.cold_start(quantization) < budget.seconds(slow)
        assert gpus.cold_start("fp8") < gpus.cold_start("none")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("T4", r"gpu='T4': there is no such GPU\. There are L4, A10"),
        ("h200!", r"Did you mean H200\?"),
        ("A100", r"Did you mean A100-40GB\?"),
    ],
)
def test_an_unknown_gpu_is_refused_with_a_suggestion(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        gpus.gpu_named(name)


def test_the_price_of_a_container_includes_cores_and_memory() -> None:
    assert gpus.container_dollars(["L4"], "fp8") == pytest.approx(
        0.000222 + 4 * 0.0000131 + 28 * 0.00000222
    )
    dearest = gpus.container_dollars(["L40S", "H100!"], "none")
    assert dearest == pytest.approx(gpus.container_dollars(["H100"], "none"))
