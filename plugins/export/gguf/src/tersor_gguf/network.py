"""Llama networks as GGUF describes them: metadata, tensor names, and the order of rotary rows.

Facts: the GGUF specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np

from tersor import ExportError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
Array = np.ndarray[Any, Any]


def check(config: Mapping[str, Any]) -> None:
    """Raise :class:`tersor.ExportError` for a network that GGUF's ``llama`` is not, naming what differs."""
    names = config.get("architectures") or ["none"]
    if names[0] not in ARCHITECTURES:
        raise ExportError(f"gguf: the network is a {names[0]}; this exporter writes {', '.join(ARCHITECTURES)}")
    rope = rotary(config)
    for what, value, allowed in (
        ("hidden_act", config.get("hidden_act", "silu"), ("silu",)),
        ("rope_type", rope["rope_type"], ("default", "llama3")),
        ("attention_bias", bool(config.get("attention_bias")), (False,)),
        ("mlp_bias", bool(config.get("mlp_bias")), (False,)),
        ("partial_rotary_factor", rope.get("partial_rotary_factor", 1), (1,)),
    ):
        if value not in allowed:
            said = " or ".join(map(repr, allowed))
            raise ExportError(f"gguf: the network has {what}={value!r}; this exporter writes networks with {said}")
    if names[0] == "MistralForCausalLM" and config.get("sliding_window") is not None:
        raise ExportError(f"gguf: the network has a sliding window of {config['sliding_window']} tokens; GGUF's llama has none")


def rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_type``, ``rope_theta`` and what else the rotary embedding has, from any version's config.json."""
    found = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    found.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    found.setdefault("rope_type", found.get("type", "default"))
    return found


def heads(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Heads of queries, heads of keys and values, and the size of a head."""
    count = int(config["num_attention_heads"])
    size = config.get("head_dim") or int(config["hidden_size"]) // count
    return count, int(config.get("num_key_value_heads") or count), int(size)


def add_metadata(writer: gguf.GGUFWriter, config: Mapping[str, Any], name: str) -> None:
    """What llama.cpp needs to know of the network."""
    query, key, size = heads(config)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(query)
    writer.add_head_count_kv(key)
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps", 1e-6))
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(rotary(config)["rope_theta"])
    if size * query != config["hidden_size"]:
        writer.add_key_length(size)
        writer.add_value_length(size)


def names(config: Mapping[str, Any]) -> gguf.TensorNameMap:
    """From a tensor's name in transformers to its name in GGUF."""
    return gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, int(config["num_hidden_layers"]))


def turned(name: str, rows: Array, config: Mapping[str, Any]) -> Array:
    """The rows of a query or key projection in the order of llama.cpp's rotary embedding: the two halves of a head alternate."""
    query, key, _ = heads(config)
    count = {"q_proj": query, "k_proj": key}.get(name.split(".")[-2])
    if count is None:
        return rows
    return rows.reshape(count, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def rotary_factors(config: Mapping[str, Any]) -> Array | None:
    """What llama3's scaling divides each frequency by (float32, half a head), or None without scaling."""
    rope = rotary(config)
    if rope["rope_type"] != "llama3":
        return None
    _, _, size = heads(config)
    length = rope.get("original_max_position_embeddings", 8192)
    low, high, factor = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0), rope.get("factor", 8.0)
    wave = 2 * math.pi * float(rope["rope_theta"]) ** (np.arange(0, size, 2) / size)
    smooth = (length / wave - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    out: Array = np.where(wave < length / high, 1.0, np.where(wave > length / low, factor, between)).astype(np.float32)
    return out
