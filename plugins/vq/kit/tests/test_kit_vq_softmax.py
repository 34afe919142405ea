"""Softmax over a codebook against autograd through the whole matrix, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor import InputError
from tersor_kit_vq import likeliest, posterior
from tersor_kit_vq import softmax as kit


def _whole(x, keys, words, bias, hard, sharpness, epsilon):
    logits = x @ keys.T + (0 if bias is None else bias)
    p, codes = logits.softmax(1), logits.argmax(1)
    onehot = torch.nn.functional.one_hot(codes, len(keys)).to(p)
    values = ((onehot + p - p.detach()) if hard else p) @ words
    q, log = (logits * sharpness).softmax(1), (logits * sharpness).log_softmax(1)
    mean = q.mean(0)
    return values, codes, -(q * log).sum(1).mean(), -(mean * (mean + epsilon).log()).sum()


@given(
    st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 33, 256, 272]), st.integers(1, 6), st.integers(1, 5)),
    st.booleans(), st.booleans(), st.sampled_from([0.0, 0.5, 4.0]), st.integers(0, 100),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_posterior_is_that_of_the_whole_matrix_and_so_is_its_gradient(shape, hard, biased, sharpness, seed):
    count, size, dim, out = shape
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, dim), (size, dim), (size, out), *([(size,)] if biased else [])]
    ours = [torch.randn(s, generator=generator).requires_grad_() for s in shapes]
    theirs = [t.detach().double().requires_grad_() for t in ours]
    weights = torch.randn(count, out, generator=generator)
    tile, kit._TILE = kit._TILE, 1 << 9  # several tiles of 16 rows or more
    try:
        got = posterior(*ours, hard=hard, sharpness=sharpness, epsilon=1e-3)
        loss = (got.values * weights).sum() + 3 * got.sample_entropy - 2 * got.mean_entropy
        loss.backward()
    finally:
        kit._TILE = tile
    values, codes, sample, mean = _whole(*theirs, *([] if biased else [None]), hard, sharpness, 1e-3)
    expected = (values * weights).sum()
    assert torch.equal(got.codes, codes)
    torch.testing.assert_close(got.values, values.float(), rtol=1e-4, atol=1e-5)
    if sharpness:
        torch.testing.assert_close(torch.stack(got[2:]), torch.stack((sample, mean)).float(), rtol=1e-4, atol=1e-5)
        expected = expected + 3 * sample - 2 * mean
    else:
        assert got.sample_entropy == 0
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-3, atol=2e-5)


def test_one_entropy_alone_and_codewords_alone():
    generator = torch.Generator().manual_seed(0)
    x, words = torch.randn(9, 3, generator=generator), torch.randn(5, 3, generator=generator)
    for which in (2, 3):
        a, b = x.clone().requires_grad_(), x.double().requires_grad_()
        posterior(a, words, words, sharpness=2.0)[which].backward()
        _whole(b, words.double(), words.double(), None, False, 2.0, 1e-5)[which].backward()
        torch.testing.assert_close(a.grad, b.grad.float(), rtol=1e-4, atol=1e-6)
    learned = words.clone().requires_grad_()
    posterior(x, words, learned).values.sum().backward()
    torch.testing.assert_close(learned.grad, (x @ words.T).softmax(1).sum(0)[:, None].expand(-1, 3))


def test_extreme_logits_and_no_vectors():
    words = torch.eye(4) * 1e4
    x = (torch.eye(4) * 1e4).requires_grad_()
    out = posterior(x, words, words, hard=True, sharpness=100.0)
    (out.values.sum() + out.sample_entropy - out.mean_entropy).backward()
    assert out.codes.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(torch.stack(out[2:]), torch.tensor([0, 4]).clamp(min=1).log(), atol=1e-3, rtol=0)
    assert torch.isfinite(x.grad).all()
    none = posterior(torch.zeros(0, 4, requires_grad=True), words, words, hard=True, sharpness=1.0)
    (none.values.sum() + none.sample_entropy + none.mean_entropy).backward()
    assert (none.values.shape, none.codes.shape) == ((0, 4), (0,))
    assert not torch.stack(none[2:]).any()


@pytest.mark.parametrize("kept", [1, 3])
@pytest.mark.parametrize("size", [5, 512])
def test_likeliest_are_the_largest_probabilities(kept, size):
    generator = torch.Generator().manual_seed(kept)
    x, keys, bias = (torch.randn(*s, generator=generator) for s in ((50, 4), (size, 4), (size,)))
    codes, ratios = likeliest(x, keys, bias, kept)
    p = (x.double() @ keys.double().T + bias).softmax(1)
    order = p.argsort(1, descending=True)[:, :kept]
    assert torch.equal(codes, order)
    torch.testing.assert_close(ratios, (p.gather(1, order) / p.amax(1, keepdim=True)).float())


def test_shapes_that_do_not_fit():
    x, words = torch.zeros(3, 2), torch.zeros(4, 2)
    for wrong in ((x, words[:, :1], words), (x, words, words[:2]), (x, words[:0], words[:0]), (x, words, words, torch.zeros(3))):
        with pytest.raises(InputError, match=r"given: \(3, 2\)"):
            posterior(*wrong)
    with pytest.raises(InputError, match="given: 5"):
        likeliest(x, words, kept=5)
