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
    """3 bits in groups of 128, each text calibrated on other parts of it."""
    judge, verdict = _judge(seed)
    ours = verdict("nupes:bits=3")
    told = f"{ours.layer_seconds:.0f} s for the 210 layers"
    yield from judge.rows("learned below searched at 3 bits", ours, verdict("nupes:bits=3,steps=0"), note=told)
    yield from judge.rows("learned below rtn with clip search at 3 bits", ours, judge.baseline("rtn:clip=true", ours.bits))


@claim("learned from data, the layers' output error is below that of the search without data, down to 2 bits")
def output_error(seed: int) -> Iterator[Row]:
    """21 linear layers of three blocks; calibrated on 8 windows of 512 tokens, judged on others."""
    from tersor_kit_weight_quant.outputs import Outputs

    outputs = Outputs(_judge(seed)[0])
    for bits in (4, 3, 2):
        ours = f"nupes:bits={bits}"
        for other in (f"nupes:bits={bits},steps=0", f"rtn:bits={bits},clip=true"):
            yield outputs.row(f"{ours} below {other}", ours, other)
