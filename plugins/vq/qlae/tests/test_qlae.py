import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor.testing import assert_conforms
from tersor_qlae import explicitness, infomec, normalized_information, parameter_groups
from tersor_qlae.sprites import SOURCES, every_combination, render


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_conformance():
    assert_conforms("qlae", max_examples=3, fresh_process=False)


@given(st.integers(1, 40), st.integers(1, 7), st.integers(0, 60), st.integers(0, 1000))
@settings(deadline=None, max_examples=40)
def test_each_dimension_takes_its_nearest_level(values, dim, count, seed):
    layer = tersor.quantizer("qlae", values=values, dim=dim, quantization=0.5, commitment=2.0).layer()
    start = layer.levels.detach().clone()
    torch.testing.assert_close(start, (torch.arange(values) / max(values - 1, 1) - 0.5 * (values > 1)).repeat(dim, 1))
    with torch.no_grad():  # no order, some twice
        layer.levels.copy_(normal(dim, values, seed=seed).mul(3).round() / 2)
    x = normal(count, dim, seed=seed + 1)
    out, codes, loss = layer(x)
    distances = (x.double()[:, :, None] - layer.levels.double()).abs()
    torch.testing.assert_close(distances.gather(2, codes[:, :, None])[:, :, 0], distances.amin(2), rtol=0, atol=1e-6)
    assert torch.equal(out, layer.levels.gather(1, codes.T).T)
    torch.testing.assert_close(loss, 2.5 * (out - x).square().mean() if count else torch.tensor(0.0))


def test_levels_one_float_apart_or_at_the_ends_of_float32_find_themselves():
    layer = tersor.quantizer("qlae", values=6, dim=2).layer()
    one = torch.tensor(1.0)
    near = torch.nextafter(one, torch.tensor(2.0))
    with torch.no_grad():
        layer.levels[0] = torch.stack([near, one, -one, torch.nextafter(near, torch.tensor(2.0)), one * 0, one * 1e-45])
        layer.levels[1] = torch.tensor([3.4e38, -3.4e38, 1.0, 1.0, -1e-45, 3.3e38])
    codes = torch.arange(6)[:, None].expand(6, 2)
    values = layer.codes_to_values(codes)
    again = layer.values_to_codes(values)
    assert torch.equal(layer.codes_to_values(again), values)
    assert torch.equal(again[:, 0], codes[:, 0])


def test_gradients_are_those_of_the_two_losses_and_pass_straight_through():
    layer = tersor.quantizer("qlae", values=5, dim=3, quantization=0.5, commitment=0.25).layer()
    x = normal(10, 3, seed=1).requires_grad_()
    values, codes, loss = layer(x)
    weights = normal(10, 3, seed=2)
    ((values * weights).sum() + loss).backward()
    q = values.detach()
    torch.testing.assert_close(x.grad, weights + 0.25 * 2 * (x.detach() - q) / 30)
    expected = torch.zeros(3, 5)
    for n in range(10):
        for d in range(3):
            expected[d, codes[n, d]] += 0.5 * 2 * (q[n, d] - x.detach()[n, d]) / 30
    torch.testing.assert_close(layer.levels.grad, expected)


def test_fit_comes_to_the_levels_of_lloyd_and_max():
    # the best four levels of a normal variable are at 0.4528 and 1.510 deviations, with an error of 0.1175 of the variance (Max 1960)
    vectors = normal(20000, 2) * torch.tensor([1e-3, 50.0]) + torch.tensor([0.0, 1000.0])
    method = tersor.quantizer("qlae", values=4, dim=2, steps=600).fit([vectors])
    relative = (method.state["levels"] - torch.tensor([[0.0], [1000.0]])) / torch.tensor([[1e-3], [50.0]])
    torch.testing.assert_close(
        relative.sort(1).values, torch.tensor([-1.510, -0.4528, 0.4528, 1.510]).expand(2, 4), rtol=0.03, atol=0.03
    )
    error = (method.dequantize(method.quantize(vectors)) - vectors).square().mean(0) / vectors.var(0)
    torch.testing.assert_close(error, torch.full((2,), 0.1175), rtol=0.03, atol=0)
    assert method.quantize(vectors).nbytes < 20000 * 4 / 8 + 400


def test_fit_of_few_equal_or_large_vectors():
    one = tersor.quantizer("qlae", values=4, dim=3, steps=3).fit([torch.tensor([[1.0, -2.0, 1e30]])])
    assert torch.equal(one.dequantize(one.quantize(torch.tensor([[1.0, -2.0, 1e30]]))), torch.tensor([[1.0, -2.0, 1e30]]))
    large = tersor.quantizer("qlae", values=4, dim=2, steps=3).fit([normal(50, 2) * 1e37])
    assert bool(torch.isfinite(large.state["levels"]).all())
    for poor in (torch.zeros(0, 3), torch.full((2, 3), math.nan)):
        with pytest.raises(tersor.InputError):
            tersor.quantizer("qlae", values=4, dim=3).fit([poor])


def test_equal_bits_and_a_bridge_to_other_dimensions():
    method = tersor.quantizer("qlae")
    assert [str(m) for m in method.at_code_bits(10, 32)] == ["qlae:values=4,dim=5,quantization=0.25,commitment=0.25"]
    for bits in range(1, 17):
        (m,) = method.at_code_bits(bits, 32)
        assert 2 ** (bits - 0.75) < m.values**m.dim <= 2**bits
    layer = method.at_code_bits(10, 32)[0].layer(32)
    assert (layer.dim, layer.sizes, layer.bits) == (32, (4,) * 5, 10.0)
    out = layer.eval()(normal(3, 7, 32))
    assert torch.equal(layer.codes_to_values(out.codes), out.values)
    assert torch.equal(layer.values_to_codes(out.values), out.codes)
    with pytest.raises(tersor.InputError, match="dim=12"):
        method.layer(32, fitted=True)


def test_weight_decay_is_of_all_but_biases_and_levels():
    layer = tersor.quantizer("qlae", dim=4, values=3).layer(6)
    model = torch.nn.Sequential(torch.nn.Linear(2, 6), layer, torch.nn.Linear(6, 2))
    decayed, free = parameter_groups(model, 0.3)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert {tuple(p.shape) for p in decayed["params"]} == {(6, 2), (2, 6), (4, 6), (6, 4)}
    assert {id(p) for p in free["params"]} == {id(p) for n, p in model.named_parameters() if n.endswith(("bias", "levels"))}
    optimizer = torch.optim.AdamW(parameter_groups(model), 1e-3)
    optimizer.step()
    with pytest.raises(tersor.InputError, match="weight_decay"):
        parameter_groups(model, -1.0)


# -- InfoMEC


def test_information_of_codes_by_hand():
    # source a is the first code; of b it knows nothing; the second code tells b's value 0 from 1 and 2
    a, b = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    codes = torch.stack([a * 3, (b > 0).long(), torch.zeros(6, dtype=torch.int64)], 1)
    share = (math.log(3) - 2 / 3 * math.log(2)) / math.log(3)
    known = normalized_information(torch.stack([a, b], 1), codes, True)
    torch.testing.assert_close(known, torch.tensor([[1, 0, 0], [0, share, 0]], dtype=torch.float64), rtol=0, atol=1e-12)
    found = infomec(torch.stack([a, b], 1), codes, True)
    assert found.active.tolist() == [True, True, False]
    assert found.modularity == pytest.approx(1)
    assert found.compactness == pytest.approx(1)
    # a is read without loss; b as far as its code goes: ln 3 - (1/3 0 + 2/3 ln 2) of ln 3
    assert found.explicitness == pytest.approx((1 + share) / 2, abs=0.01)


def test_modularity_and_compactness_by_hand():
    a, b = (torch.arange(64) // 8 % 4), torch.arange(64) % 4
    # the latent knows both sources alike: not modular, and each source is known to it alone; the others know one each
    both = infomec(torch.stack([a, b], 1), torch.stack([a * 4 + b, a], 1), True)
    torch.testing.assert_close(both.information, torch.tensor([[1.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    assert both.modularity == pytest.approx(((1 / 2 + 1) / 2 - 1 / 2) / (1 / 2))
    assert both.compactness == pytest.approx(((1 / 2 + 1) / 2 - 1 / 2) / (1 / 2))
    # three latents with the same: every source is spread over three, each latent is of one source
    spread = infomec(torch.stack([a, b], 1), torch.stack([a, a, a, b, b, b], 1), True)
    assert spread.modularity == pytest.approx(1)
    assert spread.compactness == pytest.approx((1 / 3 - 1 / 6) / (5 / 6))
    assert spread.explicitness > 0.99


def test_undefined_scores_are_nan_and_a_latent_that_knows_nothing_counts_nothing():
    a, b = torch.arange(32) // 4 % 2, torch.arange(32) % 2
    assert math.isnan(infomec(a[:, None], torch.stack([a, b], 1), True).modularity)
    assert math.isnan(infomec(torch.stack([a, b], 1), a[:, None], True).compactness)
    dead = infomec(torch.stack([a, b], 1), torch.zeros(32, 3), True)
    assert math.isnan(dead.modularity)
    assert dead.explicitness == pytest.approx(0, abs=1e-6)
    ignorant = infomec(torch.stack([a, b], 1), torch.stack([a, torch.arange(32) // 2 % 2], 1), True)
    assert ignorant.modularity == pytest.approx(0.5)


def test_information_of_continuous_latents_is_near_that_of_normal_mixtures():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(0, 2, (6000,), generator=generator)
    z = classes * 3.0 + torch.randn(6000, generator=generator)
    # the exact information of two normals three deviations apart, by quadrature
    t = torch.linspace(-8, 11, 20001, dtype=torch.float64)
    p = torch.stack([torch.exp(-((t - m) ** 2) / 2) / math.sqrt(2 * math.pi) for m in (0, 3)])
    exact = float((0.5 * p * (p / p.mean(0)).log()).sum() * (t[1] - t[0]))
    found = normalized_information(
        classes[:, None], torch.stack([z, z * -1e4 + 7, torch.randn(6000, generator=generator)], 1), False
    )
    assert found[0, 0] == pytest.approx(exact / math.log(2), abs=0.02)
    assert found[0, 1] == pytest.approx(float(found[0, 0]), abs=1e-3)
    assert found[0, 2] < 0.01


def test_nearest_neighbours_by_definition():
    generator = torch.Generator().manual_seed(3)
    classes = torch.cat([torch.randint(0, 3, (60,), generator=generator), torch.tensor([7])])  # the last is alone in its class
    z = torch.randn(61, generator=generator, dtype=torch.float64)
    k, psi = 4, lambda n: float(torch.digamma(torch.tensor(float(n), dtype=torch.float64)))
    kept = classes != 7
    x, c = z[kept], classes[kept]
    total = psi(len(x))
    for i in range(len(x)):
        own = (x[c == c[i]] - x[i]).abs().sort().values
        nearer = int(((x - x[i]).abs() < own[k]).sum())  # with itself
        total += (psi(k) - psi(int((c == c[i]).sum())) - psi(nearer)) / len(x)
    entropy = -sum(p * math.log(p) for p in (float((classes == v).double().mean()) for v in classes.unique()))
    found = normalized_information(classes[:, None], z[:, None], False, neighbours=k)
    assert float(found) == pytest.approx(total / entropy, abs=1e-6)


def test_explicitness_weighs_classes_alike_by_hand():
    # 60 of class 0, 20 of class 1; code 1 has 12 and 16 of them. Weights of 80 / (2 n) make 48/60 to 4/20 of code 0, 12/60 to 16/20 of code 1
    classes = torch.tensor([0] * 60 + [1] * 20)
    codes = torch.tensor([0] * 48 + [1] * 12 + [0] * 4 + [1] * 16)
    loss = -(48 * math.log(0.8) + 4 * math.log(0.2) + 12 * math.log(0.2) + 16 * math.log(0.8)) / 80
    assert explicitness(classes[:, None], codes[:, None], True) == pytest.approx(1 - loss / math.log(2), abs=1e-4)
    # a continuous latent of two values tells as much
    assert explicitness(classes[:, None], codes[:, None] * -3.0 + 1, False) == pytest.approx(1 - loss / math.log(2), abs=1e-4)


@pytest.mark.parametrize(
    ("sources", "latents", "message"),
    [
        (torch.zeros(5, 2), torch.zeros(5, 2), "two different values"),
        (torch.arange(5), torch.zeros(5, 2), "samples x variables"),
        (torch.arange(5)[:, None], torch.zeros(4, 2), "same samples"),
        (torch.arange(5)[:, None], torch.full((5, 2), math.nan), "NaN"),
    ],
)
def test_poor_input_is_refused(sources, latents, message):
    with pytest.raises(tersor.InputError, match=message):
        infomec(sources, latents, True)


def test_pictures_differ_by_their_sources_alone():
    sources = every_combination()
    assert len(sources) == math.prod(SOURCES.values()) == len(sources.unique(dim=0))
    assert every_combination(("x", "y")).unique(dim=0).shape == (36, 6)
    chosen = sources[torch.randperm(len(sources), generator=torch.Generator().manual_seed(0))[:500]]
    pictures = render(chosen)
    assert pictures.shape == (500, 3, 16, 16)
    assert float(pictures.min()) >= 0
    assert float(pictures.max()) <= 1
    assert len((pictures * 255).round().flatten(1).unique(dim=0)) == 500
    assert torch.equal(render(chosen[:3]), pictures[:3])
    # the middle of the shape is where x and y say, and has its colour
    one = render(torch.tensor([[1, 2, 0, 5, 0, 3]]))[0]
    assert one[:, 12, 4].tolist() == pytest.approx([1, 0.2, 0.2])
