"""A tokenizer.json of transformers as GGUF describes it: byte-level BPE, with the rule that splits text before."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf

from tersor import CorruptPayloadError, ExportError

_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
#: How tokenizer.json splits text before merging (its pre-tokenizers in short), to llama.cpp's name for the rule.
RULES = {
    ("ByteLevel",): "gpt-2",
    ("Digits 1", "ByteLevel"): "smollm",
    (f"Split {_LLAMA3}", "bytes"): "llama-bpe",
    (f"Split {_LLAMA3.replace('{1,3}', '')}", "bytes"): "qwen2",
}


def add_tokenizer(writer: gguf.GGUFWriter, files: Mapping[str, bytes], size: int, pre: str) -> str:
    """Write tokens, their types, merges, special tokens and the chat template; says what the tokenizer is.

    ``size``: rows of the embedding, up to which tokens are filled up. ``pre``: llama.cpp's name for the rule that splits text,
    ``""`` to tell it from tokenizer.json. Raises :class:`tersor.ExportError` for tokenizers of another kind.
    """
    if "tokenizer.json" not in files:
        writer.add_tokenizer_model("none")
        return "none"
    try:
        content = json.loads(files["tokenizer.json"])
        model, added = content["model"], content.get("added_tokens") or []
        kind, vocabulary = model.get("type") or "BPE", dict(model["vocab"])
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptPayloadError(f"the file's tokenizer.json cannot be read ({type(error).__name__}: {error})") from error
    if kind != "BPE" or model.get("byte_fallback"):
        said = "BPE with byte fallback (SentencePiece)" if kind == "BPE" else kind
        raise ExportError(
            f"gguf: the tokenizer is {said}; this exporter writes byte-level BPE; tokenizer=false leaves the tokenizer out"
        )
    pre = pre or _rule(content.get("pre_tokenizer"))
    tokens = [f"[PAD{i}]" for i in range(size)]
    types = [gguf.TokenType.UNUSED] * size
    entries = [(text, number, gguf.TokenType.NORMAL) for text, number in vocabulary.items()]
    for token in added:
        special = gguf.TokenType.CONTROL if token.get("special") else gguf.TokenType.USER_DEFINED
        entries.append((token["content"], token["id"], special))
    for text, number, type_ in entries:
        if not 0 <= number < size:
            raise ExportError(f"gguf: the tokenizer has token {number} ({text!r}) and the embedding {size} rows")
        tokens[number], types[number] = text, type_
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    with tempfile.TemporaryDirectory(prefix="tersor-") as folder:
        for name, raw in files.items():
            Path(folder, name).write_bytes(raw)
        gguf.SpecialVocab(folder, load_merges=True, n_vocab=size).add_to_gguf(writer, quiet=True)
    return f"byte-level BPE, {pre}"


def _rule(pre_tokenizer: Any) -> str:
    steps = tuple(_short(s) for s in (pre_tokenizer or {}).get("pretokenizers") or [pre_tokenizer or {}])
    if steps not in RULES:
        known = ", ".join(RULES.values())
        raise ExportError(
            f"gguf: the rule by which the tokenizer splits text is none of {known}: {', '.join(steps)}; "
            f"pre=NAME gives llama.cpp's name for it, tokenizer=false leaves the tokenizer out"
        )
    return RULES[steps]


def _short(step: Mapping[str, Any]) -> str:
    kind = str(step.get("type", "none"))
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return "ByteLevel" if step.get("use_regex", True) else "bytes"
    if kind == "Digits":
        return f"Digits {1 if step.get('individual_digits') else 3}"
    if kind == "Split" and str(step.get("behavior")) == "Isolated" and not step.get("invert"):
        return f"Split {(step.get('pattern') or {}).get('Regex')}"
    return json.dumps(step, sort_keys=True)
