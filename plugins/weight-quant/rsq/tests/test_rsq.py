"""RSQ: rotation and scaling against their definitions, GPTQ against GPTQ."""

from __future__ import annotations

import math

import pytest
import torch

import tersor
from tersor import Calibration
from tersor.testing import assert_conforms
from tersor_kit_weight_quant import Rotation

torch.set_num_threads(1)


def layer(out: int, columns: int, samples: int = 300, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, columns // 3 + 1, generator=g) @ torch.randn(columns // 3 + 1, columns, generator=g)
    x += 0.3 * torch.randn(samples, columns, generator=g)
    return torch.randn(out, columns, generator=g), x


def test_without_rotation_the_file_is_that_of_gptq() -> None:
    w, x = layer(12, 50)
    for settings in (
        {},
        {"sym": True, "bits": 3},
        {"clip": False},
        {"static_groups": True},
        {"group_size": -1},
        {"act_order": False},
    ):
        settings = {"group_size": 16, "clip": True, **settings}
        rsq, gptq = tersor.quantizer("rsq", rotate=False, **settings), tersor.quantizer("gptq", **settings)
        a, b = rsq.quantize(w, x), gptq.quantize(w, x)
        assert torch.equal(rsq.dequantize(a), gptq.dequantize(b))
        assert torch.equal(rsq.uniform(a).dense(), gptq.uniform(b).dense())


def test_rotated_is_gptq_of_the_rotated_layer() -> None:
    w, x = layer(12, 60)
    q = Rotation(60, 3)
    rsq, gptq = tersor.quantizer("rsq", group_size=20, seed=3), tersor.quantizer("gptq", group_size=20, clip=True)
    codes = rsq.quantize(w, Calibration(gram=x.T @ x, count=300))
    rotated = q.forward(x)
    inner = gptq.dequantize(gptq.quantize(q.forward(w), Calibration(gram=q.conjugate(x.T @ x), count=300)))
    found = rsq.dequantize(codes)
    assert torch.allclose(found, q.inverse(inner), atol=1e-6)
    # the fused layer, which gets rotated inputs, gives the same outputs
    assert torch.allclose(x @ found.T, rotated @ inner.T, atol=1e-3)
    assert rsq.uniform(codes) is None


def test_rotation_helps_where_weights_have_outliers() -> None:
    w, x = layer(64, 144, 600)
    w[:, ::16] *= 12
    errors = []
    for settings in ({"rotate": True}, {"rotate": False}):
        rsq = tersor.quantizer("rsq", bits=3, group_size=48, clip=False, act_order=False, **settings)
        errors.append(float((x[300:] @ (w - rsq.dequantize(rsq.quantize(w, x[:300]))).T).square().sum()))
    assert errors[0] < 0.5 * errors[1]


def test_token_weights_are_attention_received_between_r_min_and_1() -> None:
    attention = torch.zeros(1, 2, 3, 3)
    attention[0, 0] = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0.4, 0.2, 0.4]])
    attention[0, 1] = torch.tensor([[1.0, 0, 0], [0.7, 0.3, 0], [0.4, 0.2, 0.4]])
    received = [4.0, 1.2, 0.8]  # summed over heads and queries, by hand
    r = [0.1 + 0.9 * (v - 0.8) / 3.2 for v in received]
    expected = [math.sqrt(v / (sum(r) / 3)) for v in r]
    found = tersor.quantizer("rsq", r_min=0.1).token_weights(attention, torch.zeros(1, 3, 8))
    assert torch.allclose(found, torch.tensor([expected]), atol=1e-6)
    assert tersor.quantizer("rsq", scale="none").token_weights is None
    even = torch.full((2, 4, 5, 5), 0.2)
    assert torch.equal(tersor.quantizer("rsq").token_weights(even, torch.zeros(2, 5, 8)), torch.ones(2, 5))
    one = tersor.quantizer("rsq", r_min=1.0).token_weights(attention, torch.zeros(1, 3, 8))
    assert torch.allclose(one, torch.ones(1, 3))
    for wrong in (attention[0], attention[:, :, :, :2], attention * float("nan")):
        with pytest.raises(tersor.CalibrationError):
            tersor.quantizer("rsq").token_weights(wrong, torch.zeros(1, 3, 8))


def test_in_a_network_important_tokens_count_more() -> None:
    transformers = pytest.importorskip("transformers")
    from tersor.model import quantize

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=40, hidden_size=24, intermediate_size=36, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.arange(40)[None] * 7 % 40
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        config._attn_implementation = "eager"
        seen = model(ids, output_attentions=True, output_hidden_states=True)
        config._attn_implementation = "sdpa"
    rsq = tersor.quantizer("rsq", bits=3, group_size=12, r_min=0.01)
    factors = rsq.token_weights(seen.attentions[0], seen.hidden_states[0])
    assert float(factors.max() / factors.min()) > 5
    rows = model.model.layers[0].input_layernorm(seen.hidden_states[0])[0] * factors[0, :, None]
    expected = rsq.dequantize(rsq.quantize(before["model.layers.0.self_attn.q_proj.weight"], rows.detach()))
    quantize(model, rsq, [ids])
    assert torch.allclose(model.model.layers[0].self_attn.q_proj.weight, expected, atol=1e-5)


def test_few_samples_extreme_weights_and_other_dtypes() -> None:
    w, x = layer(6, 20)
    for settings in ({}, {"rotate": False}):
        rsq = tersor.quantizer("rsq", bits=8, group_size=8, **settings)
        assert bool(torch.isfinite(rsq.dequantize(rsq.quantize(w, x[:1]))).all())
        for scale in (1e-30, 1e-6, 1e30, 1e37):
            back = rsq.dequantize(rsq.quantize(w * scale, x))
            assert float((back / scale - w).abs().max()) < 0.2
        assert torch.equal(rsq.dequantize(rsq.quantize(w * 0, x)), w * 0)
        for dtype in (torch.float16, torch.bfloat16):
            back = rsq.dequantize(rsq.quantize(w.to(dtype), x))
            assert back.dtype == dtype
            assert float((back.float() - w).abs().max()) < 0.1
        limit = torch.full((2, 20), 65504.0, dtype=torch.float16)
        assert bool(torch.isfinite(rsq.dequantize(rsq.quantize(limit, x))).all())


def test_wrong_settings_and_calibration() -> None:
    w, x = layer(4, 10)
    for settings in ({"bits": 1}, {"group_size": 0}, {"scale": "norm"}, {"r_min": 1.5}, {"seed": -1}, {"damp": -0.1}):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("rsq", **settings)
    rsq = tersor.quantizer("rsq")
    for wrong in (None, Calibration(), x[:, :5], x * 0, Calibration(gram=torch.eye(9)), Calibration(gram=1 - 3 * torch.eye(10))):
        with pytest.raises(tersor.CalibrationError):
            rsq.quantize(w, wrong)


def test_conformance() -> None:
    assert_conforms("rsq", max_examples=3, fresh_process=False)
