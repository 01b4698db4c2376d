"""What compilers make of the ops: torch.compile of the fronts, and ptxas of every shipped kernel config."""

from __future__ import annotations

import importlib.metadata
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import scamo_kernels
import torch

LEVELS = [8, 8, 8, 5, 5, 5]
ARCHITECTURES = (80, 90)
# (head_dim, heads) of the paper's models.
SHIPPED = ((64, 16), (100, 32))
# Others that fill a padded head dim wholly, or leave the least alignment.
OTHERS = ((4, 3), (36, 4), (104, 32), (128, 8))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def packed() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 9, 2, 8, generator=generator).unbind()


def test_opcheck():
    """Schema, fake tensors, autograd registration and tracing of every low-level op."""
    ops = torch.ops.scamo_kernels
    q, k, v = (x.clone().requires_grad_() for x in packed())
    cu, prefix, bounds = int32(0, 5, 9), int32(2, 0), int32(0, 1, 2, 2, 5, 1, 2, 3, 4)
    z = torch.randn(7, 6, requires_grad=True)
    torch.library.opcheck(ops.attention.default, (q, k, v, cu, prefix, True, 5, 0.3, "torch"))
    torch.library.opcheck(ops.attention.default, (q, k, v, cu, bounds, False, -1, 0.3, "torch"))
    lse = torch.zeros(0)
    plain = [x.detach() for x in (q, q, k, v, q)]
    torch.library.opcheck(ops.attention_backward.default, (*plain, lse, cu, prefix, True, 5, 0.3, "torch"))
    qkv = torch.randn(9, 3, 2, 8, requires_grad=True)
    rope = torch.randn(5, 4, 2)
    torch.library.opcheck(ops.rotary_attention.default, (qkv, rope, cu, prefix, 5, 0.3, True, "torch"))
    plain = qkv.detach(), rope, cu, prefix, 5, 0.3, False, "torch"
    torch.library.opcheck(ops.rotary_attention.default, plain)
    saved = (qkv.detach(), rope, q.detach(), lse, torch.randn(2, 9, 2, 8))
    torch.library.opcheck(
        ops.rotary_attention_backward.default, (q.detach(), *saved, cu, prefix, 5, 0.3, "torch")
    )
    torch.library.opcheck(ops.fsq_quantize.default, (z, LEVELS, "torch"))
    torch.library.opcheck(ops.fsq_quantize_backward.default, (z.detach(), z.detach(), LEVELS, "torch"))
    indices = int32(1, 2, 3)
    torch.library.opcheck(ops.fsq_dequantize.default, (indices, LEVELS, torch.float32, "torch"))
    torch.library.opcheck(ops.code_histogram.default, (indices, 5, "torch"))


def test_gradcheck():
    q, k, v = (x.double().requires_grad_() for x in packed())
    cu, prefix = int32(0, 5, 9), int32(2, 0)
    assert torch.autograd.gradcheck(
        lambda *x: scamo_kernels.prefix_causal_attention(*x, cu, prefix), (q, k, v), fast_mode=True
    )


def block(q, k, v, cu, prefix, longest):
    """A piece of a model with every differentiable op; one graph."""
    out = scamo_kernels.prefix_causal_attention(q * 2, k, v, cu, prefix, max_seqlen=longest).flatten(1)
    codes, indices = scamo_kernels.fsq_quantize(out[:, :6], LEVELS)
    counts = scamo_kernels.code_histogram(indices, 64000)
    again = scamo_kernels.fsq_dequantize(indices, LEVELS)
    return out.square().sum() + codes.sum(), counts, again


def check_compiled(backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    # Lengths change from batch to batch.
    for lengths in ((5, 4), (9, 0), (2, 3, 4)):
        cu = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
        prefix = torch.tensor([n // 2 for n in lengths]).int().to(device)
        results = []
        for function in (block, compiled):
            inputs = [x.to(device).requires_grad_() for x in packed()]
            loss, counts, codes = function(*inputs, cu, prefix, max(lengths))
            results.append([loss.detach(), counts, codes, *torch.autograd.grad(loss, inputs)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_torch_compile_traces_one_graph():
    check_compiled("aot_eager", "cpu")


@pytest.mark.slow
def test_torch_compile_with_inductor():
    check_compiled("inductor", "cpu")


@pytest.mark.gpu
def test_torch_compile_on_a_gpu():
    check_compiled("inductor", "cuda")


def attention_case(arch, dtype, head_dim, heads, prefix, config, rope=False, keep=False) -> dict:
    """keep: the forward keeps the turned q and k; a backward's own config says whether it reads them."""
    from scamo_kernels import _attention_triton as kernels

    data = f"*{dtype}"
    signature = dict.fromkeys(("q", "k", "v", "out"), data)
    signature |= {"cu_seqlens": "*i32", "bounds": "*i32", "lse": "*fp32", "tokens": "i32", "qk_scale": "fp32"}
    stride = heads * head_dim
    strides = dict.fromkeys(("STRIDE_Q", "STRIDE_K", "STRIDE_V"), 3 * stride if rope else stride)
    constants = {"HEADS": heads, "D": head_dim, "BD": kernels.padded_head_dim(head_dim)}
    constants |= {"PREFIX": prefix, "ROPE": rope}
    if rope:
        signature |= {"rope": "*fp32"}
    else:
        constants |= {"rope": None}
    stages = 1
    if isinstance(config, kernels.ForwardConfig):
        kernel = "forward_kernel"
        signature |= {"tiles": "i32"} | (dict.fromkeys(("turned_q", "turned_k"), data) if keep else {})
        constants |= {"BM": config.queries, "BN": config.keys, "KEEP": keep}
        constants |= {} if keep else {"turned_q": None, "turned_k": None}
        stages = config.stages
    else:
        signature |= dict.fromkeys(("grad", "grad_q", "grad_k", "grad_v"), data) | {"scale": "fp32"}
        constants |= {"STRIDE_G": strides["STRIDE_V"]}
        turns = False
        if isinstance(config, kernels.SampleConfig):
            kernel, turns = "sample_backward_kernel", config.turns
            constants |= {"BN": config.keys, "BM": config.queries, "TURN": rope and turns}
        else:
            kernel, stages = "backward_kernel", config.stages
            signature |= {"key_tiles": "i32", "query_tiles": "i32"}
            constants |= {"KV_BN": config.kv_keys, "KV_BM": config.kv_queries}
            constants |= {"Q_BM": config.q_queries, "Q_BN": config.q_keys}
        if rope and not turns:
            strides |= {"STRIDE_Q": stride, "STRIDE_K": stride}
    return {
        "kernel": f"_attention_triton.{kernel}",
        "arch": arch,
        "signature": signature,
        "constants": strides | constants,
        "warps": config.warps,
        "stages": stages,
    }


def attention_cases(shapes, dtypes, prefixes, rope=False) -> list[dict]:
    """Every distinct config of the table for these shapes, as a training step and inference launch them."""
    from scamo_kernels import _attention_triton as kernels

    cases = []
    for arch in ARCHITECTURES:
        for dtype, (head_dim, heads), prefix in itertools.product(dtypes, shapes, prefixes):
            key = arch, "single" if dtype == "fp32" else "half", kernels.padded_head_dim(head_dim)
            launches = []
            forwards = kernels.ROTARY_FORWARD if rope else kernels.FORWARD
            for forward, backward in zip(forwards[key], kernels.BACKWARD[key], strict=True):
                turns = isinstance(backward, kernels.SampleConfig) and backward.turns
                launches += [(forward, False), (forward, rope and not turns), (backward, False)]
            for config, keep in dict.fromkeys(launches):
                cases.append(attention_case(arch, dtype, head_dim, heads, prefix, config, rope, keep))
    return cases


def elementwise_cases(levels, dtypes) -> list[dict]:
    from scamo_kernels import _fsq_triton as fsq
    from scamo_kernels import _histogram_triton as histogram

    constants = {name: list(values) for name, values in fsq.constants(levels).items()}
    shape = {"D": len(levels), "BD": 1 << (len(levels) - 1).bit_length(), "BLOCK": fsq.BLOCK}
    cases = []
    for arch in ARCHITECTURES:
        for dtype in dtypes:
            kernels = {
                "quantize": (
                    {"z": f"*{dtype}", "codes": f"*{dtype}", "indices": "*i32"},
                    ("HALF", "OFFSET", "SHIFT", "WIDTH", "BASIS", "STEP"),
                    {"NATIVE": True, "SCALE": 1.0, "STAGES": 1},
                ),
                "quantize_backward": (
                    {"grad": f"*{dtype}", "z": f"*{dtype}", "grad_z": f"*{dtype}"},
                    ("HALF", "OFFSET", "SHIFT", "WIDTH", "SLOPE", "STEP"),
                    {"NATIVE": True, "SCALE": 1.0, "STAGES": 1},
                ),
                "dequantize": ({"indices": "*i32", "codes": f"*{dtype}"}, ("LEVELS", "BASIS"), {"STAGES": 1}),
            }
            for name, (signature, names, rest) in kernels.items():
                cases.append(
                    {
                        "kernel": f"_fsq_triton.{name}_kernel",
                        "arch": arch,
                        "signature": signature | {"rows": "i32"},
                        "constants": shape | {n: constants[n] for n in names} | rest,
                        "warps": fsq.WARPS,
                        "stages": 1,
                    }
                )
        cases.append(
            {
                "kernel": "_histogram_triton.histogram_kernel",
                "arch": arch,
                "signature": {"indices": "*i32", "counts": "*i64", "count": "i32", "codebook_size": "i32"},
                "constants": {"BLOCK": histogram.BLOCK},
                "warps": histogram.WARPS,
                "stages": 1,
            }
        )
    return cases


def compile_all(cases: list[dict], environment) -> list[dict]:
    """Results of compile_gate.py, which needs a process without the interpreter."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_gate.py")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=environment(),
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def record(results: list[tuple[dict, dict]]) -> None:
    """Append to the file that SCAMO_GATE_RECORDS names; `benchmarks/report.py gate` makes a table of it."""
    if path := os.environ.get("SCAMO_GATE_RECORDS"):
        version = importlib.metadata.version("triton")
        with Path(path).open("a", encoding="utf-8") as file:
            for case, result in results:
                file.write(json.dumps({"case": case, "result": result, "triton": version}) + "\n")


def gate(cases: list[dict], environment) -> list[tuple[dict, dict]]:
    """Compile all; nothing may spill, run out of registers or ask for more shared memory than there is."""
    pytest.importorskip("triton")
    results = list(zip(cases, compile_all(cases, environment), strict=True))
    record(results)
    faults = []
    for case, result in results:
        # Per block: 99 KB on sm_86 and sm_89, which the sm_80 table also serves; 227 KB on sm_90.
        memory = (99 if case["arch"] == 80 else 227) * 1024
        if result["stack"] or result["spills"] or result["registers"] > 255 or result["shared"] > memory:
            faults.append(
                (case["kernel"], case["arch"], case["signature"], case["constants"], case["warps"], result)
            )
    assert not faults, "\n".join(map(str, faults))
    return results


def check_attention(cases, environment) -> None:
    for case, result in gate(cases, environment):
        half = "bf16" in case["signature"]["q"]
        assert result["registers"] <= (240 if half else 255), (case, result)
        assert result["tensor_cores"] > 0, (case, result)
        if case["constants"]["D"] == 64 and half and case["constants"]["PREFIX"]:
            # 128-bit loads for all of q, k, v, out, grad and the table; cu_seqlens, bounds and lse: 32-bit.
            backward = case["kernel"].endswith("backward_kernel")
            narrow = result["loads"] - result["wide_loads"]
            assert result["wide_loads"] > 0
            assert narrow <= (64 if backward else 3), (case, result)


def test_attention_compiles_for_the_paper_s_models(environment):
    check_attention(attention_cases(SHIPPED, ["bf16"], [True]), environment)


@pytest.mark.slow
def test_rotary_attention_compiles_for_the_paper_s_models(environment):
    check_attention(attention_cases(SHIPPED, ["bf16"], [True], rope=True), environment)


def test_elementwise_kernels_compile(environment):
    gate(elementwise_cases(LEVELS, ["bf16"]), environment)


@pytest.mark.slow
def test_attention_compiles_for_other_shapes(environment):
    check_attention(attention_cases(OTHERS, ["bf16"], [True]), environment)


@pytest.mark.slow
def test_attention_compiles_with_bounds(environment):
    check_attention(attention_cases(SHIPPED, ["bf16"], [False]), environment)


@pytest.mark.slow
def test_attention_compiles_in_float32(environment):
    check_attention(attention_cases((*SHIPPED, (128, 8)), ["fp32"], [True]), environment)


@pytest.mark.slow
def test_rotary_attention_compiles_for_other_shapes(environment):
    check_attention(attention_cases(OTHERS, ["bf16"], [True], rope=True), environment)


@pytest.mark.slow
def test_rotary_attention_compiles_in_float32(environment):
    check_attention(attention_cases((*SHIPPED, (128, 8)), ["fp32"], [True], rope=True), environment)


@pytest.mark.slow
def test_elementwise_kernels_compile_for_other_levels(environment):
    for levels in ([8, 6, 5], [7, 5, 5, 5, 5]):
        gate(elementwise_cases(levels, ["fp16", "fp32"]), environment)


def decode_cases(shapes, dtypes) -> list[dict]:
    """One split, several, and their sum; caches as (B, H, capacity, D)."""
    from scamo_kernels import _decode_triton as kernels

    cases = []
    for arch, dtype, (head_dim, heads) in itertools.product(ARCHITECTURES, dtypes, shapes):
        size = 4 if dtype == "fp32" else 2
        padded = kernels.padded_head_dim(head_dim)
        config = kernels.CONFIGS[size, padded]
        signature = dict.fromkeys(("qkv", "cache_k", "cache_v", "out"), f"*{dtype}")
        signature |= dict.fromkeys(("rope", "partial", "state"), "*fp32") | {"lengths": "*i32"}
        signature |= dict.fromkeys(("capacity", "splits"), "i32")
        strides = dict.fromkeys(("row_k", "head_k", "row_v", "head_v"), "i32") | {"qk_scale": "fp32"}
        shape = {"HEADS": heads, "D": head_dim, "BD": padded, "SPLIT": config.split}
        layout = {"STRIDE_ROW": 3 * heads * head_dim, "STRIDE_PART": heads * head_dim}
        layout |= dict.fromkeys(("STRIDE_HEAD", "STRIDE_K", "STRIDE_V", "STRIDE_ROPE"), head_dim)
        layout |= {"UNIT": math.gcd(16 // size, head_dim), "BN": config.keys}
        common = {"arch": arch, "warps": config.warps, "stages": 1}
        for whole in (True, False):
            constants = shape | layout | {"WHOLE": whole}
            integers = {"lengths": "*i64" if whole else "*i32"}
            attend = {"kernel": "_decode_triton.decode_kernel", "signature": signature | strides | integers}
            cases.append(common | attend | {"constants": constants})
        combine = {"kernel": "_decode_triton.combine_kernel", "signature": signature}
        cases.append(common | combine | {"constants": shape | {"BS": config.splits}})
    return cases


def check_decode(cases, environment) -> None:
    """Three blocks or more per multiprocessor; the caches in the widest loads that the head dim allows."""
    for case, result in gate(cases, environment):
        assert result["registers"] * 32 * case["warps"] <= 65536 // 3, (case, result)
        if case["kernel"].endswith("decode_kernel"):
            c = case["constants"]
            tiles = 2 * c["BN"] * c["BD"] // (c["UNIT"] * 32 * case["warps"])
            # Beside the tiles: the lengths, and q, k, v and the table once.
            assert result["loads"] <= max(tiles, 2) + 10, (case, result)
            if c["UNIT"] * (4 if case["signature"]["cache_k"] == "*fp32" else 2) == 16:
                assert result["wide_loads"] >= max(tiles, 2), (case, result)


def test_decode_compiles_for_the_paper_s_models(environment):
    check_decode(decode_cases(SHIPPED, ["bf16"]), environment)


@pytest.mark.slow
def test_decode_compiles_for_other_shapes(environment):
    check_decode(decode_cases(OTHERS, ["bf16"]) + decode_cases((*SHIPPED, (128, 8)), ["fp32"]), environment)


def surrounding_cases(widths, hiddens, classes, dtypes) -> list[dict]:
    """What surrounds attention: normalisation, SwiGLU's gate and the loss."""
    from scamo_kernels import _linear_cross_entropy_triton as loss
    from scamo_kernels import _rms_norm_triton as norm
    from scamo_kernels import _swiglu_triton as swiglu

    cases = []

    def case(kernel, signature, constants, warps):
        launch = {"stages": 3, "warps": warps, "itemsize": 4 if data == "*fp32" else 2}
        cases.append(launch | {"kernel": kernel, "signature": signature, "constants": constants})

    for data in (f"*{dtype}" for dtype in dtypes):
        forward = dict.fromkeys(("x", "residual", "weight", "out", "total"), data)
        forward |= {"scale": "*fp32", "rows": "i32", "eps": "fp32"}
        backward = dict.fromkeys(("grad", "grad_total", "total", "weight", "dx"), data)
        backward |= {"scale": "*fp32", "partial": "*fp32"}
        backward |= dict.fromkeys(("rows", "blocks", "programs"), "i32")
        for width, add in itertools.product(widths, (False, True)):
            constants, warps = norm.shape(width)
            case("_rms_norm_triton.forward_kernel", forward, constants | {"ADD": add}, warps)
            case("_rms_norm_triton.backward_kernel", backward, constants | {"ADD": add}, warps)
        signature = {"partial": "*fp32", "grad_weight": data, "count": "i32"}
        constants = {"C": widths[0], "BR": norm.SUM_ROWS, "BC": norm.SUM_COLUMNS}
        case("_rms_norm_triton.sum_kernel", signature, constants, norm.SUM_WARPS)
        signature = dict.fromkeys(("grad", "gate_up", "grad_in", "out"), data) | {"rows": "i32"}
        for hidden, kernel in itertools.product(hiddens, ("forward", "backward")):
            constants = swiglu.shape(hidden)
            case(f"_swiglu_triton.{kernel}_kernel", signature, constants, swiglu.WARPS)
        signature = {"logits": data, "targets": "*i64", "losses": "*fp32"}
        for count, train in itertools.product(classes, (False, True)):
            columns, warps = loss.block(count)
            constants = {"V": count, "STRIDE": -(-count // 64) * 64, "BLOCK": columns, "TRAIN": train}
            case("_linear_cross_entropy_triton.softmax_loss_kernel", signature, constants, warps)
    return [case | {"arch": arch} for arch in ARCHITECTURES for case in cases]


def check_surrounding(cases, environment) -> None:
    """Few registers, and every tile in 128-bit loads where its rows are aligned so."""
    for case, result in gate(cases, environment):
        assert result["registers"] <= 128, (case, result)
        c, size, threads = case["constants"], case["itemsize"], 32 * case["warps"]
        if "H" in c and c["H"] * size % 16 == 0:
            assert result["wide_loads"] == result["loads"], (case, result)
        elif "ADD" in c and c["C"] * size % 16 == 0:
            # Beside the tiles only the weight, where few of its elements meet a thread, and the scale.
            tiles = (1 if "forward" in case["kernel"] else 2) + c["ADD"]
            assert result["wide_loads"] >= tiles * c["BR"] * c["BC"] * size // (16 * threads), (case, result)
        elif "V" in c and c["V"] > c["BLOCK"]:
            passes = 1 + c["TRAIN"]
            assert result["wide_loads"] >= passes * c["BLOCK"] * size // (16 * threads), (case, result)


def test_what_surrounds_attention_compiles(environment):
    check_surrounding(surrounding_cases((1024, 3200), (2816,), (65537,), ["bf16"]), environment)


@pytest.mark.slow
def test_what_surrounds_attention_compiles_for_other_shapes(environment):
    shapes = (1, 100, 8192), (100,), (241, 16384)
    check_surrounding(surrounding_cases(*shapes, ["bf16", "fp32"]), environment)
