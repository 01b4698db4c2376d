"""FSQ with its projections: the fused op against the three ops, eager PyTorch, torch.compile and the peer."""

from __future__ import annotations

import floors
import peers
import pytest
import scamo_kernels
import torch
import torch.nn.functional as F
from peers import WAYS, directed, moved_bytes
from scamo_kernels import reference

LEVELS = [8, 8, 8, 5, 5, 5]
WIDTH = 512
GPU = pytest.mark.gpu
# (rows, dtype, device, replayed as a CUDA graph); 4,096 to 16,384 rows are training sizes.
CASES = [
    *(
        pytest.param(2048, dtype, "cpu", False, id=f"N2048-{dtype}-cpu")
        for dtype in (torch.float32, torch.bfloat16)
    ),
    *(
        pytest.param(n, dtype, "cuda", graph, marks=GPU, id=f"N{n}-{dtype}-cuda{'-graph' * graph}")
        for n in (4096, 16384, 65536)
        for dtype in (torch.bfloat16, torch.float32)
        for graph in (False, True)
    ),
]


def problem(rows: int, dtype: torch.dtype, device: str) -> tuple[list[torch.Tensor], torch.Tensor]:
    """hidden and the weights, all in dtype, and a cotangent; no row rounds either way in the last bit."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    channels = len(LEVELS)
    weights = [
        normal(channels, WIDTH) * (1.5 * WIDTH**-0.5),
        normal(channels),
        normal(WIDTH, channels),
        normal(WIDTH),
    ]
    hidden = normal(rows + rows // 8 + 64, WIDTH)
    z = hidden.double() @ weights[0].double().T + weights[1].double()
    bounded = reference.fsq_bound(z, LEVELS)
    hidden = hidden[((bounded - bounded.floor() - 0.5).abs() > 1e-4).all(1)][:rows]
    inputs = [x.to(device).requires_grad_() for x in (hidden, *weights)]
    return inputs, normal(*hidden.shape).to(device)


def unfused(hidden, w_in, b_in, w_out, b_out):
    """What one writes without the fused op: float32 projections around the fused quantiser."""
    z = F.linear(hidden.float(), w_in.float(), b_in.float())
    codes, indices = scamo_kernels.fsq_quantize(z, LEVELS)
    return F.linear(codes, w_out.float(), b_out.float()).to(hidden.dtype), indices


def eager(*arguments):
    return reference.fsq_project(*arguments, LEVELS)


def projector(impl: str, inputs: list[torch.Tensor]):
    """(hidden, w_in, b_in, w_out, b_out) -> (out, indices)."""
    if impl in ("unfused", "eager"):
        return {"unfused": unfused, "eager": eager}[impl]
    if impl == "compiled":
        torch._dynamo.reset()
        return torch.compile(eager)
    if impl == "vector-quantize-pytorch":
        if inputs[0].dtype != torch.float32:
            pytest.skip("projects in the input's dtype: other codes than the float32 specification")
        module = peers.vq_package().FSQ(levels=LEVELS, dim=WIDTH).to(inputs[0].device)
        names = ("project_in.weight", "project_in.bias", "project_out.weight", "project_out.bias")

        def project(hidden, *weights):
            tensors = dict(zip(names, weights, strict=True))
            out, indices = torch.func.functional_call(module, tensors, (hidden[None],))
            return out[0], indices[0]

        return project
    return lambda *arguments: scamo_kernels.fsq_project(*arguments, LEVELS, impl=impl)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "dtype", "device", "graph"), CASES)
@pytest.mark.parametrize(
    "impl", ["torch", "triton", "unfused", "eager", "compiled", "vector-quantize-pytorch"]
)
def test_fsq_project(measure, card, impl, rows, dtype, device, graph, way):
    if device == "cpu" and impl in ("triton", "compiled"):
        pytest.skip("on a CPU: the torch implementation, the three ops, eager PyTorch and the peer")
    inputs, cotangent = problem(rows, dtype, device)
    function = directed(way, projector(impl, inputs), inputs, [cotangent])
    expected = directed(way, eager, inputs, [cotangent])()
    # Passes over tensors of the hidden size: two, and three; z and the indices; each weight twice read, once
    # written.
    size, channels = dtype.itemsize, len(LEVELS)
    weights = ((2 * WIDTH + 1) * channels + WIDTH) * size
    moved = moved_bytes(
        way,
        len(inputs[0]) * (2 * WIDTH * size + 4 * channels + 4) + weights,
        len(inputs[0]) * (3 * WIDTH * size + 4 * channels) + 2 * weights,
    )
    floor = None
    if card is not None and device == "cuda":
        floor = floors.fsq(rows, channels, card, way=way, itemsize=size, hidden=WIDTH)
    kind = str(dtype).removeprefix("torch.")
    group = f"fsq_project-N{rows}-W{WIDTH}-{kind}-{device}{' graph' * graph} {way}"
    measure(group, impl, function, expected, dtype, moved, floor=floor, graph=graph)
