import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

import tersor
from tersor.testing import assert_conforms


def _vectors(count, dim, seed=0):
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def _paper(z, codebook, normalized, tau, temperature):
    """Values and divergence with the whole matrix, in float64; no gradient of the codewords through the probabilities."""
    words = normalize(codebook, dim=1) if normalized else codebook
    keys = words.detach()
    logits = normalize(z, dim=1) @ keys.T if normalized else -(z[:, None] - keys).square().sum(-1)
    p, q = (logits / tau).softmax(1), (logits / temperature).softmax(1)
    mean = q.mean(0)
    return p @ words, p, -(q * (logits / temperature).log_softmax(1)).sum(1).mean() + (mean * (mean + 1e-6).log()).sum()


def test_conformance():
    assert_conforms("softvq", max_examples=3, fresh_process=False)


@given(st.integers(2, 300), st.integers(2, 6), st.integers(1, 60), st.booleans(), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_training_is_that_of_the_paper_and_so_are_its_gradients(codes, dim, count, normalized, seed):
    layer = tersor.quantizer(
        "softvq", codes=codes, dim=dim, kept=1, normalize=normalized, temperature=0.5, entropy=0.3, entropy_temperature=0.2
    ).layer()
    with torch.no_grad():
        layer.codebook.copy_(_vectors(codes, dim, seed + 2))
    z = _vectors(count, dim, seed).requires_grad_()
    values, indices, loss = layer(z)
    weights = _vectors(count, dim, seed + 1)
    ((values * weights).sum() + loss).backward()
    a, b = z.detach().double().requires_grad_(), layer.codebook.detach().double().requires_grad_()
    expected, p, divergence = _paper(a, b, normalized, 0.5, 0.2)
    ((expected * weights).sum() + 0.3 * divergence).backward()
    assert torch.equal(indices, p.argmax(1))
    torch.testing.assert_close(values, expected.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(layer.soft(z), values.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss, 0.3 * divergence.float(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(z.grad, a.grad.float(), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(layer.codebook.grad, b.grad.float(), rtol=1e-2, atol=1e-3)


@given(st.integers(2, 9), st.integers(1, 8), st.integers(0, 100))
@settings(deadline=None, max_examples=20)
def test_stored_values_are_the_average_of_the_kept_by_rounded_weights(kept, bits, seed):
    layer = tersor.quantizer("softvq", codes=20, dim=5, kept=kept, weight_bits=bits, temperature=0.4, seed=seed).layer().eval()
    x = _vectors(30, 5, seed)
    values, codes, _ = layer(x)
    _, p, _ = _paper(x.double(), layer.codebook.detach().double(), True, 0.4, 1.0)
    best, order = p.topk(kept, 1)
    assert torch.equal(codes[:, :kept], order)
    rounded = (best[:, 1:] / best[:, :1] * (2**bits - 1)).round()
    assert int((codes[:, kept:] - rounded).abs().max()) <= 1
    weights = torch.cat([torch.ones(30, 1), codes[:, kept:] / (2**bits - 1)], 1)
    words = normalize(layer.codebook.detach(), dim=1)
    torch.testing.assert_close(values, (weights[..., None] * words[order]).sum(1) / weights.sum(1, keepdim=True))
    assert layer.sizes == (20,) * kept + (2**bits,) * (kept - 1)


def test_all_codewords_with_fine_weights_are_the_continuous_values():
    layer = tersor.quantizer("softvq", codes=12, dim=4, kept=12, weight_bits=16).layer().eval()
    x = _vectors(50, 4)
    torch.testing.assert_close(layer(x).values, layer.soft(x), rtol=0, atol=1e-4)
    hard = tersor.quantizer("softvq", codes=12, dim=4, kept=1).layer().eval()
    assert torch.equal(hard(x).codes, layer(x).codes[:, 0])
    assert torch.equal(hard.values_to_codes(hard(x).values), hard(x).codes)


def test_stored_in_the_bits_that_it_says():
    vectors = _vectors(1000, 8)
    for bits in (3, 10, 13):
        for method in type(tersor.quantizer("softvq")).at_code_bits(bits, 8):
            assert method.layer().bits == bits
            untrained = method.with_state(method.layer().state_dict())
            assert untrained.quantize(vectors).nbytes < 1000 * bits / 8 + 300


def test_fit_brings_the_codebook_to_the_vectors():
    vectors = normalize(_vectors(1500, 4), dim=1)
    method = tersor.quantizer("softvq", codes=64, dim=4, kept=4, steps=300)
    fitted = method.fit([vectors])
    untrained = method.with_state(method.layer().state_dict())
    error = [float((m.dequantize(m.quantize(vectors)) - vectors).square().mean()) for m in (fitted, untrained)]
    assert error[0] < 0.6 * error[1]


def test_more_kept_than_there_are():
    with pytest.raises(tersor.ConfigError, match="at most codes=3; given: 4"):
        tersor.quantizer("softvq", codes=3, kept=4)
