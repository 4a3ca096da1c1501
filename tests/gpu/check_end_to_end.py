"""emoji-flux through the compiler on a CUDA device, against the CPU's reference, in minutes.

    python -m tests.gpu.check_end_to_end result.json

Per linear, on identical inputs: codes of weight and activation equal to the CPU's, outputs within
bf16 rounding of it. End to end: velocity error and PSNR of the demo on both devices. Beside them
what the life cycle promises on a GPU: memory given back, state dicts, moves, sizes, modes, threads.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor, nn

import pq_compile
from pq_compile import demo, emoji_flux, kernels
from pq_compile.formats import NVFP4
from pq_compile.released import Released
from tests.models import denoiser, inputs, relative_error, run, served_by_hand, unit_of

Record = dict[str, Any]
CLOSE = 3e-2
"""In fp32 a code may fall the other way and move what follows; wrong weights are off by 1."""


def compiled(model: nn.Module, mode: str | None = None, **options: Any) -> Any:
    if mode is not None:
        return torch.compile(model, backend="permuquant", mode=mode)
    options = {"recipe": "random", "progress": False, **options}
    return torch.compile(model, backend="permuquant", options=options)


def on_gpu(seed: int, batch: int = 2, tokens: int = 12) -> tuple[Tensor, Tensor]:
    latents, condition = inputs(seed, batch, tokens, torch.float32)
    return latents.cuda(), condition.cuda()


def by_hand(model: Any, *args: Tensor) -> Tensor:
    with served_by_hand(copy.deepcopy(model), model) as copied:
        return run(copied, *args)


# ---------------------------------------------------------------- emoji-flux


def linears_match_the_cpu() -> Record:
    """Codes bit for bit and outputs to bf16 rounding, for every quantised linear of the model."""
    model = emoji_flux.load_model(emoji_flux.DEFAULT_FOLDER, "cuda")
    prompts = emoji_flux.load_prompts(emoji_flux.DEFAULT_FOLDER, device="cuda").chunks(2)[0]
    fast = compiled(model)
    noise = emoji_flux.starting_noise(2, 0, "cuda")
    with torch.no_grad():
        emoji_flux.velocity(fast, prompts)(noise, 0.7)
    unit = unit_of(model)
    assert unit.plan is not None
    products: list[tuple[str, Any]] = []
    quantised: list[tuple[Tensor, Any]] = []
    entries = {name: unit.served()[name] for name in unit.needs.packed}
    real4, real16, real_quantise = kernels.matmul_w4a4, kernels.matmul_w4a16, kernels.quantise

    def spy4(a: Any, w: Any, bias: Any, dtype: Any, kind: Any) -> Tensor:
        y = real4(a, w, bias, dtype, kind)
        products.append(("w4a4", (a, w, bias, y.clone())))  # Inductor writes on into y
        return y

    def spy16(x: Any, w: Any, bias: Any, kind: Any) -> Tensor:
        y = real16(x, w, bias, kind)
        products.append(("w4a16", (x.clone(), w, bias, y.clone())))
        return y

    def spy_quantise(x: Tensor) -> Any:
        codes = real_quantise(x)
        quantised.append((x.cpu(), [one.cpu() for one in codes]))
        return codes

    with (
        torch.no_grad(),
        patch.object(kernels, "matmul_w4a4", spy4),
        patch.object(kernels, "matmul_w4a16", spy16),
        patch.object(kernels, "quantise", spy_quantise),
    ):
        emoji_flux.velocity(fast, prompts)(noise, 0.7)
    wrong = sum(
        not _same_bits(one, other)
        for x, codes in quantised
        for one, other in zip(codes, NVFP4.quantize(NVFP4.pad(x)), strict=True)
    )
    for name, entry in entries.items():
        weight = unit.passes.fold(
            name,
            dict(model.named_parameters())[name].detach().cpu(),
            unit.needs.groups,
            unit.orders,
        )
        for one, other in zip(entry, NVFP4.quantize(NVFP4.pad(weight)), strict=True):
            wrong += not _same_bits(one.cpu(), other)
    worst, ulps = 0.0, 0
    for scheme, (a, w, bias, y) in products:
        w64 = NVFP4.decode(w[0].cpu(), w[1].cpu()).double() * w[2].cpu().double()
        if scheme == "w4a4":
            a64 = NVFP4.decode(a[0].cpu(), a[1].cpu()).double() * a[2].cpu().double()
        else:
            a64 = a.cpu().double()
        exact = a64 @ w64[:, : a64.shape[1]].T
        exact = exact if bias is None else exact + bias.cpu().double()
        worst = max(worst, relative_error(y.cpu(), exact))
        ulps = max(ulps, _ulps(y.cpu(), exact.to(y.dtype)))
    return {
        "products": len(products),
        "weights": len(entries),
        "activations": len(quantised),
        "codes that differ": wrong,
        "worst relative error": worst,
        "worst ulps of bf16": ulps,
        "kernels": sorted({str(k) for k in pq_compile.report(fast).sections[0].kernels.values()}),
        "passed": wrong == 0 and worst < 2.5e-3 and len(products) >= len(entries),
    }


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _ulps(found: Tensor, expected: Tensor) -> int:
    """Largest distance in steps of bf16, among elements that are not small beside their row."""
    big = expected.abs() > 0.02 * expected.abs().amax(-1, keepdim=True)
    steps = [x[big].view(torch.int16).to(torch.int32) for x in (found, expected)]
    return int((steps[0] - steps[1]).abs().max())


def demo_matches_the_cpu() -> Record:
    """Velocity error within 5 % and PSNR within 0.3 dB of the CPU's, rtn and permuquant."""
    rows: dict[str, list[Any]] = {}
    seconds = {}
    for device in ("cuda", "cpu"):
        torch._dynamo.reset()
        start = time.perf_counter()
        settings = demo.Settings(device=device, out=Path(f"out/demo_{device}"))
        rows[device] = [asdict(row) for row in demo.run(settings)]
        seconds[device] = time.perf_counter() - start
    passed = True
    for gpu, cpu in zip(rows["cuda"], rows["cpu"], strict=True):
        passed &= abs(gpu["velocity_error"] / cpu["velocity_error"] - 1) <= 0.05
        passed &= abs(gpu["psnr"] - cpu["psnr"]) <= 0.3
    return {"rows": rows, "seconds": seconds, "passed": passed}


# ---------------------------------------------------------------- life cycle


def memory_is_given_back() -> Record:
    torch.manual_seed(0)
    model = denoiser(blocks=4, width=2048).to(torch.bfloat16).cuda()
    x = torch.randn(1, 64, 8, device="cuda", dtype=torch.bfloat16)
    condition = torch.randn(1, 2048, device="cuda", dtype=torch.bfloat16)
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    before = _allocated()
    fast = compiled(model)
    for _ in range(3):
        run(fast, x, condition)
    after = _allocated()
    same = all(torch.equal(t.cpu(), state[name]) for name, t in model.state_dict().items())
    released = sum(isinstance(p, Released) for p in model.parameters())
    summary = pq_compile.report(fast).to_dict()["summary"]
    return {
        "bytes before": before,
        "bytes after": after,
        "ratio": before / after,
        "released": released,
        "reported": [summary["weight_bytes_before"], summary["weight_bytes_after"]],
        "passed": same and after < before / 3 and released > 0,
    }


def _allocated() -> int:
    gc.collect()
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated()


def serves_every_size() -> Record:
    model = denoiser(dtype=torch.float32).cuda()
    fast = compiled(model)
    sizes = ((2, 12), (1, 12), (7, 12), (2, 20), (7, 33), (2, 12))
    errors = {}
    for batch, tokens in sizes:
        given = on_gpu(3, batch, tokens)
        for _ in range(2):
            found = run(fast, *given)
        errors[f"{batch}x{tokens}"] = relative_error(found, by_hand(model, *given))
    return {"errors": errors, "passed": max(errors.values()) < CLOSE}


def serves_with(**how: Any) -> Callable[[], Record]:
    def check() -> Record:
        model = denoiser(dtype=torch.float32).cuda()
        dynamic = how.pop("dynamic", None)
        options = {"recipe": "random", "progress": False, **how}
        fast: Any = torch.compile(model, backend="permuquant", options=options, dynamic=dynamic)
        errors = []
        for size in ((2, 12), (2, 12), (2, 12), (3, 20), (3, 20)):
            given = on_gpu(1, *size)
            errors.append(relative_error(run(fast, *given), by_hand(model, *given)))
        return {"errors": errors, "passed": max(errors) < CLOSE}

    return check


def serves_in_reduce_overhead_mode() -> Record:
    model = denoiser(dtype=torch.float32).cuda()
    fast = compiled(model, mode="reduce-overhead")
    with pq_compile.calibration(fast):
        for seed in range(4):
            run(fast, *on_gpu(seed))
    errors = []
    for seed in (0, 1, 0, 2):
        found = run(fast, *on_gpu(seed)).clone()
        errors.append(relative_error(found, by_hand(model, *on_gpu(seed))))
    return {"errors": errors, "passed": max(errors) < CLOSE}


def serves_blocks_compiled_in_place() -> Record:
    model = denoiser(dtype=torch.float32, blocks=3).cuda()
    for block in model.blocks:
        block.compile(backend="permuquant", options={"recipe": "random", "progress": False})
    for _ in range(3):
        found = run(model, *on_gpu(0))
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._compiled_call_impl = None
    with served_by_hand(plain, model):
        error = relative_error(found, run(plain, *on_gpu(0)))
    return {"error": error, "passed": error < CLOSE}


def changed_weights_are_fresh() -> Record:
    errors = {}
    for release in ("backup", "keep"):
        model = denoiser(dtype=torch.float32).cuda()
        fast = compiled(model, release_weights=release)
        for _ in range(2):
            run(fast, *on_gpu(0))

        def merge(model: Any = model) -> None:
            model.blocks[0].up.weight.data += 0.1

        def load(model: Any = model) -> None:
            model.load_state_dict(denoiser(5, torch.float32).state_dict())

        def move(model: Any = model) -> None:
            model.cpu().cuda()

        for change in (merge, load, move):
            change()
            pq_compile.refresh(fast)
            for call in range(2):
                error = relative_error(run(fast, *on_gpu(4)), by_hand(model, *on_gpu(4)))
                errors[f"{release} {change.__name__} {call}"] = error
    return {"errors": errors, "passed": max(errors.values()) < CLOSE}


def two_threads() -> Record:
    model = denoiser(dtype=torch.float32).cuda()
    fast = compiled(model, recipe="permuquant", calibration_calls=4)
    own = {seed: run(model, *on_gpu(seed)) for seed in range(2)}
    answers: list[tuple[int, Tensor]] = []
    failures: list[str] = []

    def work(seed: int) -> None:
        try:
            answers.extend((seed, run(fast, *on_gpu(seed))) for _ in range(6))
        except BaseException:
            failures.append(traceback.format_exc())

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    hand = {seed: by_hand(model, *on_gpu(seed)) for seed in range(2)}
    worst = max(min(relative_error(y, own[s]), relative_error(y, hand[s])) for s, y in answers)
    return {"worst": worst, "failures": failures, "passed": not failures and worst < CLOSE}


CHECKS: dict[str, Callable[[], Record]] = {
    "linears match the cpu": linears_match_the_cpu,
    "memory is given back": memory_is_given_back,
    "every size": serves_every_size,
    "dynamic shapes": serves_with(dynamic=True),
    "weights kept": serves_with(release_weights="keep"),
    "inductor off the plan": serves_with(format="none"),
    "reduce-overhead": serves_in_reduce_overhead_mode,
    "blocks in place": serves_blocks_compiled_in_place,
    "changed weights": changed_weights_are_fresh,
    "two threads": two_threads,
    "demo matches the cpu": demo_matches_the_cpu,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("result", type=Path)
    parser.add_argument("--only", default="", help="checks whose name holds this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this checks kernels on a CUDA device, and there is none")
    records = []
    for name, check in CHECKS.items():
        if arguments.only not in name:
            continue
        torch._dynamo.reset()
        start = time.perf_counter()
        try:
            record = check()
        except Exception:
            record = {"passed": False, "error": traceback.format_exc()[-3000:]}
        record = {"check": name, **record, "took": time.perf_counter() - start}
        records.append(record)
        print(json.dumps(record)[:1500], flush=True)
        arguments.result.write_text(json.dumps(_result(records), indent=1) + "\n")
    failed = [record["check"] for record in records if not record["passed"]]
    print(f"{len(records) - len(failed)} passed, {len(failed)} failed: {', '.join(failed)}")
    return 1 if failed else 0


def _result(records: list[Record]) -> Record:
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "checks": records,
    }


if __name__ == "__main__":
    sys.exit(main())
