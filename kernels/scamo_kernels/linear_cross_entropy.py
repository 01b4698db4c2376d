"""The output layer and its cross-entropy, a chunk of rows at a time: the logits of all rows never exist.

The gradients are made beside the loss, so that nothing is computed twice: per chunk one product for the
logits, one pass that turns them into losses and their own gradient in place, and two products for the
gradients of hidden and weight. The products are cuBLAS's or oneDNN's; nothing waits for the device.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scamo_kernels._dispatch import FLOATS, LIBRARY, NAME, define, resolve, sees_values
from scamo_kernels.reference import compute_dtype

# Bytes of a chunk's logits.
LOGIT_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
# Elements of the weight's gradient that one chunk adds at a time, so that the summand stays small.
_SUMMAND = 1 << 25
# Elements of the rows whose softmax torch takes at once: their float32 copies stay in a CPU's cache, and
# under 512 MiB on a GPU.
_BLOCK = {"cuda": 1 << 26, "cpu": 1 << 18}


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk: int | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """-log softmax(hidden weight^T)[target], in nats: its sum over the rows, and each row's.

    hidden: (S, C) and weight: (V, C), one dtype of float32, float16 or bfloat16 (float64 with impl="torch");
    targets: (S,) int32 or int64 in [0, V). Returns (sum (), losses (S,)), float32 (float64 for float64); only
    the sum is differentiable. Logits have hidden's dtype, the softmax is float32; the weight's gradient is
    summed over chunks in float32. In float16 a probability under 6e-8 has no gradient.

    chunk: rows at a time; the default keeps the logits of a chunk to 1 GiB on CUDA and 64 MiB on a CPU.
    Beside them a call holds the gradients, for several chunks the weight's in float32 too. Call it inside the
    forward of the module that owns `weight`: under ZeRO-3 the weight exists for that long only.
    impl: "auto" | "triton" | "torch".

    Raises TypeError or ValueError that names the argument. A target outside [0, V) is a ValueError on the
    CPU; on CUDA, where looking would wait for the device (SCAMO_KERNELS_DEBUG=1 does), its loss, the sum and
    the gradients are NaN.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden: expected shape (S, C), got {tuple(hidden.shape)}")
    if hidden.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"hidden: expected a floating-point tensor, got {hidden.dtype}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight: expected shape (V, {hidden.shape[1]}), got {tuple(weight.shape)}")
    if weight.dtype != hidden.dtype:
        raise TypeError(f"weight: expected hidden's dtype {hidden.dtype}, got {weight.dtype}")
    if targets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"targets: expected int32 or int64, got {targets.dtype}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets: expected shape ({hidden.shape[0]},), got {tuple(targets.shape)}")
    for name, tensor in (("weight", weight), ("targets", targets)):
        if tensor.device != hidden.device:
            raise ValueError(f"{name}: expected hidden's device {hidden.device}, got {tensor.device}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk = {chunk}: expected at least 1 row")
    chosen = resolve(impl, hidden)
    if chosen == "triton" and hidden.dtype == torch.float64:
        raise TypeError('hidden: impl = "triton" does not take float64; use impl="torch"')
    needs = [torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight)]
    loss_sum, losses, _, _ = torch.ops.scamo_kernels.linear_cross_entropy(
        hidden, weight, targets, chunk or 0, *needs, chosen
    )
    return loss_sum, losses


def chunk_rows(device: torch.device, row_bytes: int) -> int:
    """Rows of a chunk within the budget: a multiple of 64 when there are so many."""
    rows = max(1, LOGIT_BYTES.get(device.type, LOGIT_BYTES["cpu"]) // row_bytes)
    return rows // 64 * 64 or rows


def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    hidden_grad: bool,
    weight_grad: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, classes = hidden.shape[0], weight.shape[0]
    on_cpu = hidden.device.type == "cpu"
    if sees_values(targets):
        _check_targets(targets, classes)
    if impl == "triton":
        from scamo_kernels import _linear_cross_entropy_triton

        softmax_loss_ = _linear_cross_entropy_triton.softmax_loss_
    else:
        softmax_loss_ = _softmax_loss_
        targets = targets.long()
    # Rows of logits start at multiples of 64 elements on a GPU: with 65,537 classes they would else be
    # aligned to one element, which neither the kernels nor the products can load quickly.
    stride = classes if on_cpu and impl == "torch" else -(-classes // 64) * 64
    chunk = min(chunk or chunk_rows(hidden.device, stride * hidden.element_size()), max(1, rows))
    # oneDNN builds a new kernel for every number of rows it meets in bfloat16, and every batch has its own.
    padding = -rows % 64 if on_cpu and hidden.dtype == torch.bfloat16 else 0
    if padding:
        hidden = F.pad(hidden, (0, 0, 0, padding))
        chunk += -chunk % 64
    train = hidden_grad or weight_grad
    losses = torch.empty(rows, dtype=compute_dtype(hidden.dtype), device=hidden.device)
    grad_hidden = hidden.new_empty(hidden.shape if hidden_grad else (0, hidden.shape[1]))
    grad_weight = weight.new_empty((0, weight.shape[1]))
    several = hidden.shape[0] > chunk
    if weight_grad:
        # Several chunks are added up in float32: a bfloat16 sum would lose the later ones.
        start_from = weight.new_zeros if several or not rows else weight.new_empty
        grad_weight = start_from(weight.shape, dtype=losses.dtype if several else weight.dtype)
    buffer = hidden.new_empty((min(chunk, hidden.shape[0]), stride))
    for start in range(0, hidden.shape[0], chunk):
        part = slice(start, min(start + chunk, hidden.shape[0]))
        block = hidden[part]
        logits = buffer[: block.shape[0], :classes]
        torch.mm(block, weight.t(), out=logits)
        scored = min(rows, part.stop) - start
        softmax_loss_(logits[:scored], targets[start : start + scored], losses[start : start + scored], train)
        if train:
            logits[scored:].zero_()
        if hidden_grad:
            torch.mm(logits, weight, out=grad_hidden[part])
        if weight_grad:
            _add_product(grad_weight, logits, block, several)
    if hidden_grad:
        grad_hidden = grad_hidden[:rows]
    return losses.sum(), losses, grad_hidden, grad_weight.to(weight.dtype)


def _check_targets(targets: Tensor, classes: int) -> None:
    """ValueError that names the first row whose target is no class."""
    if not targets.numel():
        return
    low, high = (int(x) for x in torch.aminmax(targets))
    if low < 0 or high >= classes:
        row = int(((targets < 0) | (targets >= classes)).nonzero()[0, 0])
        raise ValueError(f"targets: expected 0 to {classes - 1}, row {row} holds {int(targets[row])}")


def _add_product(grad_weight: Tensor, grad_logits: Tensor, block: Tensor, several: bool) -> None:
    """grad_weight (V, C) += grad_logits^T (V, n) block (n, C); the first of one chunk overwrites."""
    if not several:
        torch.mm(grad_logits.t(), block, out=grad_weight)
        return
    step = max(1, _SUMMAND // max(1, block.shape[1]))
    for first in range(0, grad_weight.shape[0], step):
        grad_weight[first : first + step] += grad_logits[:, first : first + step].t() @ block


def _softmax_loss_(logits: Tensor, targets: Tensor, losses: Tensor, train: bool) -> None:
    """Write each row's loss; with `train` turn logits (n, V) into the losses' gradient, in place."""
    rows, classes = logits.shape
    dtype = compute_dtype(logits.dtype)
    step = max(1, _BLOCK.get(logits.device.type, _BLOCK["cpu"]) // classes)
    # A class that does not exist is looked up as the nearest, and a NaN there spoils the whole row.
    inside = targets.clamp(0, classes - 1)[:, None]
    flaw = torch.where(inside == targets[:, None], 0.0, torch.nan).to(logits.dtype)
    logits.scatter_add_(1, inside, flaw)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        target = inside[part]
        log_p = torch.log_softmax(logits[part], -1, dtype=dtype)
        losses[part] = -log_p.gather(1, target).squeeze(1)
        if train:
            p = log_p.exp_()
            p.scatter_add_(1, target, p.new_full((1, 1), -1).expand_as(target))
            logits[part] = p


def _fake_forward(hidden, weight, targets, chunk, hidden_grad, weight_grad, impl):
    losses = hidden.new_empty(targets.shape, dtype=compute_dtype(hidden.dtype))
    grad_hidden = hidden.new_empty(hidden.shape if hidden_grad else (0, hidden.shape[1]))
    grad_weight = weight.new_empty(weight.shape if weight_grad else (0, weight.shape[1]))
    return losses.new_empty(()), losses, grad_hidden, grad_weight


def _setup(ctx, inputs, output) -> None:
    _, losses, grad_hidden, grad_weight = output
    ctx.needs = inputs[4:6]
    ctx.save_for_backward(grad_hidden, grad_weight)
    ctx.mark_non_differentiable(losses, grad_hidden, grad_weight)
    ctx.set_materialize_grads(False)


def _autograd(ctx, grad: Tensor | None, *_):
    if grad is None:
        return (None,) * 7
    # New tensors, so that a second backward finds the saved ones as they were.
    grads = (x * grad if need else None for x, need in zip(ctx.saved_tensors, ctx.needs, strict=True))
    return *grads, None, None, None, None, None


define(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, SymInt chunk, bool hidden_grad, "
    "bool weight_grad, str impl) -> (Tensor, Tensor, Tensor, Tensor)"
)
LIBRARY.impl("linear_cross_entropy", _forward, "CompositeExplicitAutograd")
torch.library.register_fake(NAME + "linear_cross_entropy", _fake_forward, lib=LIBRARY)
torch.library.register_autograd(NAME + "linear_cross_entropy", _autograd, setup_context=_setup, lib=LIBRARY)
