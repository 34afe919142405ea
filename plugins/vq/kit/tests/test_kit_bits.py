import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor_kit_vq import (
    bit_groups,
    bit_sizes,
    bits_to_codes,
    codebook_entropy,
    codes_to_bits,
    from_grid,
    grid_shape,
    to_grid,
    token_entropy,
)


def _all_codes(odds):
    """Probabilities of all codes, float64 N x 2^L, by a softmax over the products with all sign vectors."""
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=odds.shape[1])), dtype=torch.float64)
    return (odds.double() / 2 @ signs.T).softmax(1)


def _entropy(p):
    return torch.special.entr(p).sum(-1)


@given(st.integers(1, 8), st.integers(0, 20), st.integers(0, 1000), st.sampled_from([0.01, 1.0, 30.0]))
@settings(deadline=None, max_examples=30)
def test_entropies_are_those_over_all_codes(bits, count, seed, scale):
    odds = (torch.randn(count, bits, generator=torch.Generator().manual_seed(seed)) * scale).requires_grad_()
    token, book = token_entropy(odds), codebook_entropy(odds, [bits])
    if count == 0:
        assert float(token.detach()) == 0
        assert float(book.detach()) < 1e-20
        return
    reference = odds.detach().double().requires_grad_()
    p = _all_codes(reference)
    torch.testing.assert_close(token.double(), _entropy(p).mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(book.double(), _entropy(p.mean(0)), rtol=1e-4, atol=1e-5)
    (0.3 * token - book).backward()
    (0.3 * _entropy(p).mean() - _entropy(p.mean(0))).backward()
    torch.testing.assert_close(odds.grad.double(), reference.grad, rtol=1e-3, atol=1e-5)


def test_chunks_of_vectors_add_up():
    odds = torch.randn(9000, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole = codebook_entropy(odds, [5])
    whole.backward()
    reference = odds.detach().double().requires_grad_()
    expected = _entropy(_all_codes(reference).mean(0))
    expected.backward()
    torch.testing.assert_close(whole.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(odds.grad.double(), reference.grad, rtol=1e-3, atol=1e-9)


def test_groups_bound_the_entropy_from_above_and_meet_it_where_independent():
    odds = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) * 4
    tied = torch.cat([odds[:, :3], odds[:, :3]], 1)  # the second half says what the first does
    for x in (odds, tied):
        entropies = [float(codebook_entropy(x, g)) for g in ([6], [3, 3], [2, 2, 2], [1] * 6)]
        assert entropies == sorted(entropies)
        assert entropies[-1] <= 6 * math.log(2) + 1e-5
    assert float(codebook_entropy(tied, [3, 3]) - codebook_entropy(tied, [6])) > 0.5
    # all combinations of two runs, so that they are independent
    first, second = torch.randn(9, 2), torch.randn(7, 3)
    both = torch.cat([first.repeat_interleave(7, 0), second.repeat(9, 1)], 1)
    torch.testing.assert_close(codebook_entropy(both, [5]), codebook_entropy(both, [2, 3]))


@given(st.integers(1, 64), st.integers(0, 9), st.integers(1, 31), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_bits_and_codes(bits, count, most, seed):
    groups = bit_groups(bits, most)
    assert sum(groups) == bits
    assert max(groups) <= most
    assert max(groups) - min(groups) <= 1
    assert len(groups) == -(-bits // most)
    given_bits = torch.rand(count, bits, generator=torch.Generator().manual_seed(seed)) < 0.5
    codes = bits_to_codes(given_bits, groups)
    assert codes.shape == (count, len(groups))
    for i, g in enumerate(groups):
        texts = ["".join("01"[int(b)] for b in row) for row in given_bits[:, sum(groups[:i]) : sum(groups[:i]) + g]]
        assert codes[:, i].tolist() == [int(t, 2) for t in texts]
    assert torch.equal(codes_to_bits(codes, groups), given_bits)


@pytest.mark.parametrize(("bits", "sizes"), [(1, 2), (14, 2**14), (31, 2**31), (32, (2**16, 2**16)), (64, (2**21, 2**21, 2**22))])
def test_sizes(bits, sizes):
    assert bit_sizes(bits) == sizes


@given(st.lists(st.integers(0, 7), min_size=0, max_size=4), st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_grids_of_several_indices(leading, seed):
    sizes, count = (4, 8, 2), math.prod(leading)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(n, (count,), generator=generator) for n in sizes], 1)
    grid = to_grid(codes, leading, sizes)
    batch, height, width = grid_shape(leading)
    assert grid.shape == (batch, height, 3 * width)
    assert torch.equal(from_grid(grid, count, sizes), codes)
    if grid.numel():
        assert int(grid.max()) < 14
        with pytest.raises(tersor.CorruptPayloadError, match="wrong order"):
            from_grid(grid.flip(2), count, sizes)


def test_which_grids_stay_grids():
    for leading in ((32, 32), (3, 128, 192), (43, 1), (1, 128), (7, 100, 1600), (2, 5)):
        assert grid_shape(leading) == (math.prod(leading[:-2]), *leading[-2:])
    assert grid_shape((1000, 1)) == (16, 1, 63)
    assert grid_shape((64,)) == (1, 1, 64)
    assert grid_shape(()) == (1, 1, 1)
    assert grid_shape((2, 100, 1601)) == grid_shape((320_200,))
