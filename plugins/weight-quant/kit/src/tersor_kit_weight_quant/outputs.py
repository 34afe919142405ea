"""The layers' output error of weight quantizers on a real language model, for claims that compare many settings in little time."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

import tersor
from tersor.api import as_method
from tersor.evidence import Row
from tersor_kit_weight_quant.judge import Judge

BLOCKS = (1, 14, 28)


class Outputs:
    """The linear layers of some blocks of SmolLM2-135M (by default the 21 of three blocks), each quantized alone.

    ``judge``: gives the model, the text that calibrates, and held-out text of the same source (WikiText-2 where it is at hand).
    """

    def __init__(self, judge: Judge, blocks: tuple[int, ...] = BLOCKS) -> None:
        text = next(iter(judge.tests))
        modules = {
            name: m
            for name, m in judge.model.named_modules()
            if isinstance(m, torch.nn.Linear) and any(f".layers.{b}." in name for b in blocks)
        }
        known = _grams(judge.model, modules, judge.known[text])
        new = _grams(judge.model, modules, [ids[None] for ids in judge.tests[text][:2048].split(512)])
        self.layers = [(m.weight.detach(), known[name], new[name]) for name, m in modules.items()]

    @functools.lru_cache(maxsize=64)  # noqa: B019
    def __call__(self, name: str) -> tuple[float, float]:
        """The geometric mean over layers of |X(W - Q)'|^2 / |XW'|^2 on held-out text, and measured bits a weight."""
        method = as_method(name)
        total, size, weights = 0.0, 0, 0
        for w, known, new in self.layers:
            codes = method.quantize(w, tersor.Calibration(gram=known, count=1))
            e = w - method.dequantize(codes)
            total += math.log(float(((e @ new) * e).sum() / ((w @ new) * w).sum())) / len(self.layers)
            size, weights = size + codes.nbytes, weights + w.numel()
        return math.exp(total), 8 * size / weights

    def row(self, words: str, ours: str, other: str, margin: float = 0.1) -> Row:
        """The comparison of two methods by their strings."""
        mine, theirs = self(ours), self(other)
        return Row(
            claim=f"output error: {words}",
            metric=f"relative squared output error, geometric mean of {len(self.layers)} layers, held-out text",
            ours=mine[0],
            baseline=theirs[0],
            baseline_name=other,
            better="lower",
            margin=margin,
            note=f"{ours}; {mine[1]:.3f} and {theirs[1]:.3f} bits measured",
        )


def _grams(model: Any, modules: dict[str, Any], batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """X'X of what each module gets."""
    found: dict[str, torch.Tensor] = {}

    def see(name: str, module: Any, args: tuple[Any, ...]) -> None:
        x = args[0].flatten(0, -2)
        found[name] = found[name] + x.T @ x if name in found else x.T @ x

    hooks = [m.register_forward_pre_hook(functools.partial(see, name)) for name, m in modules.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
