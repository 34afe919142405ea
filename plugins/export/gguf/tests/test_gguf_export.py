"""GGUF files: transformers' reader gives the same weights bit by bit; block types, metadata, tokenizer; every refusal."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tersor
from tersor.model import load_compressed
from tersor_gguf import network
from tersor_gguf.blocks import from_floats, from_levels

Q = "model.layers.0.self_attn.q_proj.weight"


def read(path):
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)


def fields(path):
    return {k: f.contents() for k, f in gguf.GGUFReader(path).fields.items()}


def same_weights(path, source):
    theirs, ours = read(path).state_dict(), load_compressed(source)[0].state_dict()
    assert set(theirs) == set(ours)
    return all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.parametrize(
    ("method", "type_"),
    [
        ("rtn:bits=4,group_size=32,sym=true", "Q4_0"),
        ("rtn:bits=4,group_size=-1,sym=true", "Q4_0"),
        ("rtn:bits=4,group_size=32", "Q5_0"),
        ("rtn:bits=3,group_size=64", "Q4_0"),
        ("rtn:bits=2,group_size=96", "Q4_0"),
        ("rtn:bits=5,group_size=64,sym=true", "Q5_0"),
        ("rtn:bits=6,group_size=32", "Q8_0"),
        ("rtn:bits=8,group_size=32,sym=true", "Q8_0"),
        ("gptq:bits=4,group_size=32,static_groups=true,sym=true", "Q4_0"),
    ],
)
def test_transformers_reads_the_same_weights(method, type_, packed, logits, tmp_path):
    source = packed(method)
    done = tersor.export(source, "gguf", tmp_path / "model.gguf")
    assert done.nbytes == done.path.stat().st_size
    assert {done.tensors[n] for n in done.tensors if n.endswith("proj.weight")} == {type_}
    assert same_weights(done.path, source)
    assert torch.equal(logits(read(done.path)), logits(source))


def test_a_file_says_what_it_holds(packed, llama, tmp_path):
    path = tersor.export(packed("rtn:bits=4,group_size=32,sym=true"), "gguf", tmp_path / "out.gguf").path
    got = fields(path)
    want = {
        "general.architecture": "llama", "general.name": "model", "general.file_type": gguf.LlamaFileType.MOSTLY_Q4_0,
        "llama.block_count": 2, "llama.context_length": 128, "llama.embedding_length": 64, "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0, "llama.vocab_size": 320, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 0,
    }  # fmt: skip
    assert {k: got[k] for k in want} == want
    assert got["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokens, types = got["tokenizer.ggml.tokens"], got["tokenizer.ggml.token_type"]
    assert (len(tokens), tokens[:2], tokens[-1]) == (320, ["<|end|>", "<|start|>"], "[PAD319]")
    assert (types[0], types[2], types[-1]) == (gguf.TokenType.CONTROL, gguf.TokenType.NORMAL, gguf.TokenType.UNUSED)
    text = "def twice(x):\n  return 42"
    own = AutoTokenizer.from_pretrained(llama)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert theirs.convert_ids_to_tokens(range(256)) == own.convert_ids_to_tokens(range(256))
    assert theirs.decode(theirs(text, add_special_tokens=False)["input_ids"]) == text
    names = [t.name for t in gguf.GGUFReader(path).tensors]
    assert {"token_embd.weight", "output.weight", "output_norm.weight", "blk.1.ffn_gate.weight"} <= set(names)


def test_a_tied_head_is_stored_once(build, packed, logits, tmp_path):
    source = packed("rtn:bits=4,group_size=32,sym=true", build(tie_word_embeddings=True))
    path = tersor.export(source, "gguf", tmp_path / "out.gguf").path
    assert "output.weight" not in [t.name for t in gguf.GGUFReader(path).tensors]
    assert torch.equal(logits(read(path)), logits(source))


def test_heads_of_another_size_and_mistral(build, packed, logits, tmp_path):
    source = packed("rtn:bits=4,group_size=32,sym=true", build(head_dim=32))
    path = tersor.export(source, "gguf", tmp_path / "wide.gguf").path
    assert (fields(path)["llama.attention.key_length"], fields(path)["llama.rope.dimension_count"]) == (32, 32)
    assert torch.equal(logits(read(path)), logits(source))
    source = packed("rtn:bits=4,group_size=32,sym=true", build("Mistral", sliding_window=None))
    path = tersor.export(source, "gguf", tmp_path / "mistral.gguf").path
    assert torch.equal(logits(read(path)), logits(source))


def test_llama3_scaling_is_written_as_factors(build, packed, tmp_path):
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    source = packed("rtn:bits=4,group_size=32,sym=true", build(rope_parameters=rope, max_position_embeddings=512))
    path = tersor.export(source, "gguf", tmp_path / "out.gguf").path
    (factors,) = (t.data for t in gguf.GGUFReader(path).tensors if t.name == "rope_freqs.weight")
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=512)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1 / 500000.0 ** (np.arange(0, 16, 2) / 16)
    assert factors.dtype == np.float32
    assert np.allclose(plain / factors, scaled.numpy(), rtol=1e-6)
    assert len(set(factors.tolist())) > 2


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("gptq:bits=4,group_size=32", "its groups are in the order of activations.*static_groups=true"),
        ("lord:keep=0.4", "what lord:keep=0.4 gives are no evenly spaced levels"),
        ("rtn:bits=8,group_size=32", "its levels lie farther than 128 steps from 0"),
        ("rtn:bits=4,group_size=48", "its groups of 48 weights are no whole blocks of 32"),
        ("magnitude:keep=0.5", "what magnitude gives are no evenly spaced levels"),
    ],
)
def test_what_no_block_type_holds(method, said, packed, tmp_path):
    source = packed(method)
    with pytest.raises(tersor.ExportError, match=rf"^gguf cannot hold this model: {Q} \(and 13 more\): {said}"):
        tersor.export(source, "gguf", tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []
    done = tersor.export(source, "gguf:rest=dense", tmp_path / "out.gguf")
    assert done.tensors[Q] == "F32"
    assert same_weights(done.path, source)


def test_rows_that_are_no_whole_blocks_and_scales_beyond_float16(build, packed, tmp_path):
    narrow = packed("rtn:bits=4,group_size=16,sym=true", build(intermediate_size=80))
    with pytest.raises(
        tersor.ExportError, match=r"groups of 16 weights.*down_proj.weight \(and 1 more\): its rows of 80 weights are no whole"
    ):
        tersor.export(narrow, "gguf", tmp_path / "out.gguf")
    tiny = packed("rtn:bits=4,group_size=32,sym=true", build(initializer_range=1e-8))
    with pytest.raises(tersor.ExportError, match="its scales are not exact in float16"):
        tersor.export(tiny, "gguf", tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"architectures": ["Qwen2ForCausalLM"]}, "the network is a Qwen2ForCausalLM; this exporter writes LlamaForCausalLM"),
        ({}, "the network is a none"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias=True"),
        ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias=True"),
        ({"architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "yarn", "factor": 2}}, "rope_type='yarn'"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 64}, "a sliding window of 64 tokens"),
    ],
)
def test_networks_that_are_no_llama(config, said):
    with pytest.raises(tersor.ExportError, match=f"^gguf: .*{said}"):
        tersor.exporter("gguf").check(config)


def test_another_network_is_refused_before_it_is_compressed(build, tmp_path):
    folder = build("GPT2")
    with pytest.raises(tersor.ExportError, match="the network is a GPT2LMHeadModel"):
        tersor.compress(folder, "rtn:bits=4,group_size=32", tmp_path / "out.gguf", to="gguf")
    assert list(tmp_path.iterdir()) == []


LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=False), "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]), "llama-bpe"),
        (
            pre_tokenizers.Sequence(
                [pre_tokenizers.Split(Regex(LLAMA3.replace("{1,3}", "")), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
            ),
            "qwen2",
        ),
        (pre_tokenizers.Whitespace(), None),
    ],
)  # fmt: skip
def test_how_a_tokenizer_splits_text(steps, name, build, packed, tmp_path):
    source = packed("rtn:bits=4,group_size=32,sym=true", build(pre_tokenizer=steps))
    if name is None:
        with pytest.raises(tersor.ExportError, match=r"none of gpt-2, smollm, llama-bpe, qwen2: .*Whitespace.*pre=NAME"):
            tersor.export(source, "gguf", tmp_path / "out.gguf")
    path = tersor.export(source, "gguf" if name else "gguf:pre=olmo", tmp_path / "out.gguf").path
    assert fields(path)["tokenizer.ggml.pre"] == (name or "olmo")


def test_without_a_tokenizer(packed, tmp_path):
    path = tersor.export(packed("rtn:bits=4,group_size=32,sym=true"), "gguf:tokenizer=false", tmp_path / "out.gguf").path
    got = fields(path)
    assert got["tokenizer.ggml.model"] == "none"
    assert "tokenizer.ggml.tokens" not in got


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ('"type":"Unigram"', tersor.ExportError, "the tokenizer is Unigram"),
        ('"type":"BPE","byte_fallback":true', tersor.ExportError, r"BPE with byte fallback \(SentencePiece\)"),
        ("x", tersor.CorruptPayloadError, "tokenizer.json cannot be read"),
    ],
)
def test_other_tokenizers(change, error, said):
    from tersor_gguf.vocabulary import add_tokenizer

    raw = b"{" if change == "x" else f'{{"model":{{{change},"vocab":{{"a":0}}}}}}'.encode()
    with pytest.raises(error, match=said):
        add_tokenizer(gguf.GGUFWriter(None, "llama"), {"tokenizer.json": raw}, 10, "")


def test_more_tokens_than_rows():
    from tersor_gguf.vocabulary import add_tokenizer

    raw = b'{"model":{"type":"BPE","vocab":{"a":10}},"pre_tokenizer":{"type":"ByteLevel"}}'
    with pytest.raises(tersor.ExportError, match=r"token 10 \('a'\) and the embedding 10 rows"):
        add_tokenizer(gguf.GGUFWriter(None, "llama"), {"tokenizer.json": raw}, 10, "")


_BITS = {Type.Q4_0: 4.5, Type.Q4_1: 5, Type.Q5_0: 5.5, Type.Q5_1: 6, Type.Q8_0: 8.5}


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_blocks_give_back_the_levels_exactly(data):
    bits, groups = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 3))
    group = data.draw(st.sampled_from([32, 64, 96]))
    columns = data.draw(st.sampled_from([group * groups, group * groups - 32 * (group > 32)]))
    rows, symmetric = data.draw(st.integers(1, 9)), data.draw(st.booleans())
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    plain = data.draw(st.booleans())  # scales that are powers of two: the least level is a float16 number
    scale = 2.0 ** rng.integers(-6, 3, (rows, groups)) if plain else rng.standard_normal((rows, groups))
    u = tersor.Uniform(
        torch.from_numpy(rng.integers(0, 2**bits, (rows, columns), np.uint8)),
        torch.from_numpy(scale.astype(np.float16).astype(np.float32)),
        None if symmetric else torch.from_numpy(rng.integers(0, 2**bits, (rows, groups)).astype(np.float32)),
        bits,
        group,
    )
    level = u.codes.float() - (2.0 ** (bits - 1) if symmetric else u.zero[:, torch.arange(columns) // group])
    low, high = float(level.min()), float(level.max())
    if low < -128 or high > 127:
        with pytest.raises(tersor.ExportError, match="farther than 128 steps"):
            from_levels(u)
        return
    kind, raw = from_levels(u)
    back = quants.dequantize(raw, kind)
    assert np.array_equal(back, u.dense().numpy())
    assert raw.nbytes * 8 == _BITS[kind] * back.size
    fits = [(4.5, low >= -8 and high < 8), (5, bits <= 4 and plain), (5.5, low >= -16 and high < 16), (6, bits <= 5 and plain)]
    best = next((size for size, good in fits if good), 8.5)
    assert _BITS[kind] <= best


def test_types_with_a_least_level():
    codes = torch.arange(64, dtype=torch.uint8).reshape(1, 64) % 16
    for bits, kind in ((4, Type.Q4_1), (5, Type.Q5_1)):
        top = codes * (2 if bits == 5 else 1)
        u = tersor.Uniform(top, torch.tensor([[0.5, 0.25]]), torch.tensor([[0.0, 0.0]]), bits, 32)
        got, raw = from_levels(u)
        assert got is kind
        assert np.array_equal(quants.dequantize(raw, kind), u.dense().numpy())


def test_groups_by_index():
    codes = torch.randint(0, 16, (3, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([[0.5, 0.25]]).expand(3, 2).contiguous()
    swapped = tersor.Uniform(codes, scale, None, 4, 32, torch.arange(64).flip(0) // 32)
    kind, raw = from_levels(swapped)
    assert np.array_equal(quants.dequantize(raw, kind), swapped.dense().numpy())
    with pytest.raises(tersor.ExportError, match="in the order of activations"):
        from_levels(tersor.Uniform(codes, scale, None, 4, 32, torch.arange(64) % 2))
    with pytest.raises(tersor.ExportError, match="no whole numbers"):
        from_levels(tersor.Uniform(codes, scale, scale, 4, 32))


@given(st.sampled_from(["q8", "f16", "bf16", "f32"]), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_plain_numbers_come_back_exactly(kind, seed):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((5, 64)).astype(np.float32)
    if kind == "q8":
        level = rng.integers(-127, 128, (5, 64)).astype(np.float32)
        level[:, ::32] = 127  # the block's largest, from which its scale follows
        x = level * rng.random((5, 1)).astype(np.float16).astype(np.float32)
    elif kind != "f32":
        x = (
            torch.from_numpy(x if kind == "f16" else x * 1e-9)
            .to(torch.float16 if kind == "f16" else torch.bfloat16)
            .float()
            .numpy()
        )
    type_, raw = from_floats(x)
    assert np.array_equal(quants.dequantize(raw, type_), x)
    if kind == "q8":
        assume(np.abs(x).max() > 0)
    assert type_ is {"q8": Type.Q8_0, "f16": Type.F16, "bf16": Type.BF16, "f32": Type.F32}[kind]
    assert from_floats(x[0])[0] is Type.F32


def test_extreme_numbers_are_kept():
    for x in (np.zeros((2, 32), np.float32), np.full((2, 32), 3e38, np.float32), np.full((2, 32), 1e-42, np.float32)):
        type_, raw = from_floats(x)
        assert np.array_equal(quants.dequantize(raw, type_), x)


def test_query_and_key_rows_are_turned_as_llama_cpp_has_them():
    config = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    rows = np.arange(32)[:, None].repeat(3, 1)
    got = network.turned("model.layers.0.self_attn.q_proj.weight", rows, config)[:, 0]
    assert got[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    key = network.turned("model.layers.0.self_attn.k_proj.weight", rows[:16], config)[:, 0]
    assert sorted(key.tolist()) == list(range(16))
    assert network.turned("model.layers.0.self_attn.v_proj.weight", rows, config) is rows
