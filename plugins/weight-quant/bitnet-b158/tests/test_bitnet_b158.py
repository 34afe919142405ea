"""BitNet b1.58 against the paper's formulas; layers that train, and what they become."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

import tersor
from tersor.model import compress_layers, load_layers, save_layers
from tersor.testing import assert_conforms
from tersor_bitnet_b158 import BitLinear
from tersor_bitnet_b158.bitnet import TernaryLinear, pack_ternary, unpack_ternary

torch.set_num_threads(1)
QUICK = settings(max_examples=30, deadline=None)


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def method(measure: str = "median"):
    return tersor.quantizer("bitnet-b158", measure=measure)


@QUICK
@given(count=st.integers(0, 60), seed=st.integers(0, 99))
def test_five_digits_a_byte(count: int, seed: int) -> None:
    digits = torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
    packed = pack_ternary(digits)
    assert len(packed) == -(-count // 5)
    for i, byte in enumerate(packed.tolist()):
        five = [int(d) + 1 for d in digits[5 * i : 5 * i + 5]]
        assert byte == sum(d * 3**k for k, d in enumerate(five + [1] * (5 - len(five))))
    assert torch.equal(unpack_ternary(packed, count), digits)


@pytest.mark.parametrize("measure", ["mean", "median"])
def test_values_are_the_papers(measure: str) -> None:
    w = rand(31, 47)
    size = w.abs().double()
    s = float(size.mean() if measure == "mean" else size.flatten().sort().values[(size.numel() - 1) // 2])
    codes = method(measure).quantize(w)
    found = method(measure).dequantize(codes)
    assert torch.allclose(found.double(), (w.double() / s).round().clamp(-1, 1) * s, rtol=1e-6)
    assert codes.nbytes - 31 * 47 / 5 < 150
    uniform = method(measure).uniform(codes)
    assert torch.equal(uniform.dense(), found)
    assert int(uniform.codes.max()) == 2


def test_a_large_matrix_takes_1_6_bits() -> None:
    assert 1.6 < method().quantize(rand(576, 1536)).bits_per_element < 1.602


def test_scales_of_unusual_matrices() -> None:
    sparse = torch.zeros(10, 10)
    sparse[0, :4] = torch.tensor([3.0, -3.0, 0.01, 5.0])  # the median is 0: the mean stands in
    assert torch.allclose(method().dequantize(method().quantize(sparse))[0, :4], torch.tensor([1.0, -1.0, 0.0, 1.0]) * 0.1101)
    for measure in ("mean", "median"):
        m = method(measure)
        assert not bool(m.dequantize(m.quantize(torch.zeros(3, 4))).any())
        for size in (1e-38, 1e-30, 1e38):
            back = m.dequantize(m.quantize(rand(9, 9).clamp(-3, 3) * size))
            assert bool(back.isfinite().all())
            assert torch.allclose(back / size, m.dequantize(m.quantize(rand(9, 9).clamp(-3, 3))), rtol=1e-3)
        half = m.quantize(torch.full((2, 2), 65504.0, dtype=torch.float16))
        assert torch.equal(m.dequantize(half), torch.full((2, 2), 65504.0, dtype=torch.float16))


@pytest.mark.parametrize("measure", ["mean", "median"])
@pytest.mark.parametrize("norm", [False, True])
def test_forward_and_straight_through_gradients(measure: str, norm: bool) -> None:
    layer = method(measure).layer(12, 7, norm=norm)
    assert isinstance(layer, BitLinear)
    x = rand(3, 4, 12, seed=1).requires_grad_()
    y = layer(x)
    y.backward(grad := rand(3, 4, 7, seed=2))

    again = x.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    normed = layer_norm(again, (12,)) if norm else again
    step = normed.detach().abs().amax(-1, keepdim=True) / 127
    activations = normed + ((normed / step).round() * step - normed).detach()
    size = weight.detach().abs()
    s = size.mean() if measure == "mean" else size.median()
    ternary = weight + ((weight / s).round().clamp(-1, 1) * s - weight).detach()
    plain = activations @ ternary.T + layer.bias.detach()
    plain.backward(grad)
    for found, true in ((y, plain), (x.grad, again.grad), (layer.weight.grad, weight.grad), (layer.bias.grad, grad.sum((0, 1)))):
        assert torch.allclose(found, true, atol=1e-5)


def test_a_network_trains_and_becomes_integers() -> None:
    torch.manual_seed(0)
    x, labels = rand(256, 16), (rand(256, 16)[:, :4].argmax(1))
    net = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    method().swap(net, keep=["4"])
    assert [type(m).__name__ for m in net] == ["BitLinear", "ReLU", "BitLinear", "ReLU", "Linear"]
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    first = float(cross_entropy(net(x), labels).detach())
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(net(x), labels).backward()
        optimizer.step()
    assert float(cross_entropy(net(x), labels).detach()) < 0.2 * first

    frozen = copy.deepcopy(net)
    payloads = compress_layers(frozen, method(), recipe={"4.weight": None})
    assert set(payloads) == {"0.weight", "2.weight"}
    assert isinstance(frozen[0], TernaryLinear)
    assert frozen[0].norm
    assert set(frozen[2].matrix().unique().tolist()) == {-1, 0, 1}
    assert torch.allclose(frozen(x), net(x), atol=0.02 * float(net(x).detach().abs().max()))
    assert float((frozen(x).argmax(1) == net(x).argmax(1)).float().mean()) > 0.98
    layer = copy.deepcopy(net[0])
    assert torch.allclose(method().module(payloads["0.weight"], net[0].bias, net[0])(x), layer(x), atol=1e-4)


def test_networks_of_ternary_layers_are_saved_and_loaded(tmp_path) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(method().layer(9, 6), nn.ReLU(), method().layer(6, 3, bias=False))
    frozen = copy.deepcopy(net)
    compress_layers(frozen, method())
    path = save_layers(frozen, tmp_path / "net.safetensors")
    fresh = nn.Sequential(method().layer(9, 6), nn.ReLU(), method().layer(6, 3, bias=False))
    load_layers(fresh, path)
    x = rand(5, 9)
    assert torch.equal(fresh(x), frozen(x))
    assert torch.allclose(fresh(x), net(x), atol=1e-5)


def test_swap_shares_weights_and_ties() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first
            self.head = nn.Linear(4, 2)

    net = Tied()
    weight = net.first.weight
    method().swap(net, keep="head", norm=False)
    assert net.first is net.second
    assert net.first.weight is weight
    assert type(net.head) is nn.Linear
    with pytest.raises(tersor.ConfigError, match="no torch"):
        method().swap(nn.ReLU())
    half = BitLinear(4, 3, dtype=torch.bfloat16)
    half(rand(2, 4).bfloat16()).sum().backward()
    assert half.weight.grad.dtype == torch.bfloat16
    torch.save(half.state_dict(), io.BytesIO())


def test_wrong_settings_inputs_and_files() -> None:
    with pytest.raises(tersor.ConfigError):
        tersor.quantizer("bitnet-b158", measure="max")
    with pytest.raises(tersor.ConfigError):
        BitLinear(3, 3, measure="max")
    with pytest.raises(tersor.InputError):
        method().quantize(torch.full((2, 2), torch.inf))
    codes = method().quantize(rand(4, 6))
    codes.parts["digits"] = torch.full((5,), 243, dtype=torch.uint8)
    with pytest.raises(tersor.CorruptPayloadError):
        method().dequantize(codes)
    assert [str(m) for m in type(method()).at_bits(2)] == ["bitnet-b158"]
    assert type(method()).at_bits(3) == []


def test_conformance() -> None:
    assert_conforms("bitnet-b158", max_examples=3, fresh_process=False)
