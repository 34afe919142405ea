import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms
from tersor_kit_vq import codebook_entropy, token_entropy


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_conformance():
    assert_conforms("bsq", max_examples=3, fresh_process=False)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_codes_are_the_signs_on_the_sphere(bits, dim, count, seed):
    layer = tersor.quantizer("bsq", bits=bits, dim=dim, seed=seed, group=5).layer()
    x = vectors(count, dim, seed=seed)
    values, codes, loss = layer(x)
    v = x.double() @ layer.project_in.weight.double().T + layer.project_in.bias.double()
    corners = torch.where(v > 0, 1.0, -1.0).double() / bits**0.5
    torch.testing.assert_close(corners.norm(dim=1), torch.ones(count, dtype=torch.float64))
    expected = corners @ layer.project_out.weight.double().T + layer.project_out.bias.double()
    clear = (v.abs() > 1e-4).all(1)
    torch.testing.assert_close(values[clear], expected[clear].float(), rtol=1e-4, atol=1e-5)
    joined = codes if codes.ndim == 1 else (codes[:, 0] << int(np.log2(layer.sizes[1]))) + codes[:, 1]
    for row, code in zip(v[clear], joined[clear], strict=True):
        assert format(int(code), f"0{bits}b") == "".join("01"[int(e > 0)] for e in row)
    assert loss.isfinite()


def test_the_soft_code_factorises_over_bits():
    """The definition over all corners, in float64: entropies and their gradients."""
    layer = tersor.quantizer("bsq", bits=6, dim=8, group=6, entropy=0.7, gamma=0.6, temperature=0.05, commitment=0.3).layer()
    x = vectors(50, 8).requires_grad_()
    loss = layer(x).loss
    loss.backward()
    z = x.detach().double().requires_grad_()
    v = z @ layer.project_in.weight.detach().double().T + layer.project_in.bias.detach().double()
    u = v / v.norm(dim=1, keepdim=True)
    corners = torch.tensor([[2.0 * (c >> (5 - d) & 1) - 1 for d in range(6)] for c in range(64)]).double() / 6**0.5
    p = (u @ corners.T / 0.05).softmax(1)
    entropy = torch.special.entr(p).sum(1).mean() - 0.6 * torch.special.entr(p.mean(0)).sum()
    distance = (u - corners[p.argmax(1)]).square().sum(1).mean()
    (0.7 * entropy + 0.3 * distance).backward()
    torch.testing.assert_close(loss.double(), 0.7 * entropy + 0.3 * distance, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), z.grad, rtol=1e-3, atol=1e-5)
    assert torch.equal(layer(x).codes, p.argmax(1))


def test_gradients_pass_straight_through_the_signs_and_by_the_sphere():
    layer = tersor.quantizer("bsq", bits=5, dim=7, entropy=0).layer()
    x, weights = vectors(20, 7).requires_grad_(), vectors(20, 7, seed=1)
    (layer(x).values * weights).sum().backward()
    z = x.detach().clone().requires_grad_()
    (layer.project_out(torch.nn.functional.normalize(layer.project_in(z), dim=1)) * weights).sum().backward()
    torch.testing.assert_close(x.grad, z.grad)


def test_large_and_small_vectors_keep_their_signs():
    layer = tersor.quantizer("bsq", bits=9, dim=9).layer().eval()
    with torch.no_grad():
        layer.project_in.bias.zero_()
    x = vectors(30, 9)
    expected = layer(x).codes
    for scale in (1e30, 1e-20):
        z = (x * scale).requires_grad_()
        out = layer(z)
        assert torch.equal(out.codes, expected)
        assert out.loss.isfinite()


def test_the_penalty_brings_codes_into_use():
    """Vectors around one point share few codes; the loss alone spreads them."""
    x = vectors(500, 6) * 0.3 + 2
    layer = tersor.quantizer("bsq", bits=6, dim=6, temperature=0.1).layer()

    def perplexity():
        p = torch.bincount(layer(x).codes, minlength=64) / 500
        return float(torch.special.entr(p).sum().exp())

    before = perplexity()
    optimizer = torch.optim.Adam(layer.parameters(), 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        layer(x).loss.backward()
        optimizer.step()
    assert before < 8
    assert perplexity() > 32


@pytest.fixture(scope="module")
def smooth():
    coarse = torch.rand(24, 6, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.5
    return torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear").movedim(1, -1)


def test_the_prior_leaves_fewer_bits_and_decodes_the_same(smooth):
    plain = tersor.quantizer("bsq", bits=12, dim=6)
    layer = plain.layer()
    packed = plain.with_layer(layer).quantize(smooth[20:])
    method = tersor.quantizer("bsq", bits=12, dim=6, prior="autoregressive", steps=40)
    fitted = method.with_layer(layer, [smooth[:20]])
    coded = fitted.quantize(smooth[20:])
    assert torch.equal(fitted.dequantize(coded), plain.with_layer(layer).dequantize(packed))
    assert coded.nbytes < 0.8 * packed.nbytes
    for shape in ((), (1,), (70,), (3, 2), (2, 3, 4)):
        x = vectors(*shape, 6, seed=3) if shape else vectors(1, 6)[0]
        assert torch.equal(fitted.dequantize(fitted.quantize(x)), layer.eval()(x).values)
    with pytest.raises(tersor.InputError, match="at least one vector; given: none"):
        method.with_layer(layer)
    with pytest.raises(tersor.MissingStateError, match="the state has no prior"):
        method.with_state(layer.state_dict()).quantize(smooth)
    small = tersor.quantizer("bsq", bits=11, dim=6, prior="autoregressive", steps=1).fit([smooth[:1]])
    mixed = method.with_state(layer.state_dict() | {k: v for k, v in small.state.items() if k.startswith("prior.")})
    with pytest.raises(tersor.StateError, match="needs a prior of 128 indices; the state has one of 96"):
        mixed.quantize(smooth)


def test_settings_and_states_that_do_not_fit():
    with pytest.raises(tersor.ConfigError):
        tersor.quantizer("bsq", bits=65)
    with pytest.raises(tersor.ConfigError):
        tersor.quantizer("bsq", temperature=0.0)
    with pytest.raises(tersor.StateError, match="no state of this layer"):
        tersor.quantizer("bsq", bits=5, dim=4).with_layer(tersor.quantizer("bsq", bits=6, dim=4).layer()).quantize(vectors(3, 4))
    assert tersor.quantizer("bsq", bits=5, dim=4).layer().invertible is False
    assert tersor.quantizer("bsq", bits=64).layer().bits == 64
    assert tersor.quantizer("bsq").at_code_bits(13, 32)[0].layer().bits == 13


_WORKER = """
from torch.nn.parallel import DistributedDataParallel
layer = DistributedDataParallel(tersor.quantizer("bsq", bits=6, dim=4, gamma=3.0, group=3).layer(), find_unused_parameters=True)
x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))[(0 if rank == 0 else 40) : 40]
result = layer(x)
# of the loss alone, whose codebook entropy is that of both halves; the second process has no vectors
(result.loss + 0 * result.values.sum()).backward()
out = [p.grad for p in layer.parameters()]
"""


def test_processes_share_the_codebook_entropy(in_two_processes):
    first, second = in_two_processes(_WORKER)
    layer = tersor.quantizer("bsq", bits=6, dim=4, gamma=3.0, group=3).layer()
    x = vectors(40, 4)
    u = layer.sphere(x)
    odds = layer.odds(u)
    # the token entropy is averaged over processes, of which one has none; the codebook entropy is one for both
    (0.1 * (token_entropy(odds) / 2 - 3 * codebook_entropy(odds, [3, 3]))).backward()
    for a, b, p in zip(first, second, layer.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, torch.zeros_like(p) if p.grad is None else p.grad, rtol=1e-4, atol=1e-7)
