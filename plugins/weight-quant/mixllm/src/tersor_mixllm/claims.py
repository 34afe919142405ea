"""The paper's claims on SmolLM2-135M: mixed precision of rows below uniform bits, and the global choice below equal shares."""

from __future__ import annotations

from collections.abc import Iterator

from tersor.evidence import Row, claim


@claim("perplexity below uniform bits, and below equal shares for all layers, at equal bits")
def perplexity(seed: int) -> Iterator[Row]:
    """All 210 linear layers, calibrated on 8 windows of 512 tokens; one row in ten has 8 bits, the others 4.

    Both baselines have 4 bits and a clip search, in groups so small that their files are no smaller: of 34 columns (4.59 bits).
    Smaller ones come to lie inside the blocks of 32 weights in which this model was stored with 16 levels, where rounding to 16 levels
    changes nothing.
    """
    from tersor_kit_weight_quant.judge import Judge

    judge = Judge(seed, batches=8)
    ours = judge("mixllm")
    took = f"{ours.layer_seconds:.0f} s for 210 layers, {ours.seconds:.0f} s with the passes over the data"
    yield from judge.rows("below rtn with clip search", ours, judge("rtn:clip=true,group_size=34"), note=took)
    yield from judge.rows("below gptq with clip search", ours, judge("gptq:clip=true,group_size=34"))
    yield from judge.rows("salience over the whole network below equal shares", ours, judge("mixllm:share=layer"))
