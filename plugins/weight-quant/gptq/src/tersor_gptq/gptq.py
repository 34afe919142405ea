"""GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (https://arxiv.org/abs/2210.17323)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tersor import Calibration, ConfigError, Quantizer, Spec, Uniform, at_least, between, field, method
from tersor_kit_weight_quant import CLIP_RATIOS, gram, load, round_columns, store


@method
class GPTQ(Quantizer):
    """Columns are rounded one after another; each error is fed back into the columns still to come (section 3, algorithm 1).

    Weights: float, out x in. Calibration: the layer's inputs, samples x in, or their X'X, in x in. What is minimised is
    |X W' - X Q'|^2, with Hessian H = 2 X'X + damping. The paper feeds errors back through the Cholesky factor of the inverse of H;
    here it is the factor of H itself, which gives the same codes for one factorisation and no inverse (see the kit's ``hessian``).

    The options of the authors' code (IST-DASLab/gptq) and of AutoGPTQ:

    - ``act_order``: columns of large diagonal first. Groups follow that order, so the group of every column is stored too
      (5 bits a column at 32 groups).
    - ``static_groups``: the grids are those of the original weights in their original layout, chosen before the first column is
      rounded; with ``act_order`` nothing more is stored. Otherwise a group's grid is chosen when its first column comes up.
    - ``clip``: the range of each group is searched for the least squared error.
    - Columns that were never active are set to 0, as the authors do.
    - ``block_size``: columns between matrix products, for speed alone: updates are lazy at every scale, in halves.

    Stored: codes and zero points at ``bits`` bits, scales in float16, group indices. Where H is singular the damping is raised
    tenfold, with a warning, up to the mean diagonal.

    Raises :class:`tersor.ConfigError` for a group size of 0 or below -1, :class:`tersor.InputError` for NaN and infinity in the
    weights, :class:`tersor.CalibrationError` for calibration data that is missing, of another width, all zero, not finite, or not
    positive definite at the highest damping.
    """

    name = "gptq"
    domains = ("weight",)
    native = "torch"
    calibration = "required"

    bits: int = field(4, between(2, 8), help="bits per weight")
    group_size: int = field(128, help="weights that share a scale; -1: a whole row")
    sym: bool = field(False, help="symmetric levels, without zero points")
    act_order: bool = field(True, help="round columns of large activations first (desc_act)")
    static_groups: bool = field(False, help="grids of the original weights, in the original layout")
    clip: bool = field(False, help="search the range of each group for the least squared error")
    damp: float = field(0.01, between(0, 1), help="damping, as a fraction of the Hessian's mean diagonal")
    block_size: int = field(32, at_least(1), help="columns between matrix products; changes speed only")

    def __attrs_post_init__(self) -> None:
        if self.group_size < 1 and self.group_size != -1:
            raise ConfigError(f"gptq: group_size={self.group_size} is not allowed; allowed: 1 or more, or -1 for a whole row")

    @classmethod
    def examples(cls) -> list[GPTQ]:
        """For the conformance kit."""
        return [cls(group_size=4), cls(bits=3, group_size=-1, sym=True, clip=True, block_size=2)]

    @classmethod
    def at_bits(cls, bits: int) -> list[GPTQ]:
        """With the whole range of each group, and with the range searched."""
        return [cls(bits=bits), cls(bits=bits, clip=True)] if 2 <= bits <= 8 else []

    @property
    def _indexed(self) -> bool:
        """Whether groups are runs in the order of rounding, which is not the order of the columns."""
        return self.act_order and not self.static_groups and self.group_size != -1

    def _quantize(self, x: Tensor, calibration: Calibration | None, spec: Spec) -> dict[str, Any]:
        hessian = gram(calibration, x.shape[1])
        ratios = CLIP_RATIOS if self.clip else ()
        # Algorithm 1, a column at a time; the loop is the kit's, as it is also the last step of other methods.
        grid, codes = round_columns(
            x,
            hessian,
            self.bits,
            self.group_size,
            self.sym,
            self.act_order,
            self.static_groups,
            ratios,
            self.damp,
            self.block_size,
        )
        return store(grid, codes)

    def _uniform(self, parts: dict[str, Any], spec: Spec) -> Uniform | None:
        grid, codes = load(parts, spec.shape, self.bits, self.group_size, self.sym, self._indexed)  # type: ignore[arg-type]
        return grid.uniform(codes)

    def _dequantize(self, parts: dict[str, Any], spec: Spec) -> Tensor:
        grid, codes = load(parts, spec.shape, self.bits, self.group_size, self.sym, self._indexed)  # type: ignore[arg-type]
        return grid.dequantize(codes, getattr(torch, spec.dtype))
