"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), for llama.cpp and what builds on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type

from tersor import Exporter, ExportError, ExportModel, ModelTensor, field, method, one_of, track
from tersor.exporters import refuse
from tersor_gguf import network
from tersor_gguf.blocks import from_floats, from_levels
from tersor_gguf.vocabulary import add_tokenizer

_FILE_TYPES = {
    Type.F32: "ALL_F32", Type.F16: "MOSTLY_F16", Type.BF16: "MOSTLY_BF16", Type.Q4_0: "MOSTLY_Q4_0", Type.Q4_1: "MOSTLY_Q4_1",
    Type.Q5_0: "MOSTLY_Q5_0", Type.Q5_1: "MOSTLY_Q5_1", Type.Q8_0: "MOSTLY_Q8_0",
}  # fmt: skip


@method
class GGUF(Exporter):
    """A ``.gguf`` file of a Llama network, with its tokenizer, that llama.cpp runs and transformers reads.

    Weights whose values are evenly spaced levels go to the smallest block type that holds them exactly: Q4_0 for levels from -8 to
    7 steps around 0 (4 bits and symmetric, or up to 3 bits), Q4_1 and Q5_1 where the least level of every group is a float16
    number, Q5_0 from -16 to 15 steps (4 bits with zero points, 5 bits and symmetric), Q8_0 from -128 to 127 (up to 7 bits with zero
    points, 8 bits and symmetric). What was kept goes to the smallest of Q8_0, F16, BF16 and F32 that gives it back exactly.

    Not held, with the tensor's name in the :class:`tersor.ExportError`: values that are no evenly spaced levels; groups that are no
    whole blocks of 32 consecutive weights, as those in the order of activations; scales that are not exact in float16; zero points
    that are no whole numbers. ``rest="dense"`` writes these as plain numbers.
    Networks other than Llama's (and Mistral's without window), and tokenizers other than byte-level BPE, are an error too.
    """

    name = "gguf"
    suffix = ".gguf"

    rest: str = field("refuse", one_of("refuse", "dense"), help="tensors that no block type holds: an error, or plain numbers")
    tokenizer: bool = field(True, help="write the tokenizer too, without which llama.cpp takes token numbers only")
    pre: str = field("", help="llama.cpp's name for how the tokenizer splits text; empty: told from tokenizer.json")

    def check(self, config: Mapping[str, Any]) -> None:
        network.check(config)

    def _export(self, model: ExportModel, out: Path) -> dict[str, str]:
        config = model.config
        for name, first in model.ties.items():
            if (name, first) != ("lm_head.weight", "model.embed_tokens.weight"):
                raise ExportError(f"gguf: {name} and {first} are one tensor; GGUF's llama ties only the head to the embedding")
        writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
        try:
            network.add_metadata(writer, config, model.name)
            add_tokenizer(writer, model.files if self.tokenizer else {}, int(config["vocab_size"]), self.pre)
            # the header has the types and places of all tensors, so each is looked at twice, and one at a time is in memory
            written = self._plan(model, writer)
            if (factors := network.rotary_factors(config)) is not None:
                writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes, Type.F32)
            blocks = Counter(kind for name, kind in written.items() if not model.tensors[name].kept)
            usual = Type[(blocks or Counter(written.values())).most_common(1)[0][0]]
            writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[usual]])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for t in track(model, "exporting"):
                writer.write_tensor_data(network.turned(t.name, self._written(t)[1], config))
            if factors is not None:
                writer.write_tensor_data(factors)
        finally:
            writer.close()
        return written

    def _plan(self, model: ExportModel, writer: gguf.GGUFWriter) -> dict[str, str]:
        """Announce every tensor to the writer; the type of each. ExportError where some fit none."""
        known = network.names(model.config)
        written: dict[str, str] = {}
        problems: dict[str, str] = {}
        for t in track(model, "checking"):
            name = known.get_name(t.name, (".weight",))
            try:
                if name is None:
                    raise ExportError("GGUF's llama has no such tensor")
                kind, raw = self._written(t)
            except ExportError as error:
                problems[t.name] = str(error)
                continue
            writer.add_tensor_info(name, raw.shape, raw.dtype, raw.nbytes, kind)
            written[t.name] = kind.name
        refuse("gguf", problems)
        return written

    def _written(self, t: ModelTensor) -> tuple[Type, Any]:
        """The type and the bytes of one tensor, its rows in the network's order."""
        if not t.kept:
            try:
                uniform = None if t.turned or len(t.shape) != 2 else t.uniform()
                if uniform is None:
                    raise ExportError(
                        f"what {t.method} gives are no evenly spaced levels with a scale; rest=dense writes plain numbers"
                    )
                return from_levels(uniform)
            except ExportError:
                if self.rest == "refuse":
                    raise
        return from_floats(np.ascontiguousarray(t.dense().float().numpy()))
