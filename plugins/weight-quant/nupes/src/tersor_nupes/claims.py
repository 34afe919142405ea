"""The papers' claims on SmolLM2-135M: power levels beat even ones without data, and learning beats searching."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

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
    """Groups of 128, each text calibrated on other parts of it. Without data nothing works at 2 bits, so that even levels there are noise."""
    judge, verdict = _judge(seed)
    for bits in (4, 3, 2):
        ours = verdict(f"nupes:bits={bits}")
        told = f"{ours.layer_seconds:.0f} s for the 210 layers"
        yield from judge.rows(f"learned below searched at {bits} bits", ours, verdict(f"nupes:bits={bits},steps=0"), note=told)
        base = judge.baseline("rtn:clip=true", ours.bits)
        yield from judge.rows(f"learned below rtn with clip search at {bits} bits", ours, base)
