"""The papers' claims on SmolLM2-135M: power levels beat even ones without data, and learning beats searching."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import tersor
from tersor.api import as_method
from tersor.evidence import Row, claim


@functools.cache
def _judge(seed: int) -> tuple[Any, Any]:
    """The judge, and its verdict on a method, each found once."""
    from tersor_kit_weight_quant.judge import Judge

    judge = Judge(seed)
    return judge, functools.cache(judge)


@claim("without data, perplexity is below that of even levels at equal bits")
def without_data(seed: int) -> Iterator[Row]:
    """Groups of 128, against plain rounding and against rounding with a clip search."""
    judge, verdict = _judge(seed)
    for bits in (4, 3):
        ours = verdict(f"nupes:bits={bits},steps=0")
        for rtn in ("rtn", "rtn:clip=true"):
            base = judge.baseline(rtn, ours.bits)
            yield from judge.rows(f"without data below {rtn} at {bits} bits", ours, base)


@claim("learned from data, perplexity is below that of the search without data, and of even levels")
def learned(seed: int) -> Iterator[Row]:
    """3 bits in groups of 128, each text calibrated on other parts of it."""
    judge, verdict = _judge(seed)
    ours = verdict("nupes:bits=3")
    told = f"{ours.layer_seconds:.0f} s for the 210 layers"
    yield from judge.rows("learned below searched at 3 bits", ours, verdict("nupes:bits=3,steps=0"), note=told)
    yield from judge.rows("learned below rtn with clip search at 3 bits", ours, judge.baseline("rtn:clip=true", ours.bits))


@claim("learned from data, the layers' output error is below that of the search without data, down to 2 bits")
def output_error(seed: int) -> Iterator[Row]:
    """21 linear layers of three blocks; every other window of Python's documentation calibrates, the rest judges."""
    from tersor_kit_weight_quant.judge import PYTHON

    judge, _ = _judge(seed)
    layers = {
        name: module
        for name, module in judge.model.named_modules()
        if type(module).__name__ == "Linear" and any(f".layers.{block}." in name for block in (0, 14, 29))
    }
    known, new = (_grams(judge.model, layers, judge.known[PYTHON][first::2]) for first in (0, 1))
    for bits in (4, 3, 2):
        error = dict.fromkeys((f"nupes:bits={bits}", f"nupes:bits={bits},steps=0", f"rtn:bits={bits},clip=true"), 0.0)
        for method in error:
            quantizer = as_method(method)
            for name, module in layers.items():
                w = module.weight.detach()
                lost = w - quantizer.dequantize(quantizer.quantize(w, tersor.Calibration(gram=known[name], count=1)))
                error[method] += float(((lost @ new[name]) * lost).sum() / ((w @ new[name]) * w).sum()) / len(layers)
        ours, *others = error
        for other in others:
            yield Row(
                claim=f"output error below {other}",
                metric="mean relative squared output error of 21 layers, held-out text",
                ours=error[ours],
                baseline=error[other],
                baseline_name=other,
                better="lower",
                margin=0.1,
            )


def _grams(model: Any, layers: dict[str, Any], batches: list[Any]) -> dict[str, Any]:
    """X'X of what each layer gets as input."""
    import torch

    found: dict[str, Any] = {}

    def see(name: str, x: Any) -> None:
        x = x.flatten(0, -2)
        found[name] = found.get(name, 0) + x.T @ x

    hooks = [m.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, m in layers.items()]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return found
