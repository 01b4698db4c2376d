"""Layers against closed forms in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from scamo.models import layers
from scamo.models.layers import Head, Linear, RMSNorm, check_bf16, rotary_table, rotate, swiglu

CPU = torch.device("cpu")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("head_dim", [4, 64, 100])
def test_rotary_table_is_the_closed_form_at_the_last_position(head_dim):
    table = rotary_table(201, head_dim, 10000.0, CPU)
    assert table.dtype == torch.complex64
    for j in (0, 1, head_dim // 2 - 1):
        angle = 200 * 10000.0 ** (-2 * j / head_dim)
        assert table[200, j].item() == pytest.approx(complex(math.cos(angle), math.sin(angle)), abs=1e-7)


def test_rotate_turns_adjacent_pairs():
    x = randn(3, 2, 8)
    turn = rotary_table(201, 8, 10000.0, CPU)[torch.tensor([0, 7, 200])]
    expected = torch.empty_like(x)
    for n, position in enumerate((0, 7, 200)):
        for j in range(4):
            angle = position * 10000.0 ** (-2 * j / 8)
            matrix = torch.tensor(
                [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]], dtype=torch.float64
            )
            expected[n, :, 2 * j : 2 * j + 2] = x[n, :, 2 * j : 2 * j + 2] @ matrix.T
    torch.testing.assert_close(rotate(x, turn), expected, atol=1e-6, rtol=0)
    assert torch.equal(rotate(x, turn)[0], x[0]), "position 0 is not turned"


def test_rotated_products_depend_on_the_distance_only():
    q, k = randn(1, 64, seed=1), randn(1, 64, seed=2)
    table = rotary_table(201, 64, 10000.0, CPU)
    near = (rotate(q, table[[5]]) * rotate(k, table[[2]])).sum()
    far = (rotate(q, table[[200]]) * rotate(k, table[[197]])).sum()
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)


def test_rotation_of_bfloat16_is_rounded_once():
    x = randn(1, 64).to(torch.bfloat16)
    turn = rotary_table(201, 64, 10000.0, CPU)[[200]]
    exact = rotate(x.double(), turn)
    # One rounding of a pair of length r moves it by at most r / 2^8; a bfloat16 table would by half a radian.
    bound = x.double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(1, 32, 2).flatten(-2) / 2**8
    assert ((rotate(x, turn).double() - exact).abs() <= bound).all()


def test_fused_rotation_has_the_gradient_of_plain_autograd():
    qkv = randn(5, 3, 2, 8).requires_grad_()
    turn = rotary_table(201, 8, 10000.0, CPU)[torch.arange(5) * 40].to(torch.complex128)
    assert torch.autograd.gradcheck(lambda x: layers._RotateQueriesKeys.apply(x, turn), (qkv,))
    q, k, v = layers._RotateQueriesKeys.apply(qkv, turn)
    assert torch.equal(q, rotate(qkv[:, 0], turn))
    assert torch.equal(k, rotate(qkv[:, 1], turn))
    assert torch.equal(v, qkv[:, 2])


@pytest.mark.parametrize(("rows", "width"), [(1, 4), (7, 6)])
@pytest.mark.parametrize("block", [3, 256])
def test_rms_norm_is_the_closed_form_and_so_are_its_gradients(rows, width, block, monkeypatch):
    monkeypatch.setattr(layers._RMSNormCPU, "ROWS", block)
    norm = RMSNorm(width, 1e-5).double()
    x, weight = randn(rows, width), randn(width, seed=1)
    norm.weight.data.copy_(weight)
    expected = x / torch.sqrt((x * x).sum(-1, keepdim=True) / width + 1e-5) * weight
    torch.testing.assert_close(norm(x), expected, atol=1e-13, rtol=0)
    inputs = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, w: layers._RMSNormCPU.apply(a, w, 1e-5), inputs)


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(RMSNorm(8, 1e-5)(torch.zeros(2, 8)), torch.zeros(2, 8))


def test_rms_norm_in_bfloat16_keeps_float32_statistics():
    x = 300 * randn(64, 512).to(torch.bfloat16)
    exact = RMSNorm(512, 1e-5).double()(x.double())
    got = RMSNorm(512, 1e-5).bfloat16()(x).double()
    assert (got - exact).abs().max() <= 2**-8 * exact.abs().max()


def test_swiglu_is_silu_of_the_first_half_times_the_second():
    x = randn(5, 12)
    gate, up = x[:, :6], x[:, 6:]
    torch.testing.assert_close(swiglu(x), gate / (1 + torch.exp(-gate)) * up, atol=1e-14, rtol=0)
    assert torch.autograd.gradcheck(swiglu, (x.requires_grad_(),))


@pytest.mark.parametrize("chunk_rows", [1, 3, 10, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_head_loss_in_chunks_is_plain_cross_entropy(chunk_rows, dtype, monkeypatch):
    rows, width, classes = 10, 8, 13
    monkeypatch.setitem(layers.LOGIT_BUDGET, "cpu", chunk_rows * classes)
    head = Head(width, classes).to(dtype)
    head.weight.data.copy_(randn(classes, width, seed=1))
    hidden = randn(rows, width, seed=2, dtype=dtype).requires_grad_()
    targets = torch.arange(rows) * 7 % classes
    loss_sum, losses = head(hidden, targets)
    (3.5 * loss_sum).backward()

    plain_hidden = hidden.detach().double().requires_grad_()
    plain_weight = head.weight.detach().double().requires_grad_()
    plain = F.cross_entropy(plain_hidden @ plain_weight.T, targets, reduction="none")
    (3.5 * plain.sum()).backward()
    tolerance = {"atol": 1e-12 if dtype == torch.float64 else 2e-5, "rtol": 0}
    torch.testing.assert_close(losses.double(), plain.detach(), **{**tolerance, "atol": 2e-6})
    torch.testing.assert_close(loss_sum.double(), plain.sum().detach(), atol=2e-5, rtol=0)
    torch.testing.assert_close(hidden.grad.double(), plain_hidden.grad, **tolerance)
    torch.testing.assert_close(head.weight.grad.double(), plain_weight.grad, **tolerance)
    assert not losses.requires_grad


def test_head_loss_in_bfloat16_adds_chunks_in_float32(monkeypatch):
    # 512 equal chunks: added in bfloat16, the sum would stop growing at 256.
    monkeypatch.setitem(layers.LOGIT_BUDGET, "cpu", 2)
    head = Head(1, 2).bfloat16()
    head.weight.data.zero_()
    loss_sum, _ = head(torch.ones(512, 1, dtype=torch.bfloat16), torch.zeros(512, dtype=torch.long))
    loss_sum.backward()
    assert loss_sum.dtype == torch.float32
    assert loss_sum.item() == pytest.approx(512 * math.log(2), rel=1e-6)
    assert head.weight.grad.flatten().tolist() == [-256, 256]


def test_head_without_grad_gives_the_same_losses_and_logits_in_float32():
    head = Head(4, 6).bfloat16()
    head.weight.data.copy_(randn(6, 4))
    hidden, targets = randn(3, 4, dtype=torch.bfloat16), torch.tensor([5, 0, 2])
    with torch.no_grad():
        logits = head(hidden)
        assert logits.dtype == torch.float32
        _, losses = head(hidden, targets)
    assert torch.equal(losses, head(hidden, targets)[1])
    expected = F.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=0)


def test_head_of_no_rows_has_zero_loss_and_gradient():
    head = Head(4, 6)
    head.weight.data.fill_(1)
    loss_sum, losses = head(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))
    loss_sum.backward()
    assert (loss_sum.item(), losses.shape[0], head.weight.grad.abs().sum().item()) == (0, 0, 0)


def test_bfloat16_is_allowed_on_a_cpu():
    check_bf16(CPU)


@pytest.mark.parametrize("rows", [1, 63, 64, 130])
def test_padded_rows_change_nothing(rows, monkeypatch):
    """The same losses and gradients with rows padded to 64 and without; padding carries neither."""

    def run():
        torch.manual_seed(0)
        linear, head = Linear(8, 12).bfloat16(), Head(12, 7)
        torch.nn.init.normal_(head.weight)
        head.bfloat16()
        x = randn(rows, 8, dtype=torch.float32).bfloat16().requires_grad_()
        targets = torch.arange(rows) % 7
        hidden = linear(x)
        loss, losses = head(hidden, targets)
        loss.backward()
        return hidden, losses, loss, x.grad, linear.weight.grad, linear.bias.grad, head.weight.grad

    padded = run()
    monkeypatch.setattr(layers, "row_padding", lambda x: 0)
    plain = run()
    assert padded[0].shape == (rows, 12)
    assert padded[1].shape == (rows,)
    for a, b in zip(padded, plain, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-2, atol=2e-2 * b.float().abs().max().item())
