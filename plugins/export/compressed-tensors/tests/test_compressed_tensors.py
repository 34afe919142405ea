"""compressed-tensors folders: what transformers reads back is what the .tsr file decodes to, bit by bit; every refusal."""

import json

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tersor
from tersor.exporters import ModelTensor
from tersor_compressed_tensors import exporter as ct
from tersor_compressed_tensors.shards import Shards

Q = "model.layers.0.self_attn.q_proj"


def read(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert type(model).__name__ == "LlamaForCausalLM"
    return model


@pytest.mark.parametrize(
    ("method", "format_", "scheme"),
    [
        ("rtn:bits=4,group_size=32,sym=true", "pack-quantized", "int4 group 32"),
        ("rtn:bits=4,group_size=32", "pack-quantized", "int4 group 32, zero points"),
        ("rtn:bits=4,group_size=-1,sym=true", "pack-quantized", "int4 channel"),
        ("rtn:bits=4,group_size=-1", "pack-quantized", "int4 channel, zero points"),
        ("rtn:bits=8,group_size=64,sym=true", "pack-quantized", "int8 "),
        ("rtn:bits=8,group_size=-1", "pack-quantized", "int8 channel, zero points"),
        ("rtn:bits=8,group_size=-1,sym=true", "int-quantized", "int8 channel"),
        ("rtn:bits=8,group_size=32", "int-quantized", "int8 group 32, zero points"),
        ("rtn:bits=3,group_size=16", "pack-quantized", "int3 group 16, zero points"),
        ("rtn:bits=5,group_size=8,sym=true", "pack-quantized", "int5 group 8"),
        ("gptq:bits=4,group_size=32,static_groups=true", "pack-quantized", "int4 group 32, zero points"),
        ("gptq:bits=2,group_size=-1,sym=true", "int-quantized", "int2 channel"),
    ],
)
def test_transformers_gives_the_same_logits(method, format_, scheme, packed, logits, tmp_path):
    source = packed(method)
    done = tersor.export(source, "compressed-tensors", tmp_path / "out", format=format_)
    assert done.path == tmp_path / "out"
    assert done.nbytes == sum(f.stat().st_size for f in done.path.iterdir())
    forms = set(done.tensors.values())
    assert "plain numbers" in forms
    assert all(f"{format_} {scheme}" in f for f in forms - {"plain numbers"})
    model = read(done.path)
    assert model.dtype == torch.float32
    assert torch.equal(logits(model), logits(source))
    if "rtn:bits=4" in method:
        assert load_file(done.path / "model.safetensors")[f"{Q}.weight_packed"].shape == (64, 64 * 4 // 32)


def test_the_folder_says_what_it_is(packed, llama, tmp_path):
    tersor.export(packed("rtn:bits=4,group_size=32,sym=true"), "compressed-tensors", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    told = config["quantization_config"]
    assert (told["quant_method"], told["format"], told["quantization_status"]) == (
        "compressed-tensors",
        "pack-quantized",
        "compressed",
    )
    assert told["ignore"] == ["lm_head"]
    (group,) = told["config_groups"].values()
    assert group["targets"] == ["Linear"]
    assert {k: group["weights"][k] for k in ("num_bits", "type", "symmetric", "strategy", "group_size")} == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
    }  # fmt: skip
    assert "dequantize" not in told
    assert config["dtype"] == "float32"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (llama / name).read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("twice")["input_ids"]
    names = set(load_file(tmp_path / "out/model.safetensors"))
    assert {f"{Q}.weight_packed", f"{Q}.weight_scale", f"{Q}.weight_shape", "model.norm.weight", "lm_head.weight"} <= names
    assert f"{Q}.weight_zero_point" not in names


def test_shorter_last_groups_become_smaller_groups(build, packed, logits, tmp_path):
    folder = build(hidden_size=96, intermediate_size=192, num_attention_heads=3, num_key_value_heads=1)
    source = packed("rtn:bits=4,group_size=64,sym=true", folder)  # 96 = 64 + 32, 192 = 3 x 64
    done = tersor.export(source, "compressed-tensors", tmp_path / "out")
    assert done.tensors[f"{Q}.weight"] == "pack-quantized int4 group 32"
    assert done.tensors["model.layers.0.mlp.down_proj.weight"] == "pack-quantized int4 group 64"
    assert torch.equal(logits(read(done.path)), logits(source))
    # with zero points transformers needs one scheme for all layers
    source = packed("rtn:bits=4,group_size=64", folder)
    done = tersor.export(source, "compressed-tensors", tmp_path / "out", replace=True)
    assert set(done.tensors.values()) == {"plain numbers", "pack-quantized int4 group 32, zero points"}
    assert torch.equal(logits(read(done.path)), logits(source))


def test_a_row_that_is_one_group_joins_the_others(packed, logits, tmp_path):
    source = packed("rtn:bits=4,group_size=64")  # one group of 64 columns, two of 128
    done = tersor.export(source, "compressed-tensors", tmp_path / "out")
    assert set(done.tensors.values()) == {"plain numbers", "pack-quantized int4 group 64, zero points"}
    assert torch.equal(logits(read(done.path)), logits(source))


def test_layers_with_different_bits(packed, logits, tmp_path):
    recipe = [["*.down_proj.weight", "rtn:bits=8,group_size=-1,sym=true"], ["*.0.self_attn.k_proj.weight", None]]
    source = packed("rtn:bits=4,group_size=32,sym=true", recipe=recipe)
    done = tersor.export(source, "compressed-tensors", tmp_path / "out")
    assert done.tensors["model.layers.1.mlp.down_proj.weight"] == "pack-quantized int8 channel"
    assert done.tensors["model.layers.0.self_attn.k_proj.weight"] == "plain numbers"
    assert torch.equal(logits(read(done.path)), logits(source))
    recipe = [["*.down_proj.weight", "rtn:bits=8,group_size=32"]]
    source = packed("rtn:bits=4,group_size=32", recipe=recipe)
    with pytest.raises(
        tersor.ExportError,
        match=r"down_proj.weight \(and 1 more\): it has 8 bits with zero points and others 4 bits with; .*int-q",
    ):
        tersor.export(source, "compressed-tensors", tmp_path / "no")
    done = tersor.export(source, "compressed-tensors:format=int-quantized", tmp_path / "int")
    assert torch.equal(logits(read(done.path)), logits(source))


@pytest.mark.parametrize(
    ("method", "recipe", "said"),
    [
        ("gptq:bits=4,group_size=32", None, r"q_proj.weight \(and 13 more\): its groups are in the order of activations.*static_groups=true"),
        ("lord:keep=0.4", None, r"q_proj.weight \(and 13 more\): what lord:keep=0.4 gives are no evenly spaced levels"),
        ("magnitude:keep=0.5", None, r"it was pruned by magnitude, and the format has had no sparse weights since .* 0.15.*sparse24=true"),
        ("rtn:bits=4,group_size=32,sym=true", [["*embed*", "rtn:bits=8"]], r"embed_tokens.weight: it is not the weight of a torch.nn.Linear"),
        ("rtn:bits=4,group_size=48,sym=true", None, None),
        ("rtn:bits=4,group_size=36,sym=true", None, r"its rows of 64 are in groups of 36, and groups of one size would have 4 weights; at least 16"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold(method, recipe, said, packed, logits, tmp_path):
    source = packed(method, recipe=recipe)
    if said is not None:
        with pytest.raises(tersor.ExportError, match=said):
            tersor.export(source, "compressed-tensors", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
    done = tersor.export(source, "compressed-tensors:rest=dense", tmp_path / "out")
    assert torch.equal(logits(read(done.path)), logits(source))


def test_zero_points_between_levels(packed, monkeypatch, tmp_path):
    plain = ModelTensor.uniform

    def shifted(self):
        u = plain(self)
        return u and tersor.Uniform(u.codes, u.scale, u.zero + 0.25, u.bits, u.group_size)

    monkeypatch.setattr(ModelTensor, "uniform", shifted)
    with pytest.raises(tersor.ExportError, match=r"\(and 13 more\): its zero points are not whole numbers of 4 bits"):
        tersor.export(packed("rtn:bits=4,group_size=32"), "compressed-tensors", tmp_path / "out")


def test_zero_points_need_groups_in_common(packed, tmp_path):
    recipe = [["*.down_proj.weight", "rtn:bits=4,group_size=72"]]  # 72 and a last 56: 8 in common
    source = packed("rtn:bits=4,group_size=8", recipe=recipe)
    with pytest.raises(tersor.ExportError, match=r"its rows of 128 are in groups of 72"):
        tersor.export(source, "compressed-tensors", tmp_path / "out")
    done = tersor.export(packed("rtn:bits=4,group_size=8"), "compressed-tensors", tmp_path / "out")
    assert "pack-quantized int4 group 8, zero points" in done.tensors.values()


def test_half_precision(build, packed, tmp_path):
    source = packed("rtn:bits=4,group_size=32,sym=true")
    tersor.export(source, "compressed-tensors:dtype=float16", tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.get_tensor(f"{Q}.weight_scale").dtype == torch.float16
    model = read(tmp_path / "out")
    assert model.dtype == torch.float16
    assert (
        torch.equal(read(tmp_path / "out", dtype=torch.float32).lm_head.weight, read(tmp_path / "out").lm_head.weight.float())
        is False
    )
    small = build(initializer_range=1e-7)
    with pytest.raises(tersor.ExportError, match=r"its scales are not exact in float16; dtype=float32 holds them"):
        tersor.export(packed("rtn:bits=4,group_size=32,sym=true", small), "compressed-tensors:dtype=float16", tmp_path / "no")


def test_a_model_that_is_quantized_already_is_refused(packed, tmp_path):
    tersor.export(packed("rtn:bits=4,group_size=32,sym=true"), "compressed-tensors", tmp_path / "out")
    with pytest.raises(tersor.ExportError, match="already has a quantization_config"):
        tersor.exporter("compressed-tensors").check(json.loads((tmp_path / "out/config.json").read_text()))


def test_layers_of_gpt2_are_no_linear_layers(build, packed, logits, tmp_path):
    folder = build("GPT2")
    source = packed("rtn:bits=4,group_size=32,sym=true", folder)
    with pytest.raises(tersor.ExportError, match=r"attn.c_attn.weight \(and 7 more\): it is not the weight of a torch.nn.Linear"):
        tersor.export(source, "compressed-tensors", tmp_path / "out")
    done = tersor.export(source, "compressed-tensors:rest=dense", tmp_path / "out")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(done.path)), logits(source))


@pytest.fixture
def two_of_four(monkeypatch):
    """magnitude keeps the two largest of four."""

    def prune(self, tensors, calibration):
        out = {}
        for name, x in tensors.items():
            mask = torch.zeros(x.numel() // 4, 4, dtype=torch.bool)
            mask.scatter_(1, x.reshape(-1, 4).abs().topk(2).indices, True)
            out[name] = mask.reshape(x.shape)
        return out

    monkeypatch.setattr(type(tersor.pruner("magnitude")), "_prune", prune)


def test_two_of_four_in_the_older_sparse_format(two_of_four, llama, packed, logits, tmp_path):
    from tersor.model import compress_model

    source = compress_model(llama, "magnitude:scope=tensor", tmp_path / "model.tsr")
    done = tersor.export(source, "compressed-tensors:sparse24=true", tmp_path / "out")
    assert set(done.tensors.values()) == {"plain numbers", "sparse-24-bitmask"}
    parts, dense = load_file(done.path / "model.safetensors"), tersor.decompress(source)
    for name in (n for n, form in done.tensors.items() if form == "sparse-24-bitmask"):
        layer = name.removesuffix(".weight")
        rows, columns = parts[f"{layer}.shape"].flatten().tolist()
        places = np.unpackbits(parts[f"{layer}.bitmask"].numpy(), axis=-1, count=columns, bitorder="little").astype(bool)
        assert places.reshape(rows, -1, 4).sum(-1).tolist() == np.full((rows, columns // 4), 2).tolist()
        back = torch.zeros(rows, columns)
        back[torch.from_numpy(places)] = parts[f"{layer}.compressed"].flatten()
        assert torch.equal(back, dense[name])
    told = json.loads((done.path / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert (told["format"], told["sparsity_structure"], told["ignore"]) == ("sparse-24-bitmask", "2:4", ["lm_head"])
    plain = tersor.export(source, "compressed-tensors:rest=dense", tmp_path / "plain")
    assert torch.equal(logits(read(plain.path)), logits(source))


def test_sparse_weights_that_are_not_two_of_four(packed, tmp_path):
    with pytest.raises(tersor.ExportError, match="has more than two weights that were kept"):
        tersor.export(packed("magnitude:keep=0.6"), "compressed-tensors:sparse24=true", tmp_path / "out")
    with pytest.raises(tersor.ExportError, match="no multiple of 8"):
        ct._places(torch.ones(2, 12, dtype=torch.bool))


def test_sparse_and_quantized_in_one_model(two_of_four, llama, tmp_path):
    from tersor.model import compress_model

    recipe = [["*.down_proj.weight", "rtn:bits=8,group_size=-1"]]
    source = compress_model(llama, "magnitude:scope=tensor", tmp_path / "model.tsr", recipe=recipe)
    with pytest.raises(tersor.ExportError, match=r"it is sparse, and .*down_proj.weight is quantized"):
        tersor.export(source, "compressed-tensors:sparse24=true", tmp_path / "out")


def test_several_files(packed, logits, monkeypatch, tmp_path):
    from tersor_compressed_tensors import exporter, shards

    monkeypatch.setattr(exporter, "Shards", lambda folder: Shards(folder, 40_000))
    source = packed("rtn:bits=4,group_size=32,sym=true")
    done = tersor.export(source, "compressed-tensors", tmp_path / "out")
    index = json.loads((done.path / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert files == {f.name for f in done.path.glob("*.safetensors")}
    assert torch.equal(logits(read(done.path)), logits(source))
    assert shards.LIMIT == 1 << 30


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_what_is_written_decompresses_to_the_levels(data):
    bits = data.draw(st.integers(1, 8))
    group = data.draw(st.sampled_from([8, 16, 24, 32, 64]))
    columns = data.draw(st.sampled_from([group, 2 * group, 3 * group, 48, 80]))
    rows, symmetric = data.draw(st.integers(1, 40)), data.draw(st.booleans())
    packing = data.draw(st.sampled_from(["pack-quantized", "int-quantized"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    groups = -(-columns // group)
    u = tersor.Uniform(
        torch.from_numpy(rng.integers(0, 2**bits, (rows, columns), np.uint8)),
        torch.from_numpy(rng.standard_normal((rows, groups)).astype(np.float32)),
        None if symmetric else torch.from_numpy(rng.integers(0, 2**bits, (rows, groups)).astype(np.float32)),
        bits,
        group,
    )

    class Given:
        name, kept, turned = "layer.weight", False, False

        def uniform(self):
            return u

    plugin = tersor.exporter("compressed-tensors", format=packing)
    if groups > 1 and np.gcd(group, columns) < min(16, group):
        with pytest.raises(tersor.ExportError, match="at least 16 are needed"):
            plugin._form(Given(), {"layer"})
        return
    if bits == 4 and rows <= 8 and not symmetric and packing == "pack-quantized":
        with pytest.raises(tersor.ExportError, match="its zero points are one word of 32 bits"):
            plugin._form(Given(), {"layer"})
        return
    form = plugin._form(Given(), {"layer"})
    weights = QuantizationArgs(
        num_bits=bits, symmetric=symmetric, strategy="channel" if form.group == -1 else "group",
        group_size=None if form.group == -1 else form.group,
    )  # fmt: skip
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    back = BaseCompressor.get_value_from_registry(packing).decompress(plugin._parts(Given(), form), scheme)
    assert torch.equal(back["weight"], u.dense())
