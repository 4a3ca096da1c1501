"""The benchmarks without a GPU: what they count and print, and every side on a tiny model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import nn

from benchmarks import (
    bandwidth,
    figures,
    fp8,
    kinds,
    machine,
    models,
    parts,
    products,
    profiling,
    results,
    roofline,
    scaling,
    sides,
    steady,
    tables,
    timing,
    work,
)
from benchmarks.__main__ import main, run
from benchmarks.models import Work
from benchmarks.operands import Shape
from benchmarks.parts import Settings
from pq_compile import scratch
from tests.benchmark_results import group, sample, side

Record = dict[str, Any]
TINY = {
    "guidance_embeds": True,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 64,
    "num_attention_heads": 4,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
    "axes_dims_rope": (16, 24, 24),
}


# ---------------------------------------------------------------- kernels by kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("rows_fp8_once", "quantise"),
        ("quantise", "quantise"),
        ("peak", "quantise"),
        ("decode_fp8", "decode"),
        ("matmul_w4a4_native", "gemm"),
        ("matmul_w4a16_vector", "matvec"),
        ("nvjet_hsh_256x128_64x4_1x2_h_bz_coopA_NTT", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("void cutlass::device_kernel<at::cuda::detail::enable_3x_kernel_for_sm9x>", "gemm"),
        ("cublasLt::splitKreduce_kernel<32, 16, int, float>", "gemm"),
        ("void gemv2T_kernel_val<int, int, __nv_bfloat16>", "matvec"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", "attention"),
        ("triton_poi_fused_addmm_gelu_3", "elementwise"),
        ("triton_red_fused_native_layer_norm_mul_add_0", "elementwise"),
        ("triton_tem_fused_addmm_7", "gemm"),
        ("void at::native::vectorized_layer_norm_kernel<c10::BFloat16>", "elementwise"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_a_kernel_has_the_kind_its_name_says(name: str, kind: str) -> None:
    assert kinds.kind(name) == kind


def test_a_product_of_one_row_is_a_matrix_vector_product_whatever_its_kernel() -> None:
    events: list[Record] = [
        {"cat": "cpu_op", "name": "aten::addmm", "args": {"External id": i, "Input Dims": dims}}
        for i, dims in enumerate(([[9], [1, 4], [4, 9]], [[9], [4608, 4], [4, 9]]))
    ]
    events += [
        {"cat": "kernel", "name": "nvjet_tst", "dur": 250.0, "args": {"External id": i}}
        for i in (0, 0, 1)
    ]
    events += [{"cat": "kernel", "name": "triton_poi_0", "dur": 100.0, "args": {}}]
    events += [{"cat": "gpu_user_annotation", "name": "## Call", "dur": 900.0, "args": {}}]
    found = profiling.launches(events, steps=1)
    split = kinds.split(found)
    assert split == dict.fromkeys(kinds.KINDS, 0.0) | {
        "matvec": 0.5,
        "gemm": 0.25,
        "elementwise": 0.1,
    }
    assert sum(one.times for one in found) == 4


def test_the_profilers_own_trace_tells_the_rows_of_products() -> None:
    x, w = torch.ones(6, 4), torch.ones(4, 5)
    events = profiling.trace(lambda: torch.mm(x, w), steps=2)
    products_seen = [event for event in events if event.get("name") == "aten::mm"]
    assert len(products_seen) == 2
    kernel = {
        "cat": "kernel",
        "name": "gemm",
        "dur": 1.0,
        "args": {"External id": products_seen[0]["args"]["External id"]},
    }
    assert profiling.launches([*events, kernel], steps=2)[0].rows == 6


# ---------------------------------------------------------------- timing, machine, results


def test_a_rotation_exceeds_the_cache_and_stays_bounded() -> None:
    for size in (1, 1000, timing.CPU_CACHE, 100 * timing.CPU_CACHE):
        count = timing.sets(size)
        assert 2 <= count <= timing.MOST_SETS
        assert count * size >= timing.CACHES * timing.CPU_CACHE or count == timing.MOST_SETS


def test_a_rotation_calls_each_set_of_buffers_as_often() -> None:
    calls = [0, 0, 0]

    def call(i: int) -> None:
        calls[i] += 1

    found = timing.rotating([lambda i=i: call(i) for i in range(3)], repetitions=4)  # type: ignore[misc]
    assert calls == [5, 5, 5]
    assert found["low"] <= found["median"] <= found["high"]
    assert found["count"] == 4


def test_clocks_are_read_from_what_nvidia_smi_says() -> None:
    assert machine.read_clocks("1980, 3201, 650.1, [N/A], 41\n1200, 1, 1, 1, 1\n") == {
        "clocks.sm": 1980.0,
        "clocks.mem": 3201.0,
        "power.draw": 650.1,
        "temperature.gpu": 41.0,
    }


def test_results_hold_no_number_that_json_has_not(tmp_path: Path) -> None:
    collected = results.Results(tmp_path / "a" / "out.json", {"only": ("gemm",)})
    collected.part("gemm", [{"ms": float("nan"), "shape": (1, 2), "us": 1.23456789}])
    found = results.read(tmp_path / "a" / "out.json")
    assert found is not None
    assert found["parts"]["gemm"] == [{"ms": None, "shape": [1, 2], "us": 1.23457}]
    assert {"device", "versions", "settings", "skipped", "failed", "seconds"} <= set(found)


def test_results_of_other_programs_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text('{"checks": []}')
    (tmp_path / "list.json").write_text("[1]")
    assert results.read(tmp_path / "other.json") is None
    assert results.read(tmp_path / "list.json") is None


# ---------------------------------------------------------------- the command


def test_without_a_gpu_every_part_is_skipped_with_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["skipped"]) == {part.key for part in parts.PARTS}
    assert "gemm: skipped, for it times kernels on a CUDA device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "stepp"], "no part 'stepp'; did you mean 'step'?"),
        (["--schemes", "w4a4-exactly"], "no scheme 'w4a4-exactly'; did you mean 'w4a4-exact'?"),
        (["--models", "flux.2"], "no model 'flux.2'"),
    ],
)
def test_an_unknown_name_is_an_error_with_the_nearest_one(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out.json"), *arguments])
    assert message in capsys.readouterr().err


def test_a_part_that_fails_is_kept_and_named(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(settings: Settings, collected: results.Results) -> None:
        raise ValueError("no such kernel")

    monkeypatch.setattr("benchmarks.__main__.missing", lambda part: "")
    settings = Settings(tmp_path / "out.json")
    collected = results.Results(settings.out, settings.shown())
    run(parts.Part("gemm", "gemm", "", broken), settings, collected)
    assert "no such kernel" in collected.record["failed"]["gemm"]


def test_the_plain_model_comes_first_and_schemes_multiply_by_modes() -> None:
    modes = ("default", "max-autotune-no-cudagraphs")
    settings = Settings(Path("out"), schemes=("auto", "w4a4-exact"), modes=modes)
    assert [one.name for one in settings.every_side()] == [
        "bf16 eager",
        "bf16 torch.compile",
        "bf16 torch.compile, max-autotune-no-cudagraphs",
        "fp8 rows",
        "fp8 rows, max-autotune-no-cudagraphs",
        "permuquant auto",
        "permuquant auto, max-autotune-no-cudagraphs",
        "permuquant w4a4-exact",
        "permuquant w4a4-exact, max-autotune-no-cudagraphs",
    ]


# ---------------------------------------------------------------- every side, on a tiny model


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(steady, "INDUCTOR", "eager")
    monkeypatch.setattr(models, "FLUX", dataclasses.replace(models.FLUX, config=TINY, text=24))
    monkeypatch.setattr("benchmarks.__main__.missing", lambda part: "")


def measured(part: str, settings: Settings) -> Record:
    collected = results.Results(settings.out, settings.shown())
    run(next(one for one in parts.PARTS if one.name == part), settings, collected)
    assert collected.record["failed"] == {}
    record = results.read(settings.out)
    assert record is not None
    assert "failed" not in tables.text(record)
    return record


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.filterwarnings("ignore")
def test_every_side_of_a_step_is_measured(tmp_path: Path) -> None:
    settings = Settings(
        tmp_path / "out.json",
        only=("step", "freezing"),
        schemes=("auto",),
        recipe="permuquant",
        resolution=96,
        repetitions=2,
        device="cpu",
    )
    found = measured("step", settings)["parts"]["flux"]
    eager, inductor, scaled, ours = found["sides"]
    assert found["config"]["num_layers"] == 1
    assert inductor["output"]["distance"] < 1e-2
    assert 0 < scaled["output"]["distance"] < 0.05
    assert scaled["linears"] == 12 + 5  # of a double and a single block, modulation left out
    assert 0 < ours["output"]["distance"] < 0.1
    assert eager["memory"]["parameter_bytes"] > 2 * ours["memory"]["parameter_bytes"]
    assert len(ours["freezing"]["observed_calls_s"]) == settings.calls
    assert {"plan", "pack"} <= set(ours["freezing"]["steps_s"])
    assert 0 < ours["outside_us"] < 1e3 * ours["host_ms"]
    assert ours["by_reference"] > 0  # as it must be on a CPU, and must not be on a GPU
    for one in found["sides"]:
        assert one["output"]["finite"]
        assert one["wall_ms"]["low"] <= one["wall_ms"]["median"]


@pytest.mark.slow
@pytest.mark.usefixtures("on_cpu")
@pytest.mark.filterwarnings("ignore")
def test_one_compiled_model_is_measured_over_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = (Work(96), Work(160))
    monkeypatch.setattr(scaling, "WORKS", works)
    settings = Settings(tmp_path / "out.json", repetitions=1, device="cpu")
    found = measured("scaling", settings)["parts"]["scaling"]["sides"]
    assert [one["kind"] for one in found] == ["inductor", "permuquant"]
    for one in found:
        assert [w["resolution"] for w in one["works"]] == [96, 160]
        assert [w["compile"]["graphs"] for w in one["works"]] == [0, 0]  # sizes are dynamic


@pytest.mark.usefixtures("on_cpu")
def test_the_settings_of_the_backend_do_not_reach_torch_compile_alone() -> None:
    side, changed = steady.Side("inductor"), dict.fromkeys(sides.GUARDS, "changed")
    with torch._dynamo.config.patch(changed), sides.own_world(side, steady.Protocol()):
        seen = {name: getattr(torch._dynamo.config, name) for name in sides.GUARDS}
    assert seen == sides.GUARDS


@pytest.mark.parametrize(
    ("name", "billions"), [("sd3.5-large", 8.06), ("sana-1.6b", 1.6), ("z-image", 6.15)]
)
def test_the_other_models_have_their_published_sizes(name: str, billions: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    model = models.MODELS[name]
    with torch.device("meta"):
        whole = getattr(diffusers, model.class_name)(**model.config)
    assert sum(p.numel() for p in whole.parameters()) / 1e9 == pytest.approx(billions, rel=0.01)


SMALL: dict[str, Record] = {
    "sd3.5-large": {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 32,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
    "sana-1.6b": {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 32,
        "cross_attention_dim": 64,
        "caption_channels": 32,
    },
    "z-image": {
        "n_layers": 1,
        "n_refiner_layers": 1,
        "dim": 256,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 32,
    },
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(SMALL))
def test_a_step_of_the_other_models_takes_its_inputs_in_bf16(name: str) -> None:
    pytest.importorskip("diffusers")
    model = dataclasses.replace(models.MODELS[name], config=SMALL[name])
    built = models.build(model, "cpu")
    outputs = [models.call(built, models.inputs(model, Work(128), "cpu"))() for _ in range(2)]
    assert {parameter.dtype for parameter in built.parameters()} == {torch.bfloat16}
    assert outputs[0].isfinite().all()
    assert torch.equal(*outputs)


# ---------------------------------------------------------------- fp8 and single kernels


def test_fp8_linears_follow_the_row_wise_recipe() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 32).to(torch.bfloat16)
    x = torch.randn(2, 20, 64).to(torch.bfloat16)
    found = fp8.Fp8Linear(linear)(x)
    a, a_scale = fp8.by_rows(x.reshape(-1, 64))
    w, w_scale = fp8.by_rows(linear.weight)
    exact = (a.double() * a_scale) @ (w.double() * w_scale).T + linear.bias.double()
    assert torch.allclose(found.reshape(-1, 32).double(), exact, rtol=1e-2, atol=1e-2)
    assert (a.float() * a_scale - x.reshape(-1, 64).float()).abs().max() < 0.07 * x.abs().max()


def test_every_route_of_a_product_is_timed() -> None:
    (found,) = products.gemm("cpu", [Shape(32, 64, 48)], 1)
    assert set(found["tflops"]) == set(products.ROUTES)
    assert "missing" not in found


def test_a_route_that_a_device_lacks_is_left_out_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(*_: Any) -> None:
        raise RuntimeError("no fp8 units here\nand more")

    monkeypatch.setitem(products.ROUTES, "fp8 vendor, weights fp8", refused)
    (found,) = products.gemm("cpu", [Shape(32, 64, 48)], 1)
    assert found["missing"] == {"fp8 vendor, weights fp8": "no fp8 units here"}
    assert "bf16 cuBLAS" in found["tflops"]


def test_modulation_is_timed_beside_bf16() -> None:
    (found,) = products.modulation("cpu", [Shape(1, 64, 48)], 1)
    assert found["kernel"] == "reference"
    assert found["ratio"] == pytest.approx(found["us"]["bf16 cuBLAS"] / found["us"]["permuquant"])


def test_bytes_count_each_input_and_each_output_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "decode", scratch.decode_reference)
    cases = [("norm + modulate", "fp8", 8), ("GELU", "fp8", 4), ("norm + modulate", "nvfp4", 8)]
    cases += [(name, "fp8", 2) for name in bandwidth.PROGRAMS]
    found = bandwidth.measure("cpu", cases, ((32, 64, "half"),), 48, 1 << 20)
    by_name = {(one["kernel"], one["shape"][0]): one["bytes"] for one in found["kernels"]}
    sample_bytes = 2 * 48 * 2  # scale and shift
    assert by_name["norm + modulate -> fp8", 8] == 8 * 48 * (2 + 1) + 8 * 4 + sample_bytes
    assert by_name["GELU -> fp8", 4] == 4 * 192 * (2 + 1) + 4 * 4
    assert by_name["norm + modulate -> nvfp4", 8] == 8 * 48 * 2.5 + 8 * 3 + 4 + sample_bytes
    assert by_name["decode -> half", 32] == 32 * 64 * (0.5625 + 2) + 4 + 32 * 4


# ---------------------------------------------------------------- tables and figures


def test_tables_hold_every_part() -> None:
    text = tables.text(sample())
    for words in ("| bf16 torch.compile | 130 |", "1.44", "SANA-1.6B (20 blocks)", "2.5", "80%"):
        assert words in text
    assert "FLUX.1-dev (19 blocks, 38 single blocks), 1024 px, batch 1" in text
    assert "| 2048 px, batch 1 | 500 | - | - |" in text  # out of memory


def test_ratios_are_to_the_fastest_mode_of_torch_compile() -> None:
    of = group("FLUX.1-dev", {})
    of["sides"].append(side("bf16 torch.compile, max-autotune", "inductor", 120.0, 23.8))
    assert tables.base(of) == 120.0
    assert f"| {120 / 90:.3g} |" in tables.steps(of)


LABELS = {
    "step": ["bf16 eager", "permuquant auto", "90.0 ms, 1.44x", *kinds.KINDS],
    "memory": ["bf16 eager", "peak while freezing", "23.8 GB", "6.7 GB"],
    "scaling": ["512 px, batch 1", "2048 px, batch 1", "500 ms"],
    "gemm": ["4608 x 9216 x 3072", "1270 TFLOP/s"],
    "bandwidth": ["GELU -> fp8, 4608 x 12288", "80 %", "copy"],
    "models": ["SANA-1.6B (20 blocks)", "130 ms"],
    "projection": ["RTX 5090, w4a4", "B200, bf16", "(projection)", "Step time on paper"],
}


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_a_figure_is_valid_and_names_everything_it_shows(name: str) -> None:
    svg = figures.draw([sample()])[name]
    root = ElementTree.fromstring(svg)
    texts = [node for node in root.iter() if node.tag.endswith("text")]
    shown = " | ".join("".join(node.itertext()) for node in texts)
    for label in LABELS[name]:
        assert label in shown
    right = float(root.attrib["width"])
    for node in texts:
        if node.get("text-anchor") == "end":
            assert 7.4 * len("".join(node.itertext())) < float(node.attrib["x"])
    for node in root.iter():
        if node.tag.endswith("rect"):
            assert float(node.attrib["x"]) + float(node.attrib["width"]) <= right


def test_figures_are_drawn_of_the_parts_that_are_there(tmp_path: Path) -> None:
    record = sample()
    record["parts"] = {"gemm": record["parts"]["gemm"]}
    (tmp_path / "mine.json").write_text(json.dumps(record))
    (tmp_path / "other.json").write_text("{}")
    files = [str(tmp_path / name) for name in ("mine.json", "other.json")]
    assert figures.main([*files, "--out", str(tmp_path / "figures")]) == 0
    drawn = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert drawn == {"gemm", "projection"}


def test_a_short_run_is_not_drawn_beside_the_whole_model() -> None:
    short = sample()
    short["parts"]["flux"]["config"]["num_layers"] = 2
    short["parts"]["flux"]["sides"][0]["side"] = "of the short run"
    svg = figures.draw([sample(), short])["step"]
    assert "of the short run" not in svg


# ---------------------------------------------------------------- roofline


def test_the_work_of_a_step_is_what_the_model_computes() -> None:
    shape = work.Shape()
    assert work.linear_flops(shape) / 1e12 == pytest.approx(59.5, abs=0.05)
    assert work.attention_flops(shape) / 1e12 == pytest.approx(14.9, abs=0.05)
    assert work.block_weights(shape) / 1e9 == pytest.approx(8.61, abs=0.005)
    assert work.modulation_weights(shape) / 1e9 == pytest.approx(3.23, abs=0.005)


def test_the_counted_products_are_those_that_torch_counts() -> None:
    pytest.importorskip("diffusers")
    from diffusers import FluxTransformer2DModel
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for double, single in ((0, 0), (1, 2)):
        model = models.FLUX.with_blocks(double, single)
        with torch.device("meta"):
            whole = FluxTransformer2DModel(**model.config).to(torch.bfloat16)
        given = models.inputs(model, Work(1024), "meta")
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            whole(**given)
        counts.append(counter.get_total_flops())
    shape = work.Shape(double=1, single=2)
    modulation = 2 * work.modulation_weights(shape)
    expected = work.linear_flops(shape) + work.attention_flops(shape) + modulation
    assert counts[1] - counts[0] == expected


def test_the_flux_shapes_of_the_product_table_are_all_its_block_linears() -> None:
    flops = sum(shape.flops * shape.times for shape in products.FLUX)
    assert flops == work.linear_flops(work.Shape())


def test_a_fused_step_reads_and_writes_what_its_kernels_do() -> None:
    one = work.Shape(double=1, single=0, width=10, image=3, text=2)
    per_token = work.elementwise_bytes(one, work.BF16) / 50
    assert per_token == 2 * (1 + 1) + 12 + 2 * (2 + 1 + 1) + 2 * (4 + 4) + 6
    eight = next(scheme for scheme in work.HOPPER if scheme.name == "w4a8")
    assert work.elementwise_bytes(one, eight) / 50 == per_token - 6 + (2 + 1)


def test_the_roofline_reproduces_the_measured_step_of_an_h100() -> None:
    bf16 = next(r for r in roofline.project(work.Shape()) if r["device"] == "H100 SXM")
    assert bf16["step_ms"] == pytest.approx(123.4, rel=0.05)  # kernels of Inductor's step
    assert bf16["bound_ms"] < bf16["step_ms"]


def test_every_projection_says_that_it_is_one() -> None:
    records = roofline.project(work.Shape(), {"bf16": 0.8, "ours": 0.7})
    assert {one["label"] for one in records} == {"projection"}
    lines = roofline.text(records, {"bf16": 0.8, "ours": 0.7}).splitlines()
    assert all("projection" in line for line in lines if "ms" in line or " | " in line)
    assert {"RTX 5090", "B200", "H100 SXM", "H200 SXM"} == {one["device"] for one in records}
    assert all(one["bound_ms"] <= one["step_ms"] for one in records)


def test_shares_of_bandwidth_come_from_the_measured_step() -> None:
    shares = roofline.measured_shares(sample())
    took = sum(
        sample()["parts"]["flux"]["sides"][1]["split_ms"][k] for k in ("elementwise", "quantise")
    )
    moved = work.elementwise_bytes(work.Shape(), work.BF16)
    assert shares["bf16"] == pytest.approx(moved / (took * 1e-3) / 4800e9)
    assert set(shares) == {"bf16", "ours"}
    assert roofline.measured_shares(sample() | {"device": {"name": "other"}}) == {}
