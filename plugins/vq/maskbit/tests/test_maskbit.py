import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms
from tersor_maskbit import BitGenerator
from tersor_maskbit.generator import masked_share


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_conformance():
    assert_conforms("maskbit", max_examples=3, fresh_process=False)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 30), st.integers(0, 1000))
@settings(deadline=None, max_examples=30)
def test_codes_are_signs(bits, dim, count, seed):
    layer = tersor.quantizer("maskbit", bits=bits, groups=min(3, bits), dim=dim, seed=seed, group=7).layer()
    x = vectors(count, dim, seed=seed)
    values, codes, loss = layer(x)
    z = x.double() @ layer.project_in.weight.double().T + layer.project_in.bias.double()
    clear = (z.abs() > 1e-4).all(1)
    expected = z.sign() @ layer.project_out.weight.double().T + layer.project_out.bias.double()
    torch.testing.assert_close(values[clear], expected[clear].float(), rtol=1e-4, atol=1e-5)
    joined = codes if codes.ndim == 1 else (codes[:, 0] << int(np.log2(layer.sizes[1]))) + codes[:, 1]
    for row, code in zip(z[clear], joined[clear], strict=True):
        assert format(int(code), f"0{bits}b") == "".join("01"[int(e > 0)] for e in row)
    assert loss.isfinite()


def test_the_loss_is_that_of_the_paper():
    """Softmax over all codes of 2 z . c / temperature, in float64, and its gradients; straight through the signs."""
    layer = tersor.quantizer("maskbit", bits=6, dim=7, entropy=0.5, gamma=0.7, temperature=0.3, commitment=0.4).layer()
    x, weights = vectors(40, 7).requires_grad_(), vectors(40, 7, seed=1)
    values, codes, loss = layer(x)
    (loss + (values * weights).sum()).backward()
    r = x.detach().double().requires_grad_()
    z = r @ layer.project_in.weight.detach().double().T + layer.project_in.bias.detach().double()
    every = torch.tensor([[2.0 * (c >> (5 - d) & 1) - 1 for d in range(6)] for c in range(64)]).double()
    p = (2 * z @ every.T / 0.3).softmax(1)
    entropy = torch.special.entr(p).sum(1).mean() - 0.7 * torch.special.entr(p.mean(0)).sum()
    expected = 0.4 * (z.sign() - z).square().mean() + 0.5 * entropy
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    (expected + ((z @ layer.project_out.weight.detach().double().T) * weights).sum()).backward()
    torch.testing.assert_close(x.grad.double(), r.grad, rtol=1e-3, atol=1e-4)
    assert torch.equal(codes, p.argmax(1))


def test_settings_and_states_that_do_not_fit():
    with pytest.raises(tersor.ConfigError, match="allowed: groups of 1 to 16 bits"):
        tersor.quantizer("maskbit", bits=40)
    with pytest.raises(tersor.ConfigError, match="no multiple of heads=3"):
        tersor.quantizer("maskbit", heads=3)
    with pytest.raises(tersor.StateError, match="no state of this layer"):
        tersor.quantizer("maskbit", bits=5, dim=4).with_layer(tersor.quantizer("maskbit", bits=6, dim=4).layer())


# -- the generator


def small(**given_settings):
    method = tersor.quantizer("maskbit", **{"bits": 6, "dim": 8, "width": 32, "depth": 1, "steps": 250, **given_settings})
    return method.with_layer(method.layer())


def test_masked_bits_are_zeros_and_say_nothing():
    torch.manual_seed(0)
    network = BitGenerator([3, 2], 9, 16, 1, 2).eval()
    tokens = torch.rand(4, 9, 5) < 0.5
    masked = torch.rand(4, 9, 2) < 0.5
    seen = []
    network.inputs.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    scores = network(tokens, masked)
    assert [s.shape for s in scores] == [(4, 9, 8), (4, 9, 4)]
    bits = torch.where(tokens, 1.0, -1.0)
    bits[..., :3][masked[..., 0]] = 0
    bits[..., 3:][masked[..., 1]] = 0
    assert torch.equal(seen[0], bits)
    other = tokens ^ torch.cat([masked[..., :1].expand(-1, -1, 3), masked[..., 1:].expand(-1, -1, 2)], 2)
    for a, b in zip(scores, network(other, masked), strict=True):
        assert torch.equal(a, b)


def test_the_schedule_masks_all_at_first_and_none_at_last():
    r = torch.linspace(0, 1, 11)
    share = masked_share(r)
    assert share[0] == 1
    assert share[-1] == 0
    torch.testing.assert_close(torch.cos(share * math.pi / 2), r)


def test_the_loss_is_the_cross_entropy_of_masked_groups():
    torch.manual_seed(0)
    network = BitGenerator([2, 2], 6, 16, 1, 2).eval()
    tokens = torch.rand(5, 6, 4) < 0.5
    total, count = network.loss(tokens, torch.Generator().manual_seed(3), smoothing=0.0)
    generator = torch.Generator().manual_seed(3)
    share = torch.acos(torch.rand(5, 1, 1, generator=generator)) / (math.pi / 2)
    masked = torch.rand(5, 6, 2, generator=generator) < share
    expected = 0.0
    scores = network(tokens, masked)
    for n, t, g in masked.nonzero().tolist():
        wanted = 2 * int(tokens[n, t, 2 * g]) + int(tokens[n, t, 2 * g + 1])
        expected -= float(scores[g][n, t].log_softmax(0)[wanted].detach())
    assert int(count) == int(masked.sum())
    assert float(total.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="module", params=[False, True], ids=["bits", "embedding"])
def learned(request):
    """Grids whose tokens are all one of two, chosen by chance: a neighbour tells everything."""
    method = small(embedding=request.param, steps=120)
    two = torch.tensor([13, 50])[torch.randint(2, (64,), generator=torch.Generator().manual_seed(0))]
    return method.fit_generator(two[:, None, None].expand(64, 3, 3), smoothing=0.0, rate=3e-3)


def test_the_generator_learns_and_samples_what_it_learned(learned):
    codes = torch.tensor([13, 50, 13, 50])[:, None, None].expand(4, 3, 3)
    # of one bit a grid, a group that is masked beside others costs next to none
    assert learned.cross_entropy(codes) < 0.9
    assert learned.cross_entropy(torch.randint(64, (4, 3, 3))) > 3
    drawn = learned.sample((40, 3, 3), steps=18, seed=1)
    assert drawn.shape == (40, 3, 3)
    whole = (drawn == drawn[:, :1, :1]).flatten(1).all(1) & torch.isin(drawn[:, 0, 0], torch.tensor([13, 50]))
    assert float(whole.float().mean()) > 0.5
    assert set(drawn[whole][:, 0, 0].tolist()) == {13, 50}
    assert torch.equal(drawn, learned.sample((40, 3, 3), steps=18, seed=1))
    assert not torch.equal(drawn, learned.sample((40, 3, 3), steps=18, seed=2))


def test_samples_of_any_count_and_number_of_steps(learned):
    for count, steps in ((0, 3), (1, 1), (2, 100)):
        assert learned.sample((count, 3, 3), steps).shape == (count, 3, 3)
    with pytest.raises(tersor.InputError, match="the generator makes N x 3 x 3"):
        learned.sample((1, 3, 4))
    with pytest.raises(tersor.InputError, match="labels are int64"):
        learned.sample((1, 3, 3), labels=torch.tensor([0]))


def test_the_state_has_the_generator_and_quantizing_needs_none(learned, tmp_path):
    learned.save(tmp_path / "state.safetensors")
    again = learned.load(tmp_path / "state.safetensors")
    assert torch.equal(again.sample((2, 3, 3), 4), learned.sample((2, 3, 3), 4))
    x = vectors(10, 8)
    assert torch.equal(learned.dequantize(learned.quantize(x)), learned.layer(fitted=True)(x).values)
    with pytest.raises(tersor.MissingStateError, match="no generator"):
        small().sample((1, 3, 3))
    with pytest.raises(tersor.InputError, match="int64 N x H x W; given: int64 of shape \\(4,\\)"):
        learned.fit_generator(torch.zeros(4).long())
    with pytest.raises(tersor.InputError, match="codes below 64"):
        learned.fit_generator(torch.full((1, 2, 2), 64))


def test_labels_condition_the_generator():
    method = small(classes=2, steps=150, bits=40, groups=10)
    layer = method.layer(fitted=True)
    two = layer(vectors(2, 8, seed=5)).codes
    labels = torch.arange(64) % 2
    fitted = method.fit_generator(two[labels][:, None, None].expand(64, 2, 2, 2), labels, smoothing=0.0, rate=3e-3)
    wanted = torch.tensor([0, 1] * 10)
    drawn = fitted.sample((20, 2, 2), steps=4, labels=wanted, guidance=1.0)
    assert drawn.shape == (20, 2, 2, 2)
    right = (drawn == two[wanted][:, None, None]).flatten(1).all(1)
    assert float(right.float().mean()) > 0.5
    swapped = (drawn == two[1 - wanted][:, None, None]).flatten(1).all(1)
    assert not bool(swapped.any())
    with pytest.raises(tersor.InputError, match="below classes=2"):
        fitted.sample((1, 2, 2), labels=torch.tensor([2]))
