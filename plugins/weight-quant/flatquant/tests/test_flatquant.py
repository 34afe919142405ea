"""FlatQuant: its transforms and quantizers against their formulas in float64, training, its layers and its cache."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor import Calibration
from tersor.model import compress_layers, load_layers, place_layers, quantize, save_layers
from tersor.testing import assert_conforms
from tersor_flatquant.learn import Block, Heads, _Cache, first_scale
from tersor_flatquant.rounding import asymmetric, clip_of, row_clips, symmetric
from tersor_flatquant.transforms import Affine, Invertible, factors, kronecker
from tersor_kit_weight_quant import CLIP_RATIOS, unpack

torch.set_num_threads(1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer(out: int = 24, columns: int = 36, samples: int = 200, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and inputs with a few channels of large values, as language models have them."""
    g = generator(seed)
    x = torch.randn(samples, columns, generator=g) + torch.randn(samples, 4, generator=g) @ torch.randn(4, columns, generator=g)
    x[:, ::9] *= 12
    return torch.randn(out, columns, generator=g), x


def llama(heads: int = 4, kv: int = 2, layers: int = 2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_attention_heads=heads, num_key_value_heads=kv,
                         num_hidden_layers=layers, vocab_size=50, attention_bias=True)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p[::7] *= 6  # outliers in some channels
            elif name.endswith("bias"):
                p.normal_(0, 0.1)
    return model


def tokens(count: int = 4, length: int = 24) -> list[torch.Tensor]:
    return [torch.randint(0, 50, (1, length), generator=generator(i)) for i in range(count)]


def test_factors_are_nearest_to_the_square_root() -> None:
    assert [factors(n) for n in (1, 7, 576, 1536, 192, 4096)] == [(1, 1), (1, 7), (24, 24), (32, 48), (12, 16), (64, 64)]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 9))
def test_transform_is_the_kronecker_product_and_cancels_in_the_layer(n1: int, n2: int, seed: int) -> None:
    g = generator(seed)
    x, w = torch.randn(5, n1 * n2, generator=g), torch.randn(3, n1 * n2, generator=g)
    affine = Affine(Invertible(n1, g), Invertible(n2, g), torch.rand(n1 * n2, generator=g) + 0.5)
    with torch.no_grad():
        for p in affine.parameters():
            p += 0.2 * torch.randn(p.shape, generator=g)
    affine.begin()
    left, left_dual, right, right_dual = (m.double() for m in affine.now)
    assert torch.allclose(left @ left_dual.T, torch.eye(n1).double(), atol=1e-4)
    assert torch.allclose(right @ right_dual.T, torch.eye(n2).double(), atol=1e-4)
    expected = (x.double() * affine.scale.double().exp()) @ torch.kron(left, right)
    assert torch.allclose(affine(x).double(), expected, atol=1e-4)
    assert torch.allclose(affine(x) @ affine.weight(w).T, x @ w.T, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 8), st.floats(0.3, 1.0), st.integers(0, 99))
def test_symmetric_levels_and_straight_through_gradients(bits: int, clip: float, seed: int) -> None:
    x = torch.randn(4, 9, generator=generator(seed))
    x[2] = 0
    top = 2 ** (bits - 1) - 1
    step = x.double().abs().amax(1, keepdim=True) * clip / top
    level = (x / step).nan_to_num(0).round()
    assert torch.allclose(symmetric(x, bits, clip).double(), level.clamp(-top - 1, top) * step, atol=1e-5)
    # the gradient is that of the expression with rounding replaced by the identity
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    c, d = (torch.tensor(clip, requires_grad=True) for _ in range(2))
    (symmetric(a, bits, c) ** 2).sum().backward()
    reach = b.abs().amax(1, keepdim=True)
    own = torch.where(reach > 0, reach, 1.0) * d / top
    through = b / own + ((b / own).round() - b / own).detach()
    ((through.clamp(-top - 1, top) * own) ** 2).sum().backward()
    assert torch.allclose(a.grad[:2], b.grad[:2], atol=1e-3)
    assert torch.allclose(c.grad, d.grad, rtol=1e-3, atol=1e-3)


def test_asymmetric_levels_are_within_half_a_step_and_keep_zero() -> None:
    x = torch.rand(30, 16, generator=generator()) * 3 - 1
    x[0] = 0
    x[:, 0] = 0
    for bits in (2, 4, 8):
        out = asymmetric(x, bits, torch.ones(2))
        step = (x.amax(1).clamp(min=0) - x.amin(1).clamp(max=0)) / (2**bits - 1)
        assert bool(((out - x).abs().amax(1) <= step * 1.001 + 1e-6).all())
        assert float(out[:, 0].abs().max()) < 1e-6
        assert all(len(row.unique()) <= 2**bits for row in out)


def test_clips_are_the_best_of_all_ratios() -> None:
    w = torch.randn(7, 40, generator=generator()) ** 3
    errors = torch.stack([(symmetric(w, 4, r) - w).square().sum(1) for r in CLIP_RATIOS])
    found = row_clips(w, 4)
    assert torch.equal((symmetric(w, 4, found) - w).square().sum(1), errors.amin(0))
    assert clip_of(w, 4) == CLIP_RATIOS[int(errors.sum(1).argmin())]


def test_file_holds_what_the_formula_says() -> None:
    w, x = layer()
    for transform in ("learned", "hadamard", "none"):
        method = tersor.quantizer("flatquant", steps=4, transform=transform)
        codes = method.quantize(w, x)
        levels = unpack(codes.parts["codes"], 4, w.numel()).view(w.shape).double() - 8
        rounded = levels * codes.parts["scale"].double()
        if transform == "learned":
            both = torch.kron(codes.parts["left"].double(), codes.parts["right"].double())
            p = codes.parts["diagonal"].double()[:, None] * both
            assert codes.parts["left"].shape == codes.parts["right"].shape == (6, 6)
        else:
            from tersor_kit_weight_quant.hadamard import Rotation

            p = Rotation(36, 0).forward(torch.eye(36)).double() if transform == "hadamard" else torch.eye(36).double()
        restored = method.dequantize(codes).double()
        assert torch.allclose(restored, rounded @ p.T, atol=1e-4)
        # what was rounded is W D^-1 P^-T, and no weight is off by more than half a step unless it was clipped
        flat = w.double() @ torch.linalg.inv(p).T
        off = ((flat - rounded).abs() / codes.parts["scale"].double())[(levels > -8) & (levels < 7)]
        assert float(off.max()) < 0.51
        # the layer: x P per token to 4 bits, times the levels
        module, flat = method.module(codes), x.double() @ p
        step = flat.abs().amax(1, keepdim=True) * codes.meta["clip"] / 7
        expected = ((flat / step).round().clamp(-8, 7) * step) @ rounded.T
        assert float((module(x).double() - expected).square().mean() / expected.square().mean()) < 1e-3  # ties aside


def test_size_is_codes_scales_and_factors() -> None:
    w, x = layer(64, 576, 32)
    codes = tersor.quantizer("flatquant", steps=1).quantize(w, x)
    payload = 64 * 576 // 2 + 64 * 2 + 2 * 24 * 24 * 2 + 576 * 2
    assert payload <= codes.nbytes <= payload + 320


def output_error(method, w: torch.Tensor, x: torch.Tensor, held: torch.Tensor) -> float:
    out = method.module(method.quantize(w, x))(held)
    return float((out - held @ w.T).square().sum() / (held @ w.T).square().sum())


def test_learning_beats_its_start_a_rotation_and_no_transform() -> None:
    w, x = layer(48, 64, 800)
    errors = {
        words: output_error(tersor.quantizer("flatquant", **words_), w, x[:600], x[600:])
        for words, words_ in {
            "learned": {"steps": 120}, "start": {"steps": 0}, "hadamard": {"transform": "hadamard"}, "none": {"transform": "none"},
        }.items()
    }  # fmt: skip
    assert errors["learned"] < 0.8 * min(errors["start"], errors["hadamard"], errors["none"]), errors


def test_second_moments_alone_and_inputs_of_any_size() -> None:
    w, x = layer(16, 36, 400)
    method = tersor.quantizer("flatquant", steps=40)
    found = method.dequantize(method.quantize(w, Calibration(gram=x.T @ x, count=400)))
    assert float((x @ (w - found).T).square().sum() / (x @ w.T).square().sum()) < 0.05
    for scale in (1e-25, 1e25):
        back = method.dequantize(method.quantize(w * scale, x * 1e-6 / scale))
        assert float((back / scale - w).square().mean() / w.square().mean()) < 0.05
    assert torch.equal(method.dequantize(method.quantize(w * 0, x)), w * 0)
    for one in (x[:1], torch.ones(5, 36)):  # of rank one
        assert bool(torch.isfinite(method.dequantize(method.quantize(w, one))).all())


def test_block_shares_transforms_between_layers_with_the_same_inputs() -> None:
    model = llama()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    payloads = quantize(copy.deepcopy(model), tersor.quantizer("flatquant", steps=3), tokens())
    part = lambda name, k: payloads[f"model.layers.1.{name}.weight"].parts[k]  # noqa: E731
    q, k, v, o = (f"self_attn.{n}_proj" for n in "qkvo")
    for a, b in ((q, k), (q, v), ("mlp.gate_proj", "mlp.up_proj")):
        assert all(torch.equal(part(a, name), part(b, name)) for name in ("left", "right", "diagonal"))
    assert not torch.equal(part(q, "diagonal"), part("mlp.up_proj", "diagonal"))
    # over heads, and within a head the values' transform
    assert part(o, "left").shape == (4, 4)
    assert torch.equal(part(o, "right"), part(v, "value"))
    assert part(k, "key").shape == (8, 8)
    assert "diagonal" not in payloads["model.layers.1.self_attn.o_proj.weight"].parts
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())


def test_study_leaves_the_block_as_it_was_even_when_it_fails() -> None:
    model = llama(layers=1)
    block, ids = model.model.layers[0], tokens(1)
    linear = {f"{n}.weight": m for n, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    study = Block(tersor.quantizer("flatquant"), linear, {}, [lambda cache: model.model(ids[0]).last_hidden_state])
    want = model(ids[0]).logits
    study.calls = [lambda cache: 1 / 0]
    with pytest.raises(ZeroDivisionError):
        study.train(2)
    assert torch.equal(model(ids[0]).logits, want)


def test_network_with_its_layers_and_cache_is_what_training_saw() -> None:
    from tersor_flatquant.cache import FlatCache

    model, train, test = llama(), tokens(8), tokens(9)[8]
    linear = {f"model.layers.0.{n}.weight": m for n, m in model.model.layers[0].named_modules() if isinstance(m, torch.nn.Linear)}
    method = tersor.quantizer("flatquant", steps=40)
    errors = []
    for steps in (0, 40):
        block = Block(method, linear, {}, [lambda cache, ids=ids: run(model, ids, cache) for ids in train])
        block.train(steps)
        with torch.no_grad():
            block._begin()
            block._replace()
            cache = _Cache(block._quantize_cache)
            errors.append(sum(float((c(cache) - t).square().mean()) for c, t in zip(block.calls, block.targets, strict=True)))
            block.seen = None
            wanted = block.calls[0](cache)
        for module in linear.values():
            del module.__dict__["forward"]
    assert errors[1] < 0.97 * errors[0], errors
    # the network with the layers and the cache of the files gives the same
    compress_layers(model, method, train)
    with torch.no_grad():
        found = run(model, train[0], FlatCache(model))
        plain = run(model, train[0], None)
        off, rounding = (float((found - x).square().mean()) for x in (wanted, plain))
        # float16 factors move a few weights and inputs to the next level
        assert off < 0.5 * rounding
        assert off < 0.3 * float((wanted - block.targets[0]).square().mean())
        # token by token through the cache: the same as all at once
        whole, cache = model(test, past_key_values=FlatCache(model)).logits, FlatCache(model)
        steps = torch.cat([model(test[:, i : i + 1], past_key_values=cache).logits for i in range(test.shape[1])], 1)
        assert float((steps - whole).square().mean() / whole.square().mean()) < 1e-3


def run(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """What the first block of a network gives, with a cache of its own or none."""
    block, seen = model.model.layers[0], []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
    handle.remove()
    args, kwargs = seen[0]
    return block(*args, **{**kwargs, "past_key_values": cache})


def test_layers_save_and_load_and_weights_decode_alike(tmp_path) -> None:
    model = llama(layers=1)
    ids = tokens(3)
    for transform in ("learned", "hadamard"):
        method = tersor.quantizer("flatquant", steps=2, transform=transform, act_bits=16)
        small, decoded = copy.deepcopy(model), copy.deepcopy(model)
        payloads = quantize(decoded, method, ids)
        small = copy.deepcopy(model)
        place_layers(small, payloads)
        with torch.no_grad():
            out = small(ids[0]).logits
            # without rounding of inputs the layers are the decoded weights
            assert torch.allclose(out, decoded(ids[0]).logits, atol=1e-3)
            save_layers(small, tmp_path / "m.safetensors")
            again = load_layers(copy.deepcopy(model), tmp_path / "m.safetensors")
            assert torch.equal(again(ids[0]).logits, out)
            half = again.to(torch.bfloat16)
            assert half(ids[0]).logits.dtype == torch.bfloat16
            assert half.model.layers[0].mlp.up_proj.scale.dtype == torch.float16


def test_convolutions_are_learned_alone() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3, groups=2)).eval()
    x = [torch.randn(2, 3, 8, 8) for _ in range(2)]
    want = model(x[0]).detach()
    quantize(model, tersor.quantizer("flatquant", bits=8, steps=4), x)
    assert float((model(x[0]).detach() - want).square().mean() / want.square().mean()) < 1e-2


def test_scales_of_channels_are_those_of_the_formula() -> None:
    w, x = layer()
    scale = first_scale([w, 2 * w], x)
    expected = (2 * w).abs().amax(0) ** 0.7 / x.abs().amax(0) ** 0.3
    assert torch.allclose(scale / scale[0], expected / expected[0], rtol=1e-3)
    assert bool(torch.isfinite(first_scale([w * 0], x * 0)).all())


def test_heads_fuse_and_come_apart() -> None:
    g = generator()
    method = tersor.quantizer("flatquant")
    heads = Heads(4, "learned", method.kv_bits, 0, g)
    heads.begin()
    w, x = torch.randn(8, 6, generator=g), torch.randn(5, 6, generator=g)
    assert torch.allclose(heads.apart(x @ Heads.fuse(w, heads.now[0]).T), x @ w.T, atol=1e-4)
    assert torch.allclose(kronecker(x, torch.eye(2), torch.eye(3)), x)


def test_wrong_settings_inputs_and_calibration() -> None:
    w, x = layer(4, 10)
    for wrong in (
        {"bits": 1},
        {"bits": 9},
        {"act_bits": 12},
        {"kv_bits": 1},
        {"transform": "fourier"},
        {"steps": -1},
        {"lr": 0.0},
    ):
        with pytest.raises(tersor.ConfigError):
            tersor.quantizer("flatquant", **wrong)
    method = tersor.quantizer("flatquant", steps=1)
    broken = w.clone()
    broken[0, 0] = float("inf")
    with pytest.raises(tersor.InputError):
        method.quantize(broken, x)
    for data in (None, Calibration(), x[:, :5], x * 0, Calibration(gram=torch.eye(9)), Calibration(gram=1 - 3 * torch.eye(10))):
        with pytest.raises(tersor.CalibrationError):
            method.quantize(w, data)


def test_conformance_of_flatquant() -> None:
    assert_conforms("flatquant", max_examples=3, fresh_process=False)
