"""One-shot magnitude pruning, the baseline of pruning."""

from __future__ import annotations

from typing import Any, Self

from tersor import Pruner, between, field, method, one_of
from tersor_kit_pruning import largest


@method
class Magnitude(Pruner):
    """Keeps the weights of largest magnitude (Han et al., https://arxiv.org/abs/1506.02626, section 3), exactly ``keep`` of them.

    Weights: float tensors of any shape, one or several by name. ``scope="global"`` ranks all tensors together,
    ``"tensor"`` each on its own. Of equal magnitudes the first are kept. Raises :class:`tersor.InputError` for NaN.
    """

    name = "magnitude"
    domains = ("weight",)
    native = "torch"
    keep: float = field(0.5, between(0, 1), help="fraction of weights kept")
    scope: str = field("global", one_of("global", "tensor"), help="rank all tensors together, or each alone")

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(keep=0.1), cls(keep=0.3, scope="tensor"), cls(keep=0.0), cls(keep=1.0)]

    def promised(self, size: int) -> int | None:
        return round(self.keep * size) if self.scope == "global" else None

    def _prune(self, tensors: dict[str, Any], calibration: Any) -> dict[str, Any]:
        if self.scope == "global":
            return largest(tensors, round(self.keep * sum(t.numel() for t in tensors.values())))
        return {k: largest({k: t}, round(self.keep * t.numel()))[k] for k, t in tensors.items()}
