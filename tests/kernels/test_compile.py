"""What compilers make of the ops: torch.compile of the fronts, and ptxas of every shipped kernel config."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import scamo_kernels
import torch
from scamo_kernels import reference
from scamo_kernels._dispatch import LIBRARY, NAME

LEVELS = [8, 8, 8, 5, 5, 5]
ARCHITECTURES = (80, 90)
# What the paper's models take is compiled for sm_100 too.
MORE_ARCHITECTURES = (*ARCHITECTURES, 100)
# (head_dim, heads) of the paper's models.
SHIPPED = ((64, 16), (100, 32))
# Others that fill a padded head dim wholly, or leave the least alignment.
OTHERS = ((4, 3), (36, 4), (104, 32), (128, 8))


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def normal(*shape: int, grad: bool = False) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape))).requires_grad_(grad)


def low_level_calls() -> dict[str, list[tuple]]:
    """Arguments for every registered op, by its name."""
    q, k, v = (normal(9, 2, 8, grad=True) for _ in "qkv")
    grad, qkv, rope = normal(9, 2, 8), normal(9, 3, 2, 8, grad=True), normal(5, 4, 2)
    cu, prefix, bounds = int32(0, 5, 9), int32(2, 0), int32(0, 1, 2, 2, 5, 1, 2, 3, 4)
    plain, lse = [x.detach() for x in (q, q, k, v, q)], torch.zeros(0)
    causal, general = (cu, prefix, True, 5, 0.3, "torch"), (cu, bounds, False, -1, 0.3, "torch")
    rotary = cu, prefix, 5, 0.3
    saved = qkv.detach(), rope, grad, lse, normal(2, 9, 2, 8)
    caches = normal(2, 2, 5, 8), normal(2, 2, 5, 8)
    z, codes = normal(7, 6, grad=True), normal(7, 6)
    # hidden, w_in, b_in, w_out, b_out
    maps = [normal(*shape, grad=True) for shape in ((7, 12), (6, 12), (6,), (12, 6), (12,))]
    project = normal(7, 12), *(maps[i].detach() for i in (0, 1, 3)), codes
    x, residual = normal(5, 8, grad=True), normal(5, 8, grad=True)
    weight, rows, scale = normal(8, grad=True), normal(5, 8), torch.ones(5)
    hidden, head, targets = normal(5, 4, grad=True), normal(9, 4, grad=True), torch.tensor([0, 8, 3, 3, 1])
    half = hidden.detach().bfloat16().requires_grad_(), head.detach().bfloat16().requires_grad_()
    return {
        "attention": [(q, k, v, *causal), (q, k, v, *general)],
        "attention_backward": [(*plain, lse, *causal), (*plain, lse, *general)],
        "rotary_attention": [(qkv, rope, *rotary, True, "torch"), (saved[0], rope, *rotary, False, "torch")],
        "rotary_attention_backward": [(grad, *saved, *rotary, "torch")],
        "decode_attention": [(normal(2, 3, 2, 8), *caches, int32(4, 0), normal(5, 8), 0.3, "torch")],
        "bsq_quantize": [(z, "torch"), (z.detach(), "torch")],
        "bsq_quantize_backward": [(codes, codes, "torch")],
        "bsq_dequantize": [(int32(1, 2, 3), 6, torch.float32, "torch"), (int32(-1), 32, torch.half, "torch")],
        "fsq_quantize": [(z, LEVELS, "torch"), (z, LEVELS, "torch", "mentzer", 3)],
        "fsq_quantize_backward": [
            (codes, codes, LEVELS, "torch"),
            (codes, codes, LEVELS, "torch", "sigmoid", 2),
        ],
        "fsq_dequantize": [
            (int32(1, 2, 3), LEVELS, torch.float32, "torch"),
            (int32(1, 2, 3, 4).view(2, 2), LEVELS, torch.float32, "torch", 2),
        ],
        "fsq_project": [(*maps, LEVELS, "sigmoid", "torch")],
        "fsq_project_backward": [(*project, LEVELS, "tanh", "torch")],
        "code_histogram": [(int32(1, 2, 3), 5, "torch")],
        "linear_cross_entropy": [
            (hidden, head, targets, 2, True, True, "torch"),
            (hidden.detach(), head, targets, 2, False, True, "torch"),
            (hidden.detach(), head.detach(), targets, 2, False, False, "torch"),
            (*half, targets, 0, True, True, "torch"),
        ],
        "rms_norm": [(x, weight, 1e-5, "torch")],
        "add_rms_norm": [(x, residual, weight, 1e-5, "torch")],
        "rms_norm_backward": [
            (rows, total, rows, weight.detach(), scale, "torch") for total in (None, residual.detach())
        ],
        "swiglu": [(normal(5, 12, grad=True), "torch")],
        "swiglu_backward": [(normal(5, 6), normal(5, 12), "torch")],
    }


@pytest.mark.parametrize("name", sorted(name.removeprefix(NAME) for name in LIBRARY._op_defs))
def test_opcheck(name):
    """Schema, fake tensors, autograd registration and tracing of every registered op."""
    for arguments in low_level_calls()[name]:
        torch.library.opcheck(getattr(torch.ops.scamo_kernels, name).default, arguments)


def test_gradcheck():
    q, k, v = (normal(9, 2, 8, grad=True) for _ in "qkv")
    cu, prefix = int32(0, 5, 9), int32(2, 0)
    assert torch.autograd.gradcheck(
        lambda *x: scamo_kernels.prefix_causal_attention(*x, cu, prefix),
        [x.detach().double().requires_grad_() for x in (q, k, v)],
        fast_mode=True,
    )


def block(x, w_qkv, w_norm, w_up, w_in, b_in, w_out, b_out, head, rope, cache, cu, prefix, bounds, longest):
    """A model with every op, in one graph: a scalar to differentiate, and what has no gradient."""
    normed = scamo_kernels.rms_norm(x, w_norm)
    qkv = (normed @ w_qkv).view(-1, 3, 2, 8)
    q, k, v = qkv.unbind(1)
    branch = scamo_kernels.rotary_prefix_attention(qkv, rope, cu, prefix, max_seqlen=longest)
    branch = branch + scamo_kernels.prefix_causal_attention(q, k, v, cu, prefix, max_seqlen=longest)
    branch = branch + scamo_kernels.bounded_attention(q, k, v, cu, bounds, max_seqlen=longest)
    normed, total = scamo_kernels.add_rms_norm(branch.flatten(1), x, w_norm)
    hidden = total + scamo_kernels.swiglu(normed @ w_up)
    codes, indices = scamo_kernels.fsq_quantize(hidden[:, :6], LEVELS)
    grouped, two = scamo_kernels.fsq_quantize_grouped(hidden[:, :12], LEVELS, 2)
    residual, three = scamo_kernels.fsq_quantize_residual(hidden[:, :6], LEVELS, 3)
    corners, words = scamo_kernels.bsq_quantize(hidden[:, :5])
    out, _ = scamo_kernels.fsq_project(hidden, w_in, b_in, w_out, b_out, LEVELS)
    targets = indices % head.shape[0]
    loss, losses = scamo_kernels.linear_cross_entropy(hidden + out, head, targets)
    with torch.no_grad():
        step = scamo_kernels.decode_attention(qkv[:2].detach(), *cache, prefix[:2], rope)
    others = (
        scamo_kernels.fsq_dequantize(indices, LEVELS),
        scamo_kernels.fsq_dequantize_grouped(two, LEVELS),
        scamo_kernels.fsq_dequantize_residual(three, LEVELS),
        scamo_kernels.code_histogram(indices, 64000),
        words,
        scamo_kernels.bsq_dequantize(words, 5),
    )
    loss = loss + codes.sum() + grouped.square().sum() + residual.sum() + corners.sum()
    return loss, losses, step, *cache, *others


def check_compiled(backend: str, device: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    weights = [normal(9, 16), normal(16, 48), normal(16), normal(16, 32), normal(6, 16), normal(6)]
    weights += [normal(16, 6), normal(16), normal(33, 16)]
    # Lengths change from batch to batch.
    for lengths in ((5, 4), (9, 0), (2, 3, 4)):
        cu = torch.tensor([0, *lengths]).cumsum(0)
        prefix = torch.tensor([n // 2 for n in lengths])
        bounds = torch.cat([torch.arange(1, n + 1) for n in lengths])
        rest = [x.int().to(device) for x in (cu, prefix, bounds)]
        results = []
        for function in (block, compiled):
            leaves = [x.to(device).requires_grad_() for x in weights]
            cache = normal(2, 2, 2, 9, 8).to(device).unbind()
            rope = normal(9, 4, 2).to(device)
            loss, *others = function(*leaves, rope, cache, *rest, max(lengths))
            results.append([loss.detach(), *others, *torch.autograd.grad(loss, leaves)])
        for a, b in zip(*results, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_compiled_block_has_every_op():
    assert set(scamo_kernels.__all__) <= set(block.__code__.co_names)


def test_torch_compile_traces_one_graph():
    check_compiled("aot_eager", "cpu")


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler on the CPU"
)
def test_torch_compile_with_inductor():
    check_compiled("inductor", "cpu")


@pytest.mark.gpu
def test_torch_compile_on_a_gpu():
    check_compiled("inductor", "cuda")


# Heads of 100 can be stored at 104.
ATTENTION = (*SHIPPED, (104, 32))


def attention_case(arch, dtype, head_dim, heads, prefix, config, rope=False, keep=False, tiles=1) -> dict:
    """keep: the forward keeps the turned q and k; a backward's own config says whether it reads them.

    tiles: key tiles of a program per (head, sample).
    """
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
            kernel, turns, stages = "sample_backward_kernel", config.turns, config.stages
            constants |= {"BN": config.keys, "BM": config.queries, "TURN": rope and turns, "TILES": tiles}
            signature |= {"sums": "*fp32"} if tiles > 1 else {}
            constants |= {} if tiles > 1 else {"sums": None}
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
        "registers": getattr(config, "registers", None),
    }


def attention_cases(shapes, dtypes, prefixes, rope=False, architectures=ARCHITECTURES) -> list[dict]:
    """Every distinct config of the table for these shapes, as a training step and inference launch them."""
    from scamo_kernels import _attention_triton as kernels

    cases = []
    for arch in architectures:
        for dtype, (head_dim, heads), prefix in itertools.product(dtypes, shapes, prefixes):
            launches = []
            rows = kernels.table(arch, "single" if dtype == "fp32" else "half", head_dim, rope)
            for (forward, backward), length in zip(rows, kernels.LENGTHS, strict=True):
                sample = isinstance(backward, kernels.SampleConfig)
                keep = rope and not (sample and backward.turns)
                launches += [(forward, False, 1), (forward, keep, 1)]
                launches.append((backward, False, -(-length // backward.keys) if sample else 1))
            for config, keep, tiles in dict.fromkeys(launches):
                cases.append(attention_case(arch, dtype, head_dim, heads, prefix, config, rope, keep, tiles))
    return cases


def fsq_cases(levels, dtypes, architectures=ARCHITECTURES, bound="tanh", stages=1) -> list[dict]:
    from scamo_kernels import _fsq_triton as kernels

    names = "HALF", "OFFSET", "SHIFT", "WIDTH", "STEP"
    flags = {"NATIVE": True, "SCALE": reference.fsq_scale(bound)}
    cases = []
    for arch, data in itertools.product(architectures, (f"*{dtype}" for dtype in dtypes)):
        for kernel, signature, picked, rest in (
            ("quantize", {"z": data, "codes": data, "indices": "*i32"}, (*names, "BASIS"), flags),
            ("quantize_backward", {"grad": data, "z": data, "grad_z": data}, (*names, "SLOPE"), flags),
            ("dequantize", {"indices": "*i32", "codes": data}, ("LEVELS", "BASIS"), {}),
        ):
            values = {k: list(v) for k, v in kernels.pick(levels, bound, *picked).items()}
            cases.append(
                {
                    "kernel": f"_fsq_triton.{kernel}_kernel",
                    "arch": arch,
                    "signature": signature | {"rows": "i32"},
                    "constants": values | rest | kernels.shape(levels, stages) | {"STAGES": stages},
                    "warps": kernels.WARPS,
                    "stages": 1,
                }
            )
    return cases


def bsq_cases(channels, dtypes, architectures=ARCHITECTURES) -> list[dict]:
    from scamo_kernels import _bsq_triton as kernels

    cases = []
    for arch, d, data in itertools.product(architectures, channels, (f"*{dtype}" for dtype in dtypes)):
        for kernel, signature in (
            ("quantize", {"z": data, "codes": data, "bits": "*i32"}),
            ("quantize_backward", {"grad": data, "z": data, "grad_z": data}),
            ("dequantize", {"bits": "*i32", "codes": data}),
        ):
            cases.append(
                {
                    "kernel": f"_bsq_triton.{kernel}_kernel",
                    "arch": arch,
                    "signature": signature | {"rows": "i32"},
                    "constants": kernels.shape(d),
                    "warps": kernels.WARPS,
                    "stages": 1,
                }
            )
    return cases


def histogram_cases(architectures) -> list[dict]:
    from scamo_kernels import _histogram_triton as kernels

    signature = {"indices": "*i32", "counts": "*i64", "count": "i32", "codebook_size": "i32"}
    return [
        {
            "kernel": "_histogram_triton.histogram_kernel",
            "arch": arch,
            "signature": signature,
            "constants": {"BLOCK": kernels.BLOCK},
            "warps": kernels.WARPS,
            "stages": 1,
        }
        for arch in architectures
    ]


def compile_all(cases: list[dict], environment) -> list[dict]:
    """Results of compile_gate.py, which needs a process without the interpreter.

    SCAMO_GATE_TRITON is a folder with another Triton to compile with (pip install --target).
    """
    variables = environment()
    if other := os.environ.get("SCAMO_GATE_TRITON"):
        assert (Path(other) / "triton" / "__init__.py").is_file(), f"SCAMO_GATE_TRITON={other}: no triton"
        variables["PYTHONPATH"] = os.pathsep.join([os.path.abspath(other), variables["PYTHONPATH"]])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_gate.py")],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=variables,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def record(results: list[tuple[dict, dict]]) -> None:
    """Append to the file that SCAMO_GATE_RECORDS names; `benchmarks/report.py gate` makes a table of it."""
    if path := os.environ.get("SCAMO_GATE_RECORDS"):
        with Path(path).open("a", encoding="utf-8") as file:
            for case, result in results:
                file.write(json.dumps({"case": case, "result": result}) + "\n")


def gate(cases: list[dict], environment) -> list[tuple[dict, dict]]:
    """Compile all: no spills, no stack, at most 240 registers, no more shared memory than there is."""
    pytest.importorskip("triton")
    results = list(zip(cases, compile_all(cases, environment), strict=True))
    record(results)
    faults = []
    for case, result in results:
        # Per block: 99 KB on sm_86 and sm_89, which the sm_80 table also serves; 227 KB on sm_90 and sm_100.
        memory = (99 if case["arch"] == 80 else 227) * 1024
        spilt = result["stack"] or result["spills"]
        if spilt or result["registers"] > 240 or result["shared"] > memory:
            faults.append(
                (case["kernel"], case["arch"], case["signature"], case["constants"], case["warps"], result)
            )
    assert not faults, "\n".join(map(str, faults))
    return results


def tile_loads(case, rows: int, columns: int, size: int, width: int = 16) -> int:
    """Loads of `width` bytes in a thread for a tile; 0 where it has less for a thread, narrower ones then."""
    return rows * columns * size // (width * 32 * case["warps"])


def attention_loads(case) -> tuple[int, int]:
    """At least so many loads of 16 and of 8 bytes: of each tile where the kernel's text loads it.

    Heads whose bytes are no multiple of 16, such as 100 in bf16, have the 8-byte ones. Stages add to them.
    """
    c, size = case["constants"], 4 if case["signature"]["q"] == "*fp32" else 2
    width = math.gcd(16, c["D"] * size)

    def heads(rows: int) -> int:
        return tile_loads(case, rows, c["BD"], size, width)

    def angles(rows: int) -> int:
        return tile_loads(case, rows, c["BD"], 4) if c["ROPE"] else 0

    if case["kernel"].endswith(".forward_kernel"):
        # Two loops, of full and of partial key tiles.
        data = (1 + c["KEEP"]) * heads(c["BM"]) + 4 * heads(c["BN"])
        table = angles(c["BM"]) + 2 * angles(c["BN"])
    elif case["kernel"].endswith(".backward_kernel"):
        # Two loops over (q, grad, out) for a tile of (k, v), and the other way round.
        data = 2 * heads(c["KV_BN"]) + 6 * heads(c["KV_BM"]) + 3 * heads(c["Q_BM"]) + 4 * heads(c["Q_BN"])
        table = angles(c["KV_BN"]) + angles(c["Q_BM"])
    else:
        data = c["TILES"] * (2 * heads(c["BN"]) + 3 * heads(c["BM"]))
        table = c["TILES"] * angles(c["BN"])
    return (table + data, 0) if width == 16 else (table, data if width == 8 else 0)


def check_attention(cases, environment) -> None:
    """Tensor cores; every tile in the widest loads that the head dim allows."""
    for case, result in gate(cases, environment):
        assert result["tensor_cores"] > 0, (case, result)
        wide, half = attention_loads(case)
        assert result["wide_loads"] >= wide, (wide, case, result)
        assert result["loads_of_8_bytes"] >= half, (half, case, result)
        head_bytes = case["constants"]["D"] * (4 if case["signature"]["q"] == "*fp32" else 2)
        if head_bytes % 16 == 0 and case["constants"]["PREFIX"]:
            # All but cu_seqlens, bounds and lse, 32 bits each.
            most = 3
            if case["kernel"].endswith("backward_kernel"):
                # On sm_100 a thread holds more rows, each with its lse.
                most = 80 if case["arch"] == 100 else 40
            assert result["loads"] - result["wide_loads"] <= most, (case, result)


@pytest.mark.slow
def test_attention_loads_tell_narrow_ones(environment):
    """Heads of 100 in bf16, unpadded, would not pass for heads of 104: their loads have 8 bytes."""
    from scamo_kernels import _attention_triton as kernels

    for config in (kernels.ForwardConfig(64, 64, 8, 2), kernels.SampleConfig(64, 64, 8, True)):
        narrow, wide = (attention_case(90, "bf16", d, 32, True, config, rope=True) for d in (100, 104))
        (_, found), (_, good) = gate([narrow, wide], environment)
        least, none = attention_loads(wide)
        assert none == 0
        assert found["wide_loads"] < least <= good["wide_loads"]
        assert found["loads_of_8_bytes"] >= attention_loads(narrow)[1] > 0


def test_attention_tables_are_whole():
    """A config for every length; a program per (head, sample) takes one tile of keys or two."""
    pytest.importorskip("triton")
    from scamo_kernels import _attention_triton as kernels

    shapes = itertools.product((80, 90, 100), ("half", "single"), range(4, 129, 4), (False, True))
    for arch, kind, head_dim, rope in shapes:
        rows = kernels.table(arch, kind, head_dim, rope)
        for (_, backward), length in zip(rows, kernels.LENGTHS, strict=True):
            if isinstance(backward, kernels.SampleConfig):
                assert length <= 2 * backward.keys, (arch, kind, head_dim, rope)


def test_attention_compiles_for_the_paper_s_models(environment):
    check_attention(attention_cases(ATTENTION, ["bf16"], [True], False, MORE_ARCHITECTURES), environment)


@pytest.mark.slow
def test_rotary_attention_compiles_for_the_paper_s_models(environment):
    check_attention(attention_cases(ATTENTION, ["bf16"], [True], True, MORE_ARCHITECTURES), environment)


def check_elementwise(cases, environment) -> None:
    """Rows of channels: as few loads as the rows' alignment allows, of 128 bits where it is 16 bytes."""
    for case, result in gate(cases, environment):
        c = case["constants"]
        if "quantize" in case["kernel"] and "dequantize" not in case["kernel"]:
            tensors = 2 if "backward" in case["kernel"] else 1
            size = 4 if case["signature"]["z"] == "*fp32" else 2
            width = math.gcd(16, c["D"] * size)
            most = tensors * tile_loads(case, c["BLOCK"], c["BD"], size, width)
            assert result["loads"] <= most, (most, case, result)
            if width == 16:
                assert result["wide_loads"] == result["loads"], (case, result)
        elif "histogram" in case["kernel"]:
            assert result["loads"] <= tile_loads(case, c["BLOCK"], 1, 4, 4), (case, result)


def test_fsq_and_histogram_compiles(environment):
    cases = fsq_cases(LEVELS, ["bf16"], MORE_ARCHITECTURES) + histogram_cases(MORE_ARCHITECTURES)
    check_elementwise(cases, environment)


def test_bsq_compiles_as_shipped(environment):
    check_elementwise(bsq_cases([24], ["bf16", "fp32"], MORE_ARCHITECTURES), environment)


@pytest.mark.slow
def test_bsq_compiles_for_other_channels(environment):
    check_elementwise(bsq_cases([1, 7, 18, 32], ["bf16", "fp32"]), environment)


@pytest.mark.slow
def test_attention_compiles_for_other_shapes(environment):
    check_attention(attention_cases(OTHERS, ["bf16"], [True]), environment)


@pytest.mark.slow
def test_attention_compiles_with_bounds(environment):
    check_attention(attention_cases(ATTENTION, ["bf16"], [False]), environment)


@pytest.mark.slow
def test_attention_compiles_in_float32(environment):
    shapes = *SHIPPED, (128, 8)
    check_attention(attention_cases(shapes, ["fp32"], [True], False, MORE_ARCHITECTURES), environment)


@pytest.mark.slow
def test_rotary_attention_compiles_for_other_shapes(environment):
    check_attention(attention_cases(OTHERS, ["bf16"], [True], rope=True), environment)


@pytest.mark.slow
def test_rotary_attention_compiles_in_float32(environment):
    shapes = *SHIPPED, (128, 8)
    check_attention(attention_cases(shapes, ["fp32"], [True], True, MORE_ARCHITECTURES), environment)


@pytest.mark.slow
def test_fsq_compiles_for_other_levels(environment):
    """Few channels, thirty of them, and stages."""
    cases = fsq_cases([8, 6, 5], ["fp16", "fp32"]) + fsq_cases([7, 5, 5, 5, 5], ["fp16", "fp32"])
    cases += fsq_cases([2] * 30, ["bf16"], bound="sigmoid")
    cases += fsq_cases(LEVELS, ["bf16"], bound="mentzer", stages=4)
    check_elementwise(cases, environment)


def fsq_project_cases(dtypes, shapes, architectures=ARCHITECTURES) -> list[dict]:
    """dtypes: of the hidden states and of the weights; shapes: width and levels."""
    from scamo_kernels import _fsq_project_triton as kernels
    from scamo_kernels._fsq_triton import pick

    torch_dtypes = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    names = "HALF", "OFFSET", "SHIFT", "WIDTH"
    cases = []
    for arch, (data, weight), (width, levels) in itertools.product(architectures, dtypes, shapes):
        signature = dict.fromkeys(("hidden", "out", "grad", "grad_hidden"), f"*{data}")
        signature |= dict.fromkeys(("w_in", "b_in", "w_out", "b_out"), f"*{weight}")
        signature |= dict.fromkeys(("grad_w_in", "grad_b_in", "grad_w_out", "grad_b_out"), f"*{weight}")
        signature |= dict.fromkeys(("z", "z_out", "partial"), "*fp32") | {"indices": "*i32"}
        signature |= {"rows": "i32", "programs": "i32"}
        flags = {"BD": kernels.CHANNELS, "SCALE": 1.0, "NATIVE": True}
        backward = kernels.backward_config(torch_dtypes[data], torch_dtypes[weight])
        for kernel, config, picked, rest in (
            ("forward", kernels.FORWARD, (*names, "BASIS"), flags),
            ("backward", backward, (*names, "SLOPE"), flags),
            ("sum", kernels.SUM, (), {}),
        ):
            values = {k: list(v) for k, v in pick(levels, "tanh", *picked).items()}
            shape = {"W": width, "D": len(levels), "ROWS": config.rows, "COLUMNS": config.columns}
            cases.append(
                {
                    "kernel": f"_fsq_project_triton.{kernel}_kernel",
                    "arch": arch,
                    "signature": signature,
                    "constants": values | rest | shape,
                    "warps": config.warps,
                    "stages": config.stages,
                    "registers": config.registers,
                }
            )
    return cases


def check_fsq_project(cases, environment) -> None:
    """Little shared memory, tensor cores, 128-bit loads of whole tiles."""
    for case, result in gate(cases, environment):
        assert result["shared"] <= 48 * 1024, (case, result)
        if not case["kernel"].endswith("sum_kernel"):
            assert result["tensor_cores"] > 0, (case, result)
            c = case["constants"]
            sizes = [4 if case["signature"][name] == "*fp32" else 2 for name in ("hidden", "w_in")]
            states, weights = (
                tile_loads(case, rows, c["COLUMNS"], size) if c["W"] * size % 16 == 0 else 0
                for rows, size in zip((c["ROWS"], c["BD"]), sizes, strict=True)
            )
            # grad twice and hidden in the backward; z, w_out's rows of few values and the biases stay narrow.
            least = weights + (3 if "backward" in case["kernel"] else 1) * states
            assert result["wide_loads"] >= least, (least, case, result)


def test_fsq_project_compiles_as_shipped(environment):
    check_fsq_project(fsq_project_cases([("bf16", "bf16")], [(512, LEVELS)], MORE_ARCHITECTURES), environment)


@pytest.mark.slow
def test_fsq_project_compiles_for_other_dtypes_and_shapes(environment):
    dtypes = [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp16")]
    shapes = [(100, (8, 6, 5)), (1024, (5,) * 8)]
    cases = fsq_project_cases(dtypes, [(512, LEVELS)])
    cases += fsq_project_cases([("bf16", "bf16"), ("fp32", "fp32")], shapes)
    check_fsq_project(cases, environment)


def decode_cases(shapes, dtypes, architectures=ARCHITECTURES) -> list[dict]:
    """One split, several, and their sum; caches as (B, H, capacity, D)."""
    from scamo_kernels import _decode_triton as kernels

    cases = []
    for arch, dtype, (head_dim, heads) in itertools.product(architectures, dtypes, shapes):
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
    check_decode(decode_cases(SHIPPED, ["bf16"], MORE_ARCHITECTURES), environment)


@pytest.mark.slow
def test_decode_compiles_for_other_shapes(environment):
    check_decode(decode_cases(OTHERS, ["bf16"]) + decode_cases((*SHIPPED, (128, 8)), ["fp32"]), environment)


def surrounding_cases(widths, hiddens, classes, dtypes, architectures=ARCHITECTURES) -> list[dict]:
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
    return [case | {"arch": arch} for arch in architectures for case in cases]


def check_surrounding(cases, environment) -> None:
    """Few registers, and every tile in 128-bit loads where its rows are aligned so."""
    for case, result in gate(cases, environment):
        assert result["registers"] <= 128, (case, result)
        c, size = case["constants"], case["itemsize"]
        if "H" in c and c["H"] * size % 16 == 0:
            assert result["wide_loads"] == result["loads"], (case, result)
        elif "ADD" in c and c["C"] * size % 16 == 0:
            # Beside the tiles only the weight, where few of its elements meet a thread, and the scale.
            tiles = (1 if "forward" in case["kernel"] else 2) + c["ADD"]
            least = tiles * tile_loads(case, c["BR"], c["BC"], size)
            assert result["wide_loads"] >= least, (least, case, result)
        elif case["kernel"].endswith("sum_kernel") and c["C"] % 4 == 0:
            assert result["wide_loads"] == result["loads"], (case, result)
        elif "V" in c and c["V"] > c["BLOCK"]:
            least = (1 + c["TRAIN"]) * tile_loads(case, c["BLOCK"], 1, size)
            assert result["wide_loads"] >= least, (least, case, result)


def test_what_surrounds_attention_compiles(environment):
    shapes = (1024, 3200), (2816,), (65537,)
    check_surrounding(surrounding_cases(*shapes, ["bf16"], MORE_ARCHITECTURES), environment)


@pytest.mark.slow
def test_what_surrounds_attention_compiles_for_other_shapes(environment):
    shapes = (1, 100, 8192), (100,), (241, 16384)
    check_surrounding(surrounding_cases(*shapes, ["bf16", "fp32"]), environment)
