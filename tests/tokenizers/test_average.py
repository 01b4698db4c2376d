"""The moving average of a codebook against loops over latents, and its reset."""

import numpy as np
import pytest
import torch

from scamo.tokenizers.average import CodebookAverage
from scamo.tokenizers.vq import VQ


def make(codes=7, width=3, stages=1, **options):
    torch.manual_seed(0)
    quantizer = VQ(codes, width, stages)
    return CodebookAverage(quantizer, **{"decay": 0.9, "reset_below": 0.0} | options)


def rng(seed=0):
    return np.random.default_rng(seed)


def steps(average, number, size=20, stages=None):
    """So many steps on random latents; what was given in each: z, indices and the codebooks before it."""
    generator, given = torch.Generator().manual_seed(1), []
    for step in range(number):
        z = torch.randn(2, size // 2, 3, generator=generator)
        books = [book.double().numpy().copy() for book in average.quantizer.books]
        indices = average.quantizer(z, stages=stages)[1]
        average.update(z, indices, rng(step))
        given.append((z.flatten(0, 1).double().numpy(), indices.view(size, -1).numpy(), books))
    return given


@pytest.mark.parametrize("stages", [1, 2])
def test_entries_are_moving_averages(stages):
    average = make(stages=stages)
    start = average.quantizer.codebook.clone().view(stages, 7, 3).double().numpy()
    sums, counts = start.copy(), np.ones((stages, 7))
    for rest, indices, books in steps(average, 5):
        rest = rest.copy()
        for stage in range(stages):
            new_sums, new_counts = np.zeros((7, 3)), np.zeros(7)
            for row, code in enumerate(indices[:, stage]):
                new_sums[code] += rest[row]
                new_counts[code] += 1
                rest[row] -= books[stage][code]
            sums[stage] = 0.9 * sums[stage] + 0.1 * new_sums
            counts[stage] = 0.9 * counts[stage] + 0.1 * new_counts
    np.testing.assert_allclose(average.counts.numpy(), counts, rtol=1e-5)
    np.testing.assert_allclose(average.sums.numpy(), sums, rtol=1e-4, atol=1e-6)
    found = average.quantizer.codebook.view(stages, 7, 3).numpy()
    np.testing.assert_allclose(found, sums / counts[..., None], rtol=1e-4, atol=1e-6)
    assert np.abs(found - start).max() > 0.1


def test_only_the_stages_that_were_used_move():
    average = make(stages=3)
    before = average.quantizer.codebook.clone()
    steps(average, 2, stages=2)
    moved = (average.quantizer.codebook != before).flatten(1).any(1)
    assert moved.tolist() == [True, True, False]
    assert torch.equal(average.counts[2], torch.ones(7))


def test_entries_below_the_threshold_become_latents():
    """Counts after a step of decay 1/2: half the choices and half of the 1 that they start with."""
    average = make(codes=6, decay=0.5, reset_below=1.0)
    book = average.quantizer.codebook
    z, before = torch.randn(8, 3), book.clone()
    indices = torch.tensor([0, 0, 1, 1, 1, 2, 4, 4], dtype=torch.int32)
    average.update(z, indices, rng())
    assert average.counts[0].tolist() == [1.5, 2.0, 1.0, 0.5, 1.5, 0.5]  # 1.0 is not below
    for code in (0, 1, 2, 4):
        total = before[code] + z[indices == code].sum(0)
        torch.testing.assert_close(book[code], total / 2 / average.counts[0, code])
    drawn = [(z == book[code]).all(1).nonzero().item() for code in (3, 5)]
    assert drawn == rng().permutation(8)[:2].tolist()
    assert drawn[0] != drawn[1]


def test_averages_begin_anew():
    average = make(codes=3, decay=0.5, reset_below=0.8, reset_averages=True)
    book = average.quantizer.codebook
    average.update(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64), rng())
    assert average.counts[0].tolist() == pytest.approx([2.5, 0.8, 0.8])
    torch.testing.assert_close(average.sums[0, 1:], 0.8 * book[1:])
    latent, kept = torch.randn(1, 3), book[1].clone()
    average.update(latent, torch.tensor([1]), rng(1))
    assert average.counts[0, 1] == pytest.approx(0.9)
    torch.testing.assert_close(book[1], (0.4 * kept + 0.5 * latent[0]) / 0.9)


def test_more_entries_than_latents():
    average = make(codes=50, reset_below=1.0)
    z = torch.randn(8, 3)
    average.start(z, rng())
    book = average.quantizer.codebook
    assert sorted((z == entry).all(1).nonzero().item() for entry in book[:8]) == list(range(8))
    assert len(book.unique(dim=0)) == 8
    first = book[0].clone()
    average.update(z, torch.zeros(8, dtype=torch.int32), rng(1))
    torch.testing.assert_close(book[0], (0.9 * first + 0.1 * z.sum(0)) / (0.9 + 0.8))
    assert len(book.unique(dim=0)) == 9


def test_without_a_threshold_unused_entries_stay():
    average = make(codes=4)
    before = average.quantizer.codebook.clone()
    for _ in range(2000):  # until their counts have no digits left
        average.update(torch.randn(5, 3), torch.tensor([0, 2, 2, 2, 0]), rng())
    assert average.counts[0, [1, 3]].max() < 1e-40
    assert torch.equal(average.quantizer.codebook[[1, 3]], before[[1, 3]])
    assert average.quantizer.codebook.isfinite().all()


def test_a_later_stage_starts_from_what_is_left():
    average = make(codes=5, stages=2)
    z = torch.randn(40, 3)
    average.start(z, rng())
    first, second = average.quantizer.books
    left = z - first[torch.cdist(z, first).argmin(1)]
    for entry in second:
        assert (left - entry).norm(dim=1).min() < 1e-6
    assert torch.equal(average.sums, average.quantizer.codebook)
    assert (average.counts == 1).all()


def test_same_inputs_same_bits():
    codebooks = []
    for _ in range(2):
        average = make(codes=40, reset_below=1.0, stages=2)
        steps(average, 6, size=200)
        codebooks.append(average.quantizer.codebook)
    assert torch.equal(*codebooks)


@pytest.mark.gpu
def test_same_inputs_same_bits_on_a_gpu():
    codebooks = []
    for _ in range(2):
        torch.manual_seed(0)
        quantizer = VQ(64, 32).cuda()
        average = CodebookAverage(quantizer, decay=0.9, reset_below=1.0)
        for step in range(5):
            z = torch.randn(4096, 32, generator=torch.Generator().manual_seed(step)).cuda()
            average.update(z, quantizer(z)[1], rng(step))
        codebooks.append(quantizer.codebook)
    assert torch.equal(*codebooks)
