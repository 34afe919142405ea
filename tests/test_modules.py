"""Networks that compute with compressed weights: every weight method over every kind of network, and their state dicts."""

import copy
import json
import subprocess
import sys

import pytest

import tersor

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from torch import nn  # noqa: E402

from tersor import model as M  # noqa: E402
from tersor.api import as_method  # noqa: E402
from tersor.model import driver, statistics  # noqa: E402

torch.set_num_threads(1)
METHODS = sorted((m["name"], m["kind"]) for m in tersor.available(domain="weight") if m["kind"] != "decoder")


def ids(seed: int) -> "torch.Tensor":
    return torch.randint(0, 53, (1, 12), generator=torch.Generator().manual_seed(seed))


class Tied(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


def mlp():
    return nn.Sequential(nn.Linear(10, 24), nn.ReLU(), nn.Linear(24, 16, bias=False), nn.ReLU(), nn.Linear(16, 5))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding="same", padding_mode="reflect"), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2, padding=(1, 0), groups=4),
        nn.Flatten(2), nn.Conv1d(8, 6, 3, padding=2, dilation=2, padding_mode="circular"), nn.ReLU(),
        nn.Conv1d(6, 6, 3, groups=6, padding="same"), nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=53, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config)


def llama():
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        tie_word_embeddings=True, max_position_embeddings=32, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def floats(*shape: int):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]


NETWORKS = {
    "mlp": (mlp, floats(6, 10), 3),
    "convolutions": (convolutions, floats(2, 4, 6, 6), 5),
    "encoder": (encoder, floats(2, 7, 16), 6),
    "tied": (Tied, floats(5, 12), 1),
    "gpt2": (gpt2, [ids(i) for i in range(3)], 8),
    "llama": (llama, [ids(i) for i in range(3)], 14),
}


def build(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return NETWORKS[name][0]().eval()


@torch.no_grad()
def outputs(net, batches):
    return torch.cat([getattr(out, "logits", out).flatten() for out in (net(b) for b in batches)])


def near(a, b) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


#: Networks that have no loss to differentiate, no attention to weigh tokens by, or layers that are never called.
REFUSED = {
    "squeezellm": ("mlp", "convolutions", "encoder", "tied"),
    "mixllm": ("mlp", "convolutions", "encoder", "tied"),
    "rsq": ("mlp", "convolutions", "encoder", "tied"),
    "flatquant": ("encoder",),
}

#: Methods whose own layers also round activations, to 8 or 4 bits: by how much of themselves outputs may differ from those of the weights.
ROUNDS = {"bitnet-b158": 0.03, "dgq": 0.03, "llm-int8": 0.03, "mixllm": 0.03, "flatquant": 0.5}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", [m for m, _ in METHODS])
def test_every_weight_method_over_every_network(method: str, network: str) -> None:
    chosen = tersor.registry.lookup(dict(METHODS)[method], method).examples()[0]
    _, batches, count = NETWORKS[network]
    dense, net = build(network), build(network)
    if network in REFUSED.get(method, ()):
        with pytest.raises(tersor.CalibrationError, match="allowed|repeated blocks|needs calibration"):
            M.quantize(dense, chosen, batches)
        return
    payloads = M.quantize(dense, chosen, batches)
    assert len(payloads) == count
    again = M.compress_layers(net, chosen, batches)
    assert list(again) == list(payloads)
    own = any(not isinstance(m, M.CompressedTensor) for m in net.modules() if hasattr(m, "info"))
    if not own:  # layers of the method's own round differently, which later blocks are calibrated on
        assert {k: p.to_bytes() for k, p in again.items()} == {k: p.to_bytes() for k, p in payloads.items()}
    want, dense_out, plain = outputs(net, batches), outputs(dense, batches), outputs(build(network), batches)
    assert float((want - dense_out).norm()) < ROUNDS.get(method, 1e-3) * float(want.norm())
    assert float((want - plain).norm()) > 1e-5 * float(want.norm())

    # into a network with other weights, through JSON, strictly
    fresh = M.skeleton(build(network, 1), json.loads(json.dumps(M.describe(net))))
    fresh.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, batches), want)


def test_state_dict_has_exactly_the_parts() -> None:
    net = build("mlp")
    payloads = M.compress_layers(net, "rtn:bits=4,group_size=5")
    expected = {f"{n}.{part}" for n, p in payloads.items() for part in p.parts} | {"0.bias", "4.bias"}
    state = net.state_dict()
    assert set(state) == expected
    for name, payload in payloads.items():
        held = dict(net.named_modules())[name]
        assert held.full().to_bytes() == payload.to_bytes()
        for part, value in payload.parts.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(state[f"{name}.{part}"], value)
    assert isinstance(net[0], (nn.Linear, M.CompressedLayer))
    assert "parts" not in state


_READ = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_modules as T
from tersor import model as M
net = M.load_layers(T.build(sys.argv[2], 7), sys.argv[3])
torch.save(T.outputs(net, T.NETWORKS[sys.argv[2]][1]), sys.argv[4])
"""


@pytest.mark.parametrize(("network", "method"), [("gpt2", "lord:keep=0.6"), ("tied", "rtn:bits=3,group_size=4")])
def test_saved_layers_load_in_another_process(network, method, tmp_path) -> None:
    from pathlib import Path

    net = build(network)
    M.compress_layers(net, method, NETWORKS[network][1])
    path = M.save_layers(net, tmp_path / "net.safetensors")
    arguments = [str(Path(__file__).parent), network, str(path), str(tmp_path / "out.pt")]
    subprocess.run([sys.executable, "-c", _READ, *arguments], check=True, timeout=120)
    near(torch.load(tmp_path / "out.pt"), outputs(net, NETWORKS[network][1]))


def test_tied_weights_stay_tied(tmp_path) -> None:
    x = floats(5, 12)
    net = build("tied")
    M.compress_layers(net, "lord:keep=0.5", x)
    assert net.a.right.weight is net.b.right.weight
    assert net.a.left.bias is not net.b.left.bias
    path = M.save_layers(net, tmp_path / "t.safetensors")
    back = M.load_layers(build("tied", 3), path)
    assert torch.equal(outputs(back, x), outputs(net, x))
    quantized = build("tied")
    M.compress_layers(quantized, "rtn")
    assert quantized.a._modules["weight"] is quantized.b._modules["weight"]
    whole = build("llama")  # the embedding and the head are one parameter, given a method by name
    M.compress_layers(whole, "rtn:bits=8,group_size=8", recipe=[["model.embed_tokens.weight", "rtn:bits=8,group_size=16"]])
    assert whole.lm_head._modules["weight"] is whole.model.embed_tokens._modules["weight"]
    want = outputs(whole, [ids(9)])
    fresh = M.skeleton(build("llama", 4), M.describe(whole))
    fresh.load_state_dict(whole.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, [ids(9)]), want)


def test_low_rank_layers_train_and_decoded_ones_pass_gradients() -> None:
    x = floats(6, 10)[0]
    net = build("mlp")
    M.compress_layers(net, "svd:keep=0.6")
    net(x).square().sum().backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in net.parameters())
    net = build("mlp")
    M.compress_layers(net, "rtn:group_size=5")
    x.requires_grad_(True)
    net(x).square().sum().backward()
    assert float(x.grad.abs().sum()) > 0
    assert {n for n, p in net.named_parameters() if p.grad is not None} == {"0.bias", "4.bias"}


def test_casting_a_network_casts_what_is_decoded_and_not_the_parts() -> None:
    x = floats(6, 10)
    net = build("mlp")
    M.compress_layers(net, "rtn:bits=8,group_size=5")
    want, before = outputs(net, x), copy.deepcopy(net.state_dict())
    half = copy.deepcopy(net).to(torch.bfloat16)
    assert half[0].weight.dtype == torch.bfloat16
    got = outputs(half, [b.to(torch.bfloat16) for b in x])
    assert got.dtype == torch.bfloat16
    assert float((got.float() - want).norm() / want.norm()) < 0.03
    for name, value in half.state_dict().items():
        assert value.dtype == (torch.bfloat16 if name.endswith("bias") else before[name].dtype)
    assert torch.equal(half.float()[0].weight, net[0].weight)


def test_a_single_layer_from_a_payload() -> None:
    g = torch.Generator().manual_seed(0)
    weight, bias, x = torch.randn(9, 14, generator=g), torch.randn(9, generator=g), torch.randn(5, 14, generator=g)
    for text in ("rtn:bits=4,group_size=7", "svd:keep=0.7,dtype=float32"):
        method = as_method(text)
        payload = tersor.compress(weight, method)
        for b in (bias, None):
            layer = method.module(payload.to_bytes(), b)
            near(layer(x), nn.functional.linear(x, tersor.decompress(payload), b))
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
    payload = tersor.compress(conv.weight.detach(), "svd:keep=0.6,dtype=float32")
    image = torch.randn(2, 4, 7, 7, generator=g)
    layer = M.module(payload, conv.bias, conv)
    assert [type(m) for m in (layer.right, layer.left)] == [nn.Conv2d, nn.Conv2d]
    near(layer(image), nn.functional.conv2d(image, tersor.decompress(payload), conv.bias, 2, 1))
    assert layer.weight.shape == conv.weight.shape
    with pytest.raises(tersor.InputError, match="a linear layer needs a weight"):
        M.module(payload)
    with pytest.raises(tersor.InputError, match="for a layer whose weight has shape"):
        M.module(payload, None, nn.Linear(3, 3))
    with pytest.raises(tersor.InputError, match="cannot read this payload"):
        tersor.quantizer("rtn").module(payload, None, conv)


def test_what_cannot_be_replaced_is_said() -> None:
    net = nn.ModuleDict({"rnn": nn.LSTM(4, 4)})
    with pytest.raises(tersor.InputError, match="keeps other references"):
        M.compress_layers(net, "rtn", recipe=[["rnn.*", "rtn"]])
    with pytest.raises(tersor.CalibrationError, match="needs calibration data"):
        M.compress_layers(build("mlp"), "gptq")
    with pytest.raises(tersor.ConfigError, match="jobs=0"):
        M.compress_layers(build("mlp"), "rtn", jobs=0)


def test_descriptions_and_files_that_do_not_fit_are_refused(tmp_path, monkeypatch) -> None:
    net = build("mlp")
    M.compress_layers(net, "rtn:group_size=5")
    good = M.describe(net)
    for change in ({"shape": [24, 11]}, {"parts": {"codes": 5}}, {"dtype": "float99"}, {"parts": {"c": ["uint8", [-4]]}}):
        with pytest.raises(tersor.CorruptPayloadError):
            M.skeleton(build("mlp"), {**good, "0.weight": {**good["0.weight"], **change}})
    with pytest.raises(tersor.CorruptPayloadError, match="missing"):
        M.skeleton(build("mlp"), {"9.weight": good["0.weight"]})
    monkeypatch.setenv("TERSOR_MAX_DECODED", "100")
    with pytest.raises(tersor.LimitError):
        M.skeleton(build("mlp"), good)
    monkeypatch.delenv("TERSOR_MAX_DECODED")
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(tersor.InputError, match="does not say which layers"):
        M.load_layers(build("mlp"), tmp_path / "plain.safetensors")
    path = M.save_layers(net, tmp_path / "net.safetensors")
    with pytest.raises(tersor.InputError, match="holds another network"):
        M.load_layers(nn.Sequential(*build("mlp"), nn.Linear(5, 5)), path)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    with pytest.raises(tersor.InputError, match="no file of compressed layers"):
        M.load_layers(build("mlp"), tmp_path / "bad.safetensors")


@pytest.mark.parametrize("options", [
    {"padding": 1}, {"padding": "same", "dilation": 2}, {"padding": "valid", "stride": 2}, {"groups": 2, "padding": 2},
    {"padding": 1, "padding_mode": "reflect"}, {"padding": 1, "padding_mode": "circular", "groups": 4},
    {"padding": "same", "padding_mode": "replicate"},
])  # fmt: skip
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_rows_of_a_convolution_times_its_weight_are_its_outputs(dimensions, options) -> None:
    cls = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    torch.manual_seed(0)
    conv = cls(4, 8, (3, 2, 3)[:dimensions], bias=False, **options)
    x = torch.randn(2, 4, *(6, 7, 5)[:dimensions])
    with torch.no_grad():
        want = conv(x)
        rows = statistics.columns(conv, x)  # batch, group, place
        groups = conv.groups
        weight = conv.weight.flatten(1).view(groups, 8 // groups, -1)
        got = torch.einsum("bgpi,goi->bgop", rows.view(2, groups, -1, rows.shape[-1]), weight)
        near(got.reshape(want.shape), want)
        near(statistics.columns(conv, x[0]), rows.view(2, -1, rows.shape[-1])[0])


def test_moments_of_attention_outputs_are_those_that_the_layer_gets() -> None:
    """torch's attention never calls its output layer; what reaches it is known from a forward with the identity there."""
    net, batches = build("encoder"), NETWORKS["encoder"][1]
    seen = {}
    plain = driver.apply_method

    def spy(method, x, calibration=None):
        seen[calibration.layer] = calibration
        return plain(method, x, calibration)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "apply_method", spy)
        M.quantize(net, "gptq:bits=8,group_size=8", batches)
    attention = build("encoder").layers[0].self_attn
    got = []
    for x in batches:
        q, k, v = nn.functional.linear(x, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
        got.append(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 16))
    rows = torch.cat(got).detach()
    found = seen["layers.0.self_attn.out_proj.weight"]
    near(found.gram, rows.T @ rows)
    near(found.extra["mean"], rows.mean(0))
    assert found.count == len(rows)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("method", ["gptq:group_size=8", "lord:keep=0.6", "rtn"])
def test_jobs_change_nothing(method, tmp_path) -> None:
    pytest.importorskip("joblib")
    one, two = build("llama"), build("llama")
    serial = M.quantize(one, method, NETWORKS["llama"][1])
    parallel = M.quantize(two, method, NETWORKS["llama"][1], jobs=3)
    assert list(serial) == list(parallel)
    assert all(serial[k].to_bytes() == parallel[k].to_bytes() for k in serial)
    one.save_pretrained(tmp_path / "m")
    files = [
        M.compress_model(tmp_path / "m", "rtn", tmp_path / f"{jobs}.tsr", jobs=jobs).read_bytes() for jobs in (1, 3)
    ] + [
        M.compress_model(tmp_path / "m" / "model.safetensors", "rtn", tmp_path / f"s{jobs}.tsr", jobs=jobs).read_bytes()
        for jobs in (1, 3)
    ]  # fmt: skip
    assert files[0] == files[1]
    assert files[2] == files[3]


def test_a_gpt2_folder_comes_back_with_its_weights_in_x_out(tmp_path) -> None:
    build("gpt2").save_pretrained(tmp_path / "m")
    loaded, _ = M.load_model(tmp_path / "m")
    batches = NETWORKS["gpt2"][1]
    out = tersor.compress(tmp_path / "m", "lord:keep=0.7", tmp_path / "m.tsr", calibration=batches)
    back, _ = M.load_model(tersor.decompress(out, tmp_path / "back"))
    M.quantize(loaded, "lord:keep=0.7", batches)
    assert torch.equal(outputs(back, batches), outputs(loaded, batches))


def test_a_compressed_network_is_copied_and_sent_to_other_processes() -> None:
    import copy
    import pickle

    network = torch.nn.Sequential(torch.nn.Linear(32, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8)).eval()
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    M.compress_layers(network, "rtn:bits=4,group_size=16")
    for other in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):  # noqa: S301
        assert torch.equal(other(x), network(x))
        assert type(other[0]) is type(network[0])
        other.load_state_dict(network.state_dict(), strict=True)
