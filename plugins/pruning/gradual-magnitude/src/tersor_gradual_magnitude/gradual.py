"""To prune, or not to prune: exploring the efficacy of pruning for model compression (Zhu, Gupta; https://arxiv.org/abs/1710.01878)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from tersor import ConfigError, Pruner, at_least, between, field, method
from tersor_kit_pruning import Masks, largest


@method
class GradualMagnitude(Pruner):
    """Sparsity grows along a cubic schedule while the network trains (section 3, equation 1).

    From step ``begin`` on, every ``frequency`` steps each layer's smallest weights are masked, so that its sparsity is

        s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3

    which prunes rapidly at first, while redundant connections abound, and slowly at the end. With ``keep`` = 1 - s_f and
    ``initial_keep`` = 1 - s_i; after step ``end`` the masks stay and training goes on. Masked weights are held at zero and
    take part again if a later selection ranks them higher.

    Training: ``pruning = method.attach(network)``, then ``pruning.step()`` after every optimizer step. :meth:`prune` and the
    sparse file select layer by layer at the final ``keep``, which after training picks just the weights that survived.
    Weights: float tensors of any shape, one or several by name. Raises :class:`tersor.ConfigError` where ``end`` is not after
    ``begin``, :class:`tersor.InputError` for NaN.
    """

    name = "gradual-magnitude"
    domains = ("weight",)
    native = "torch"
    keep: float = field(0.1, between(0, 1), help="fraction of each layer's weights kept at the end (1 - s_f)")
    initial_keep: float = field(1.0, between(0, 1), help="fraction kept at the first pruning step (1 - s_i)")
    begin: int = field(0, at_least(0), help="step of the first pruning (t_0)")
    end: int = field(1000, at_least(1), help="step of the last pruning (t_0 + n dt)")
    frequency: int = field(10, at_least(1), help="steps between prunings (dt); the paper: 100 to 1000 on large tasks")

    def __attrs_post_init__(self) -> None:
        if self.end <= self.begin:
            raise ConfigError(f"gradual-magnitude: begin={self.begin}, end={self.end}; allowed: end after begin")
        if self.initial_keep < self.keep:
            raise ConfigError(
                f"gradual-magnitude: initial_keep={self.initial_keep} below keep={self.keep}; allowed: keep or more"
            )

    @classmethod
    def examples(cls) -> list[Self]:
        return [cls(), cls(keep=0.5), cls(keep=0.0)]

    def kept_at(self, step: int) -> float:
        """1 - s_t, the fraction kept once step ``step`` is done (equation 1)."""
        progress = min(max((step - self.begin) / (self.end - self.begin), 0.0), 1.0)
        return self.keep + (self.initial_keep - self.keep) * (1 - progress) ** 3

    def attach(self, network: nn.Module, weights: Mapping[str, nn.Parameter] | None = None) -> GradualPruning:
        """Prune a network in training; ``weights``: which parameters, by name (default: all of two dimensions or more)."""
        return GradualPruning(self, Masks(network, weights))

    def _prune(self, tensors: dict[str, Tensor], calibration: Any) -> dict[str, Tensor]:
        return _select(tensors, self.keep)


def _select(tensors: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """Layer by layer, the largest weights."""
    return {k: largest({k: t}, round(keep * t.numel()))[k] for k, t in tensors.items()}


class GradualPruning:
    """The schedule at work on one network: call :meth:`step` after each optimizer step."""

    def __init__(self, method_: GradualMagnitude, masks: Masks) -> None:
        self.method, self.masks, self.steps = method_, masks, 0

    def step(self) -> None:
        """Count a training step; select anew where the schedule says so; hold masked weights at zero."""
        m, t = self.method, self.steps
        if m.begin <= t <= m.end and ((t - m.begin) % m.frequency == 0 or t == m.end):
            self.masks.masks = _select(self.masks.weights, m.kept_at(t))
        self.masks.apply()
        self.steps += 1

    @property
    def keep(self) -> float:
        """The fraction of weights kept now."""
        return self.masks.keep

    def state_dict(self) -> dict[str, Any]:
        """Step number and masks."""
        return {"steps": self.steps, "masks": self.masks.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.masks.load_state_dict(state["masks"])
        self.steps = int(state["steps"])
