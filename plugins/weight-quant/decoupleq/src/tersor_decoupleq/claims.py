"""The paper's claims on SmolLM2-135M: at 2 bits below GPTQ at equal measured bits, in the layers' outputs and in perplexity."""

from __future__ import annotations

from collections.abc import Iterator

import tersor
from tersor.evidence import Row, claim


@claim("the layers' output error is below gptq's at equal measured bits")
def output_error(seed: int) -> Iterator[Row]:
    """21 linear layers of three blocks; calibrated on 8 windows of 512 tokens, judged on others."""
    from tersor_kit_weight_quant.judge import Judge, matched
    from tersor_kit_weight_quant.outputs import Outputs

    outputs = Outputs(Judge(seed))
    for bits, size in ((2, 128), (2, 64), (3, 128), (4, 128)):
        ours = f"decoupleq:bits={bits},group_size={size}"
        for plain in ("gptq", "gptq:clip=true"):
            other = matched(plain, round(outputs(ours)[1], 4))
            yield outputs.row(f"below {plain} at {bits} bits, groups of {size}", ours, other)


@claim("the network's perplexity is below gptq's at equal measured bits")
def perplexity(seed: int) -> Iterator[Row]:
    """All 210 linear layers."""
    from tersor_kit_weight_quant.judge import Judge

    judge = Judge(seed)
    for bits, others in ((2, ("gptq", "gptq:clip=true")), (3, ("gptq",))):
        ours = judge(tersor.quantizer("decoupleq", bits=bits))
        note = f"{ours.layer_seconds:.0f} s for 210 layers"
        for other in others:
            base = judge.baseline(other, ours.bits)
            yield from judge.rows(f"below {other} at {bits} bits, groups of 128", ours, base, note=note)
