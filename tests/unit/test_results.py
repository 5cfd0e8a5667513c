"""docs/results.md is in step with the files of numbers; and what the benchmarks make of a profile."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step
from benchmarks.breakdown import breakdown, kind_of, summary
from benchmarks.products import Shape, layers, representatives
from micro_diffusion.models.flops import forward_flops
from micro_diffusion.models.presets import PRESETS
from scripts import results


def test_the_page_is_in_step_with_the_files() -> None:
    page = results.PAGE.read_text()
    assert results.rendered(page) == page, "python scripts/results.py"


def test_every_file_of_results_is_on_the_page() -> None:
    shown = {one.path for name in results.MARKED.findall(results.PAGE.read_text())
             for one in results.history(results.RESULTS / name)}  # fmt: skip
    assert shown == set(results.RESULTS.glob("*.json*"))


def step_file(commit: str, speed: float, *, profile: bool) -> str:
    kinds = {"launches": 1234, "kernel_ms": 190.0, "kinds_ms": {"gemm": 98.2, "other": 0.04}}
    rows = [
        {"preset": "XL", "latent_size": 32, "mask_ratio": 0.75, "path": path, "images_per_second": images,
         "tflops_per_second": 347.3, "utilisation": 0.351, "peak_memory_gb": 65.54, "step_seconds": [0.3, 0.2, 0.1],
         "first_three_steps_seconds": 171.8, "profile": kinds if profile else None}
        for path, images in (("fast", speed), ("one-hot", 1000.0))
    ]  # fmt: skip
    return json.dumps({"machine": {"device": "A GPU", "torch": "2.11.0", "commit": commit}, "rows": rows})


def test_a_new_measurement_stands_above_the_ones_before_it(tmp_path: Path) -> None:
    for commit, speed in (("aaa1111", 1100.0), ("bbb2222", 1250.0)):
        (tmp_path / "new.json").write_text(step_file(commit, speed, profile=commit == "bbb2222"))
        results.add([tmp_path / "new.json"], "step-gpu.json", tmp_path)
    assert (tmp_path / "step-gpu.aaa1111.json").exists()
    page = results.rendered("before\n<!-- table: step-gpu.json -->\nold\n<!-- end -->\nafter\n", tmp_path)
    lines = page.splitlines()
    assert (lines[0], lines[-1]) == ("before", "after") and "old" not in lines
    assert results.rendered(page, tmp_path) == page
    assert "[step-gpu.json](../benchmarks/results/step-gpu.json): A GPU, torch 2.11.0, commit bbb2222" in page
    fast = [line for line in lines if "| fast |" in line]
    assert fast == [
        "| XL | 256 px, mask 0.75 | fast | 1,250 | 1.25 | 347 | 35.1% | 65.5 GB | 1,234 | 172 s | bbb2222 |",
        "| XL | 256 px, mask 0.75 | fast | 1,100 | 1.10 | 347 | 35.1% | 65.5 GB |  | 172 s | aaa1111 |",
        "| XL | 256 px, mask 0.75 | fast | 98.2 | 0.04 | 190 | 200 | bbb2222 |",
    ]


def test_inductor_settings_repetitions_and_waits_are_told_where_there_are_any(tmp_path: Path) -> None:
    data = json.loads(step_file("aaa1111", 1100.0, profile=True))
    data["rows"][0] |= {
        "inductor": {"coordinate_descent_tuning": True, "combo_kernels": False}, "batch_size": 256,
        "synchronised_step_seconds": 0.25, "first_three_steps_each": [171.8, 60.2],
    }  # fmt: skip
    (tmp_path / "step-gpu.json").write_text(json.dumps(data))
    page = results.rendered("<!-- table: step-gpu.json -->\n<!-- end -->\n", tmp_path)
    path = "fast, coordinate_descent_tuning, combo_kernels=False"
    assert f"| {path} | 1,100 | 1,024 | 1.10 | 347 | 35.1% | 65.5 GB | 1,234 | 172 s, 60.2 s |" in page
    assert "| one-hot | 1,000 |  | 1.00 | 347 | 35.1% | 65.5 GB | 1,234 | 172 s |" in page
    assert f"| {path} | 98.2 |" in page


def test_fp8_is_a_table_of_products_and_their_sum(tmp_path: Path) -> None:
    dense = {"bf16": [0.1, 0.3], "fp8": [0.06, 0.2], "fp8 fast": [0.05, 0.15], "fp8 cast": [0.08, 0.4]}
    experts = dense | {"fp8 cast": [0.07, 0.25], "fp8 grouped": [0.055], "best": [0.07, 0.25]}
    shapes = ((1, 16384, 1024, 3072), (8, 4096, 1024, 3840))
    data = {
        "machine": {"device": "A GPU", "torch": "2.11.0", "commit": "abc"}, "share_of_flops": 0.9989, "layers": 294,
        "rows": [
            {**Shape(*shape)._asdict(), "copies": 10.25, "ms": ms}
            for shape, ms in zip(shapes, (dense | {"best": [0.1, 0.3]}, experts), strict=True)
        ],
        "step": {"bf16": [2.0, 6.0], "fp8 cast": [1.5, 6.5], "best": [1.7, 5.5]},
    }  # fmt: skip
    (tmp_path / "fp8-gpu.json").write_text(json.dumps(data))
    page = results.rendered("<!-- table: fp8-gpu.json -->\n<!-- end -->\n", tmp_path)
    lines = [line for line in page.splitlines() if line.startswith("|")]
    assert lines[0] == (
        "| product | stands for | bf16, ms | fp8 alone, ms | fast accumulation, ms | with casts, ms "
        "| bf16 / fast accumulation | bf16 / with casts | grouped, ms | where it pays, ms | bf16 / where it pays |"
    )
    assert lines[2:] == [
        "| (16,384 x 1,024) (1,024 x 3,072) | 10.2 | 0.1 / 0.3 | 0.06 / 0.2 | 0.05 / 0.15 | 0.08 / 0.4 "
        "| 2.00 | 0.75 |  |  |  |",
        "| 8 x (4,096 x 1,024) (1,024 x 3,840) | 10.2 | 0.1 / 0.3 | 0.06 / 0.2 | 0.05 / 0.15 | 0.07 / 0.25 "
        "| 2.00 | 1.20 | 0.055 |  |  |",
        "| a step: 99.9% of its products | 294 | 2 / 6 |  |  | 1.5 / 6.5 |  | 0.92 |  | 1.7 / 5.5 | 1.09 |",
    ]


def test_products_have_the_flops_of_a_forward_pass_but_for_attention() -> None:
    counts = layers("MicroDiT_Nano_4", 2)
    config = PRESETS["MicroDiT_Nano_4"](input_size=32, caption_channels=step.TEXT_WIDTH, text_mask="none")
    whole = 2 * forward_flops(config, mask_ratio=0.75, text_length=step.TEXT_LENGTH)
    macs = sum(count * shape.macs for shape, count in counts.items())
    assert 0.9 < 2 * macs / whole < 1
    chosen = representatives(counts)
    assert len(chosen) < len(counts)
    assert sum(copies * shape.macs for shape, copies in chosen.items()) == pytest.approx(macs)


@pytest.mark.parametrize(("text", "told"), [("nope=1", "has no 'nope'"), ("combo_kernels=yes", "no Python literal")])
def test_an_inductor_setting_that_is_none_is_an_error(
    text: str, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert step.setting("triton.cudagraphs=True") == ("triton.cudagraphs", True)
    monkeypatch.setattr("sys.argv", ["step", "--out", "no.json", "--compile", "--inductor", text])
    with pytest.raises(SystemExit):
        step.main()
    assert told in capsys.readouterr().err


def test_steps_on_a_gpu_are_timed_between_events_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            called.append("event")
            self.at = 10.0 * called.count("step") ** 2

        def elapsed_time(self, after: "Event") -> float:
            return after.at - self.at

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: called.append("wait"))
    assert step.streamed(lambda: called.append("step"), 3) == pytest.approx([0.01, 0.03, 0.05])
    assert called == ["event", "step", "event", "step", "event", "step", "event", "wait"]


def test_repetitions_keep_the_last_and_the_first_steps_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    case = step.Case("XL", 32, 0.75, "fast", 8, 8, 1, "cpu", False, 0)
    asked: list[int] = []

    def measure(case: step.Case) -> dict[str, float]:
        asked.append(case.micro_batch)
        return {"micro_batch": 4, "first_three_steps_seconds": 10.0 / len(asked)}

    monkeypatch.setattr(step, "measure_alone", measure)
    row = step.repeated(case, 2)
    assert asked == [8, 4] and row["first_three_steps_each"] == [10.0, 5.0] and row["first_three_steps_seconds"] == 5.0


def test_parts_of_a_measurement_are_put_together(tmp_path: Path) -> None:
    parts = [tmp_path / "a.json", tmp_path / "b.json"]
    for part, speed in zip(parts, (1100.0, 1250.0), strict=True):
        part.write_text(step_file("aaa1111", speed, profile=False))
    results.add(parts, "step-gpu.json", tmp_path)
    speeds = [row["images_per_second"] for row in json.loads((tmp_path / "step-gpu.json").read_text())["rows"]]
    assert speeds == [1100.0, 1000.0, 1250.0, 1000.0]
    parts[1].write_text(step_file("bbb2222", 1.0, profile=False))
    with pytest.raises(SystemExit, match="same device, torch and commit"):
        results.add(parts, "step-gpu.json", tmp_path)
    assert [path.name for path in tmp_path.glob("step-gpu*")] == ["step-gpu.json"]


def test_quality_is_a_table_of_losses_and_one_of_scores(tmp_path: Path) -> None:
    scores = dict.fromkeys(results.SCORES, 0.5) | {"sampling": "30 Heun steps, guidance 2"}
    run = {
        "asked": {"recipe": "mask-50", "rate": None, "seed": 1, "scenes": 0.5, "seconds": 95.0, "settings": []},
        "seconds_used": 94.9, "images": 1_234_567, "recipe": {"stages": [{"learning_rate": 0.0016}]},
        "validation": {"average": {"slice": 0.25, "held-out pairs": 0.3}},
        "scores": [{"weights": "average", **scores}],
        "machine": {"device": "A GPU", "torch": "2.11.0", "commit": "abc"},
    }  # fmt: skip
    lines = (json.dumps(row) + "\n" for row in (run, {"model": "kept", **scores}))
    (tmp_path / "quality-gpu.jsonl").write_text("".join(lines))
    page = results.rendered("<!-- table: quality-gpu.jsonl -->\n<!-- end -->\n", tmp_path)
    assert "quality-gpu.jsonl): A GPU, torch 2.11.0, commit abc." in page
    assert "| mask-50 | 0.0016 | 50% | 1 | 95 | average | 1,234,567 | 0.2500 | 0.3000 |" in page
    shares = "| 50.0% " * len(results.SCORES) + "|"
    assert f"| mask-50 | 0.0016 | 50% | 1 | 95 | average | 30 Heun steps, guidance 2 {shares}" in page
    assert f"|  |  |  |  |  |  | 30 Heun steps, guidance 2 {shares[:-1]}| kept |" in page


def test_runs_of_quality_stand_in_order_whenever_they_ended() -> None:
    def run(recipe: str, rate: float, seed: int, seconds: float) -> dict[str, Any]:
        asked = {"recipe": recipe, "rate": rate, "seed": seed, "seconds": seconds, "scenes": 0.5, "settings": []}
        some = {"asked": asked, "seconds_used": seconds, "images": 1, "scores": []}
        return some | {"validation": {"average": {"slice": 0.3}}}

    rows = [run("b", 2, 0, 9), run("baseline", 2, 1, 9), run("b", 2, 0, 80), run("b", 2, 1, 9),
            run("baseline", 1, 0, 9), run("baseline", 2, 0, 9), run("a", 2, 0, 9)]  # fmt: skip
    losses, _ = results.quality(rows)
    found = [" ".join(row[key] for key in ("recipe", "rate", "seed", "GPU-seconds")) for row in losses]
    assert found == ["baseline 1 0 9", "baseline 2 0 9", "baseline 2 1 9", "b 2 0 9", "b 2 1 9", "a 2 0 9", "b 2 0 80"]


def test_a_mark_without_an_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="<!-- end -->"):
        results.rendered("<!-- table: step-gpu.json -->\n| a |\n", tmp_path)


def test_a_measurement_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "new.json").write_text("{}")
    with pytest.raises(SystemExit, match="there is no table for it"):
        results.add([tmp_path / "new.json"], "speed-gpu.json", tmp_path)
    assert not (tmp_path / "speed-gpu.json").exists()


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_64x2_nn_align8>", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "gemm"),
        ("triton_tem_fused_bmm_3", "gemm"),
        ("aten::addmm", "gemm"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_kernel<Flash_bwd_traits<64, cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x64", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention)", "attention"),
        ("_attention_grad_kernel_2", "attention"),
        ("_gather_kernel", "gather/scatter"),
        ("_sum_kernel_1", "gather/scatter"),
        ("triton_poi_fused_gather_12", "gather/scatter"),
        ("triton_per_fused_sort_5", "gather/scatter"),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>", "gather/scatter"),
        ("aten::index_add_", "gather/scatter"),
        ("_add_norm_kernel_0", "reductions"),
        ("triton_red_fused__to_copy_add_mul_native_layer_norm_7", "reductions"),
        ("triton_per_fused_addmm_native_layer_norm_sum_7", "reductions"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>", "reductions"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer + clip"),
        ("void at::native::lpnorm_cleanup<float, (at::native::NormType)1>", "optimizer + clip"),
        ("triton_poi_fused_addmm_gelu_9", "pointwise"),
        ("triton_poi_fused__to_copy_mul_silu_9", "pointwise"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", "pointwise"),
        ("triton_poi_fused__to_copy_31", "copies"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>", "copies"),
        ("something_else", "other"),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind


def test_a_profile_is_summed_by_kind_and_step() -> None:
    kernels = [("nvjet_a", 3000.0, 4), ("nvjet_a", 1000.0, 2), ("_sum_kernel", 500.0, 2), ("strange", 100.0, 2)]
    found = summary(kernels, steps=2)
    assert found["launches"] == 5 and found["kernel_ms"] == pytest.approx(2.3)
    assert {kind: ms for kind, ms in found["kinds_ms"].items() if ms} == {
        "gemm": 2.0, "gather/scatter": 0.25, "other": 0.05
    }  # fmt: skip
    assert found["largest"][0] == {"kernel": "nvjet_a", "kind": "gemm", "launches": 3.0, "ms": 2.0}


@pytest.mark.slow
def test_a_profile_counts_every_operator_once() -> None:
    x = torch.randn(8, 8)
    found = breakdown(lambda: (x @ x).softmax(dim=0).sum(), steps=3, gpu=False)
    kinds = found["kinds_ms"]
    assert kinds["gemm"] > 0 and kinds["reductions"] > 0 and kinds["attention"] == 0
    assert sum(kinds.values()) == pytest.approx(found["kernel_ms"], abs=0.01)
    launches = {row["kernel"]: row["launches"] for row in found["largest"]}
    assert launches["aten::mm"] == 1 and launches["aten::_softmax"] == 1
