"""MixLLM against its formulas written out in float64: salience, GPTQ with a searched range, integer products."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

import tersor
from tersor import Calibration
from tersor.model import compress_layers, load_layers, quantize, save_layers
from tersor.testing import assert_conforms

torch.set_num_threads(1)


def layer(out: int, columns: int, samples: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 3 + 1, generator=g) @ torch.randn(columns // 3 + 1, columns, generator=g)
    x += 0.3 * torch.randn(samples, columns, generator=g)
    x[:, ::7] *= 4
    return torch.randn(out, columns, generator=g), x


def network() -> tuple[torch.nn.Module, list[torch.Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=64)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8 if p.ndim == 2 else 1)
    return model, [torch.randint(0, 50, (2, 12)) for _ in range(4)]


def nearest(w: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, sym: bool) -> torch.Tensor:
    """Rounding of groups (rows x columns) to the levels of a range of each row; float64."""
    steps = 2**bits - 1
    if sym:
        high = torch.maximum(-low, high)
        low = -high
    scale = ((high - low) / steps).half().double()
    zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round((-low / scale).nan_to_num(0)).clamp(0, steps)
    level = (torch.round((w / scale[:, None]).nan_to_num(0)) + zero[:, None]).clamp(0, steps)
    return (level - zero[:, None]) * scale[:, None]


def clipped(w: torch.Tensor, h: torch.Tensor, bits: int, sym: bool, clip: bool) -> torch.Tensor:
    """The ratio of each row's range whose rounding costs the least output error."""
    low, high = w.amin(1).clamp(max=0), w.amax(1).clamp(min=0)
    ratios = [1 - 0.02 * i for i in range(11)] if clip else [1.0]
    costs = []
    for ratio in ratios:
        d = nearest(w, low * ratio, high * ratio, bits, sym) - w
        costs.append(torch.einsum("oi,ij,oj->o", d, h, d))
    return torch.tensor(ratios, dtype=torch.float64)[torch.stack(costs).argmin(0)]


def brain(w: torch.Tensor, x: torch.Tensor, bits: int, size: int, sym: bool, clip: bool) -> torch.Tensor:
    """Optimal brain quantization, group after group; what each column loses goes to those still to come. float64."""
    w, h, n = w.double().clone(), (x.T @ x).double(), w.shape[1]
    whole = n // size * size
    energy = h.diagonal()[:whole].view(-1, size).sum(1)
    groups = [list(range(g * size, (g + 1) * size)) for g in energy.argsort(descending=True).tolist()] + [list(range(whole, n))]
    inverse = torch.linalg.inv(h + 0.01 * h.diagonal().mean() * torch.eye(n))
    for columns in filter(None, groups):
        low, high = w[:, columns].amin(1).clamp(max=0), w[:, columns].amax(1).clamp(min=0)
        ratio = clipped(w[:, columns], h[columns][:, columns], bits, sym, clip)
        for k in columns:
            q = nearest(w[:, k : k + 1], low * ratio, high * ratio, bits, sym)[:, 0]
            w -= ((w[:, k] - q) / inverse[k, k])[:, None] * inverse[k]
            w[:, k] = q
            inverse = inverse - inverse[:, k : k + 1] * inverse[k : k + 1] / inverse[k, k]
            inverse[k], inverse[:, k] = 0, 0
    return w


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("size", [5, 8])
def test_both_parts_equal_optimal_brain_quantization(size: int, clip: bool) -> None:
    w, x = layer(12, 23)
    salient = torch.arange(12) % 4 == 1
    method = tersor.quantizer("mixllm", bits=3, high_bits=6, group_size=size, clip=clip)
    found = method.dequantize(method.quantize(w, Calibration(inputs=x, extra={"salient": salient}))).double()
    for mask, bits, sym in ((~salient, 3, False), (salient, 6, True)):
        expected = brain(w[mask], x, bits, size, sym, clip)
        assert float((found[mask] - expected).square().mean()) < 1e-3 * float((w[mask] - expected).square().mean())


def test_clip_search_by_output_error_beats_the_whole_range() -> None:
    w, x = layer(64, 96, 400)
    error = []
    for clip in (True, False):
        method = tersor.quantizer("mixllm", bits=3, high=0.0, group_size=32, clip=clip)
        error.append(float((x[200:] @ (w - method.dequantize(method.quantize(w, x[:200]))).T).square().sum()))
    assert error[0] < 0.97 * error[1]


def test_salience_is_the_taylor_expansion_of_the_loss_over_sequences() -> None:
    model, batches = network()
    names = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n}
    loss = lambda i: model(batches[i], labels=batches[i]).loss  # noqa: E731

    class View(SimpleNamespace):
        def __len__(self) -> int:
            return len(batches)

    view = View(module=model, layers={f"{n}.weight": m for n, m in names.items()}, loss=loss)
    method = tersor.quantizer("mixllm", bits=3, group_size=16, high=0.2)
    rtn = tersor.quantizer("rtn", bits=3, group_size=16)
    expected = {}
    for name, module in names.items():
        change = rtn.dequantize(rtn.quantize(module.weight.detach())) - module.weight.detach()
        score = torch.zeros(len(change), dtype=torch.float64)
        for i in range(len(batches)):
            (gradient,) = torch.autograd.grad(loss(i), module.weight)
            for row in range(len(change)):
                first = float(gradient[row].double() @ change[row].double())
                score[row] += abs(first + 0.5 * first**2)
        expected[f"{name}.weight"] = score
    before = {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    found = method._salience(view)
    assert before == {n: (p.requires_grad, p.grad) for n, p in model.named_parameters()}
    for name, score in expected.items():
        assert torch.allclose(found[name].double(), score, rtol=1e-3, atol=1e-6), name

    chosen = method._study(view)
    everything = torch.cat(list(expected.values()))
    limit = everything.topk(round(0.2 * len(everything))).values[-1]
    assert all(torch.equal(chosen[n]["salient"], s >= limit * 0.9999) for n, s in expected.items())
    shares = {int(c["salient"].sum()) / len(c["salient"]) for c in chosen.values()}
    assert len(shares) > 3
    each = tersor.quantizer("mixllm", bits=3, group_size=16, high=0.25, share="layer")._study(view)
    assert {int(c["salient"].sum()) / len(c["salient"]) for c in each.values()} == {0.25}


def test_a_network_gets_the_fraction_of_rows_and_its_own_layers(tmp_path) -> None:
    model, batches = network()
    method = tersor.quantizer("mixllm", group_size=16, high=0.1)
    plain, mixed = copy.deepcopy(model), copy.deepcopy(model)
    payloads = quantize(plain, method, batches)
    masks = [torch.from_numpy(p.parts["salient"]) if not isinstance(p.parts["salient"], torch.Tensor) else p.parts["salient"]
             for p in payloads.values()]  # fmt: skip
    rows = sum(p.spec.shape[0] for p in payloads.values())
    assert sum(int(b).bit_count() for m in masks for b in m) == round(0.1 * rows)

    compress_layers(mixed, method, batches)
    one, two = plain(batches[0]).logits.detach(), mixed(batches[0]).logits.detach()
    assert 0 < float((one - two).norm()) < 0.1 * float(one.norm())
    for name, payload in payloads.items():
        if ".layers.0." not in name:
            continue  # later blocks are calibrated on what the 8-bit activations of the first one give
        weight = mixed.get_submodule(name.removesuffix(".weight")).weight
        assert torch.allclose(weight, method.dequantize(payload), atol=1e-6)
    again = load_layers(network()[0], save_layers(mixed, tmp_path / "mixed.safetensors"))
    assert torch.equal(again(batches[0]).logits, two)
    assert torch.equal(copy.deepcopy(mixed)(batches[0]).logits, two)
    half = copy.deepcopy(mixed).bfloat16()
    assert half(batches[0]).logits.dtype == torch.bfloat16
    assert half.model.layers[0].mlp.up_proj.low_scale.dtype == torch.float16


@pytest.mark.parametrize(("bits", "size"), [(4, 8), (3, -1), (7, 16)])
def test_layer_is_the_product_of_rounded_activations(bits: int, size: int) -> None:
    w, x = layer(10, 30)
    method = tersor.quantizer("mixllm", bits=bits, group_size=size, high=0.3)
    payload = method.quantize(w, x)
    bias = torch.randn(10, generator=torch.Generator().manual_seed(3))
    module = method.module(payload, bias)
    values = method.dequantize(payload)
    span = 30 if size == -1 else size
    rounded = torch.cat([(p / (s := p.abs().amax(1, keepdim=True) / 127)).round() * s for p in x.split(span, 1)], 1)
    assert torch.allclose(module(x), rounded @ values.T + bias, rtol=1e-3, atol=1e-2)
    x.requires_grad_(True)
    module(x).sum().backward()
    assert torch.allclose(x.grad, values.sum(0).expand(x.shape), atol=1e-4)
    module.low_scale.mul_(2)
    mask = (module.weight - 2 * values).abs().amax(1) < 1e-4
    assert int(mask.sum()) == 7


def test_levels_for_engines_are_the_values() -> None:
    w, x = layer(20, 30)
    method = tersor.quantizer("mixllm", bits=3, group_size=8, high=0.3)
    payload = method.quantize(w, x)
    levels = method.uniform(payload)
    group = torch.arange(30) // 8
    values = (levels.codes - levels.zero[:, group]) * levels.scale[:, group]
    assert levels.bits == 8
    assert torch.allclose(values, method.dequantize(payload), atol=1e-6)


def test_eight_low_bits_are_decoded_and_multiplied_as_floats() -> None:
    w, x = layer(10, 30)
    method = tersor.quantizer("mixllm", bits=8, group_size=8)
    payload = method.quantize(w, x)
    assert torch.allclose(method.module(payload)(x), x @ method.dequantize(payload).T, atol=1e-3)


def test_alone_the_rows_of_the_most_output_error_are_salient() -> None:
    w, x = layer(40, 50)
    rtn = tersor.quantizer("rtn", group_size=16)
    error = (x @ (w - rtn.dequantize(rtn.quantize(w))).T).square().sum(0)
    method = tersor.quantizer("mixllm", group_size=16, high=0.1)
    back = method.dequantize(method.quantize(w, x))
    largest = error.topk(4).indices
    rest = [i for i in range(40) if i not in largest.tolist()]
    loss = (x @ (w - back).T).square().sum(0)
    assert float(loss[largest].max()) < 0.1 * float(loss[rest].min())


def test_size_is_two_streams_and_a_bit_for_each_row() -> None:
    w, x = layer(80, 576, 50)
    codes = tersor.quantizer("mixllm").quantize(w, x)
    parts = 72 * 576 / 2 + 72 * 5 * 2.5 + 8 * 576 + 8 * 5 * 2 + 10
    assert parts <= codes.nbytes <= parts + 350
    whole = tersor.quantizer("mixllm", high=0.0).quantize(w, x).nbytes
    assert abs(whole - tersor.quantizer("gptq", act_order=False).quantize(w, x).nbytes) < 100


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (3, 17)])
def test_extreme_weights_and_shapes(scale: float, shape: tuple[int, int]) -> None:
    w, x = layer(*shape)
    method = tersor.quantizer("mixllm", group_size=8, high=0.4)
    back = method.dequantize(method.quantize(w * scale, x))
    assert float((back / scale - w).abs().max()) < 0.6 * float(w.abs().max())
    assert torch.equal(method.dequantize(method.quantize(w * 0, x)), w * 0)
    for dtype in (torch.float16, torch.bfloat16):
        assert method.dequantize(method.quantize(w.to(dtype), x)).dtype == dtype


def test_few_samples_and_dead_columns() -> None:
    w, x = layer(6, 20)
    x[:, [2, 5]] = 0
    method = tersor.quantizer("mixllm", group_size=8)
    back = method.dequantize(method.quantize(w, x[:1]))
    assert bool(torch.isfinite(back).all())
    assert not bool(back[:, [2, 5]].any())


def test_wrong_settings_inputs_and_calibration() -> None:
    w, x = layer(4, 10)
    for wrong in (
        {"bits": 1},
        {"high_bits": 9},
        {"bits": 5, "high_bits": 4},
        {"group_size": 0},
        {"high": 1.5},
        {"share": "block"},
    ):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("mixllm", **wrong)
    method = tersor.quantizer("mixllm")
    with pytest.raises(tersor.InputError):
        method.quantize(w * float("nan"), x)
    for data in (None, Calibration(), x[:, :5], x * 0, Calibration(gram=torch.eye(9)), Calibration(gram=1 - 3 * torch.eye(10)),
                 Calibration(inputs=x, extra={"salient": torch.ones(3, dtype=torch.bool)}),
                 Calibration(inputs=x, extra={"salient": torch.ones(4)})):  # fmt: skip
        with pytest.raises(tersor.CalibrationError):
            method.quantize(w, data)


def test_conformance() -> None:
    assert_conforms("mixllm", max_examples=3, fresh_process=False)
