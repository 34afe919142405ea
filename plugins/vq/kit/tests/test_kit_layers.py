import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor_kit_vq import (
    Codebook,
    VectorLayer,
    bridge,
    fit_layer,
    invert,
    join,
    mean_square,
    pack_mixed,
    residual_codes,
    residual_values,
    split,
    straight_through,
    unbridge,
    unpack_mixed,
)

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=12).map(tuple)


def vectors(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


@given(SIZES, st.integers(0, 40), st.integers(0, 1000))
@settings(deadline=None)
def test_codes_of_several_indices_are_packed_and_come_back(sizes, count, seed):
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(np.stack([rng.integers(0, n, count) for n in sizes], 1))
    packed = pack_mixed(codes, sizes)
    assert torch.equal(unpack_mixed(packed, sizes, count), codes)
    assert packed.numel() <= sum(math.ceil(count * max(1, math.ceil(math.log2(max(n, 2)))) / 8) for n in sizes)
    with pytest.raises(tersor.CorruptPayloadError, match="are not those"):
        unpack_mixed(torch.cat([packed, packed.new_zeros(1)]), sizes, count)


def test_indices_that_are_no_powers_of_two_share_bits():
    codes = torch.randint(10, (800, 9), generator=torch.Generator().manual_seed(0))
    assert pack_mixed(codes, (10,) * 9).numel() == 800 * 30 // 8
    bad = pack_mixed(torch.full((1, 2), 15), (16, 16))
    with pytest.raises(tersor.CorruptPayloadError, match="of 100 codes"):
        unpack_mixed(bad, (10, 10), 1)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6).map(tuple))
@settings(deadline=None, max_examples=30)
def test_joined_indices_are_every_number_once(sizes):
    every = torch.arange(math.prod(sizes))
    assert torch.equal(join(split(every, sizes), sizes), every)


@given(st.integers(2, 40), st.integers(1, 4), st.integers(1, 6), st.integers(0, 1000))
@settings(deadline=None, max_examples=25)
def test_residual_codes_come_back_from_their_sums(size, depth, dim, seed):
    books = [vectors(size, dim, seed + i) * 0.6**i for i in range(depth)]
    codes = residual_codes(vectors(60, dim, seed + 99), books)
    values = residual_values(codes, books)
    assert torch.equal(residual_values(invert(values, books), books), values)
    with pytest.raises(tersor.InputError, match=f"no sums of {depth} codewords"):
        invert(values + 0.37, books)


def test_a_map_to_more_dimensions_is_undone():
    torch.manual_seed(0)
    x = vectors(20, 5)
    for there in (5, 6, 12):
        module = bridge(5, there)
        torch.testing.assert_close(unbridge(module, module(x).detach()), x, rtol=1e-4, atol=1e-5)


def test_dead_codewords_are_restarted():
    book = Codebook(6, 2, start="random")
    book.set(vectors(6, 2), torch.tensor([3.0, 0.5, 2.0, 0.1, 1.0, 0.9]))
    before, x = book.words.clone(), vectors(2, 2, 1) + 50
    assert book.restart(x) == 3
    assert torch.equal(book.words[[0, 2, 4]], before[[0, 2, 4]])
    assert bool((book.words[[1, 3, 5]] > 40).all())
    assert {tuple(w.tolist()) for w in book.words[[1, 3, 5]]} == {tuple(r.tolist()) for r in x}
    assert book.restart(x) == 0
    assert book.restart(x[:0], below=100.0) == 0
    assert Codebook(6, 2, decay=0).restart(x) == 0


class Sign(VectorLayer):
    """Signs times a learned scale."""

    def __init__(self, dim):
        super().__init__("sign", dim, (2,) * dim)
        self.scale = torch.nn.Parameter(torch.tensor(0.1))

    def _quantize(self, x):
        codes = (x > 0).long()
        values = self._values(codes)
        return straight_through(x, values.detach()) + values - values.detach(), codes, mean_square(x, x)

    def _values(self, codes):
        return (codes * 2 - 1) * self.scale


def test_the_base_of_layers():
    layer = Sign(3)
    x = vectors(10, 3).view(2, 5, 3)
    out = layer(x)
    assert out.codes.shape == (2, 5, 3)
    assert layer.bits == 3
    assert torch.equal(layer.values_to_codes(out.values), out.codes)
    assert layer.training
    for wrong, what in ((out.codes + 1, "below"), (out.codes - 1, "below"), (out.codes[..., :2], "x 3"), (x, "int64")):
        with pytest.raises(tersor.InputError, match=what):
            layer.codes_to_values(wrong)
    with pytest.raises(tersor.StateError, match="scale: missing"):
        layer.load_state_dict({})
    assert layer.load_state_dict({}, strict=False).missing_keys == ["scale"]


def test_fitting_a_layer_lessens_its_error():
    x = vectors(500, 3)
    layer = fit_layer(Sign(3), x, 200, batch=100)
    assert not layer.training
    best = float(x.abs().mean())
    assert abs(float(layer.scale.detach()) - best) < 0.05
    with pytest.raises(tersor.InputError, match="at least one vector"):
        fit_layer(Sign(3), x[:0], 5)
    with pytest.raises(tersor.InputError, match="3 dimensions"):
        fit_layer(Sign(3), x[:, :2], 5)


def test_no_vectors_have_no_error():
    empty = torch.zeros(0, 3, requires_grad=True)
    mean_square(empty, empty.detach()).backward()
    assert empty.grad.shape == (0, 3)
