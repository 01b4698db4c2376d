"""Layers against closed forms in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from scamo.models import layers
from scamo.models.layers import (
    FromHeads,
    Head,
    Linear,
    RMSNorm,
    ToHeads,
    check_bf16,
    rotary_table,
    rotate,
    storage_dim,
)

CPU = torch.device("cpu")


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("head_dim", [4, 64, 100])
def test_rotary_table_is_the_closed_form_at_the_last_position(head_dim):
    table = rotary_table(201, head_dim, head_dim + 8, 10000.0, CPU)
    assert (table.dtype, table.shape) == (torch.float32, (201, head_dim // 2 + 4, 2))
    for j in (0, 1, head_dim // 2 - 1):
        angle = 200 * 10000.0 ** (-2 * j / head_dim)
        assert table[200, j].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-7)
    assert (table[:, head_dim // 2 :] == torch.tensor([1.0, 0.0])).all(), "stored columns are not turned"


def test_rotate_turns_adjacent_pairs():
    x = randn(3, 2, 8)
    turn = rotary_table(201, 8, 8, 10000.0, CPU)[torch.tensor([0, 7, 200])]
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
    table = rotary_table(201, 64, 64, 10000.0, CPU)
    near = (rotate(q, table[[5]]) * rotate(k, table[[2]])).sum()
    far = (rotate(q, table[[200]]) * rotate(k, table[[197]])).sum()
    torch.testing.assert_close(near, far, atol=1e-5, rtol=0)


def test_rotation_of_bfloat16_is_rounded_once():
    x = randn(1, 64).to(torch.bfloat16)
    turn = rotary_table(201, 64, 64, 10000.0, CPU)[[200]]
    exact = rotate(x.double(), turn)
    # One rounding of a pair of length r moves it by at most r / 2^8; a bfloat16 table would by half a radian.
    bound = x.double().unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(1, 32, 2).flatten(-2) / 2**8
    assert ((rotate(x, turn).double() - exact).abs() <= bound).all()


def test_heads_are_stored_in_columns_that_load_well_on_a_gpu():
    stored = [storage_dim(head_dim, torch.device("cuda")) for head_dim in (64, 100, 4)]
    assert stored == [64, 104, 8]
    assert storage_dim(100, CPU) == 100


def test_wider_storage_of_heads_is_zeros_and_goes_unseen():
    to_heads, from_heads = ToHeads(12, 3, 2).double(), FromHeads(12, 2).double()
    x = randn(5, 12)
    plain, wide = to_heads(x, 6), to_heads(x, 8)
    assert plain.shape == (5, 3, 2, 6)
    assert torch.equal(wide[..., :6], plain)
    assert not wide[..., 6:].any()
    attended = randn(5, 2, 8, seed=1)
    expected = from_heads(attended[..., :6].contiguous())
    torch.testing.assert_close(from_heads(attended), expected, atol=1e-14, rtol=0)
    assert torch.autograd.gradcheck(lambda y, _: to_heads(y, 8), (x.requires_grad_(), to_heads.weight))
    assert torch.autograd.gradcheck(
        lambda y, _: from_heads(y), (attended.requires_grad_(), from_heads.weight)
    )


@pytest.mark.parametrize("rows", [1, 7])
def test_rms_norm_is_the_closed_form_of_the_stream_and_its_branch(rows):
    norm = RMSNorm(6, 1e-5).double()
    x, branch, weight = randn(rows, 6), randn(rows, 6, seed=2), randn(6, seed=1)
    norm.weight.data.copy_(weight)
    for added, stream in ((None, x), (branch, x + branch)):
        expected = stream / torch.sqrt((stream * stream).sum(-1, keepdim=True) / 6 + 1e-5) * weight
        normed, total = norm(x, added)
        torch.testing.assert_close(normed, expected, atol=1e-13, rtol=0)
        assert torch.equal(total, stream)


def test_rms_norm_of_zeros_is_zero():
    assert torch.equal(RMSNorm(8, 1e-5)(torch.zeros(2, 8))[0], torch.zeros(2, 8))


def test_rms_norm_in_bfloat16_keeps_float32_statistics():
    x = 300 * randn(64, 512).to(torch.bfloat16)
    exact, _ = RMSNorm(512, 1e-5).double()(x.double())
    got = RMSNorm(512, 1e-5).bfloat16()(x)[0].double()
    assert (got - exact).abs().max() <= 2**-8 * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_head_loss_is_plain_cross_entropy(dtype):
    rows, width, classes = 10, 8, 13
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
    torch.testing.assert_close(losses.double(), plain.detach(), **tolerance)
    torch.testing.assert_close(loss_sum.double(), plain.sum().detach(), **tolerance)
    torch.testing.assert_close(hidden.grad.double(), plain_hidden.grad, **tolerance)
    torch.testing.assert_close(head.weight.grad.double(), plain_weight.grad, **tolerance)
    assert not losses.requires_grad


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
