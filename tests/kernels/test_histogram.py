"""Code counts against NumPy's."""

from __future__ import annotations

import numpy as np
import pytest
import scamo_kernels
import torch
from scamo_kernels import reference

SHAPES = [((3000,), 240), ((7, 11), 64000), ((1,), 1), ((0,), 5), ((4, 5, 6), 100)]


def indices(shape, codebook_size, dtype) -> torch.Tensor:
    generator = np.random.default_rng(len(shape) + codebook_size)
    # Skewed, so that some codes are frequent and many are absent.
    values = (generator.random(shape) ** 3 * codebook_size).astype(np.int64)
    return torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(("shape", "codebook_size"), SHAPES, ids=str)
@pytest.mark.parametrize("impl", ["torch", "interpreter"])
def test_counts(run, impl, shape, codebook_size, dtype):
    values = indices(shape, codebook_size, dtype)
    (counts,), _ = run(impl, "code_histogram", values, codebook_size)
    assert counts.dtype == torch.int64
    assert counts.shape == (codebook_size,)
    assert counts.tolist() == np.bincount(values.numpy().ravel(), minlength=codebook_size).tolist()
    assert torch.equal(counts, reference.code_histogram(values, codebook_size))


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="indices: expected 0 to 4, found -1 to 2"):
        scamo_kernels.code_histogram(torch.tensor([2, -1]), 5)
    with pytest.raises(ValueError, match="indices: expected 0 to 4, found 0 to 5"):
        scamo_kernels.code_histogram(torch.tensor([0, 5]), 5)
    with pytest.raises(ValueError, match=f"indices: expected 0 to 4, found 0 to {2**40}"):
        scamo_kernels.code_histogram(torch.tensor([0, 2**40]), 5)
    with pytest.raises(TypeError, match="indices: expected int32 or int64"):
        scamo_kernels.code_histogram(torch.tensor([0.5]), 5)
    with pytest.raises(ValueError, match="codebook_size = 0"):
        scamo_kernels.code_histogram(torch.tensor([0]), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_counts_on_a_gpu(run, impl):
    values = indices((300_000,), 64000, torch.int32)
    (counts,), _ = run(impl, "code_histogram", values.cuda(), 64000)
    assert torch.equal(counts.cpu(), reference.code_histogram(values, 64000))
    # Looking for indices outside would wait for the device; they are left out.
    (few,), _ = run(impl, "code_histogram", torch.tensor([-1, 0, 7, 2], device="cuda"), 7)
    assert few.tolist() == [1, 0, 1, 0, 0, 0, 0]


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_debug_mode_looks_at_the_indices_on_a_gpu(monkeypatch, impl):
    monkeypatch.setenv("SCAMO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match="indices: expected 0 to 6, found -1 to 7"):
        scamo_kernels.code_histogram(torch.tensor([-1, 0, 7, 2], device="cuda"), 7, impl=impl)
