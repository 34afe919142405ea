"""Exact selection of the largest elements, and masks that hold while a network trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Masks", "largest", "weights_of"]

_SAMPLE = 1 << 14


def largest(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Boolean masks, True at the ``count`` elements of largest magnitude over all tensors together; of equals the first are kept.

    A sample brackets the threshold, so that only the few elements inside the bracket are sorted: about two passes over the
    memory instead of a sort.
    """
    total = sum(t.numel() for t in tensors.values())
    if not 0 <= count <= total:
        raise ValueError(f"count={count}; allowed: 0 to {total}")
    if count in (0, total):
        return {k: torch.full(t.shape, count > 0) for k, t in tensors.items()}
    size = torch.empty(total)
    start = 0
    for t in tensors.values():
        torch.abs(t.detach().reshape(-1).float(), out=size[start : start + t.numel()])
        start += t.numel()
    threshold, above = _threshold(size.numpy(), count)
    keep = size > threshold
    missing = count - above
    if missing:
        ties = torch.nonzero(size == threshold).reshape(-1)[:missing]
        keep[ties] = True
    return {
        k: m.reshape(t.shape)
        for (k, t), m in zip(tensors.items(), keep.split([t.numel() for t in tensors.values()]), strict=True)
    }


def _threshold(size: np.ndarray, count: int) -> tuple[float, int]:
    """The ``count``-th largest value, and how many are larger."""
    n = size.size
    low, high = -np.inf, np.inf
    if n > 8 * _SAMPLE:
        sample = np.sort(size[:: n // _SAMPLE])
        place = int((1 - count / n) * sample.size)
        slack = 4 * int(np.sqrt(_SAMPLE))
        low = float(sample[place - slack]) if place >= slack else -np.inf
        high = float(sample[place + slack]) if place + slack < sample.size else np.inf
    over = int(np.count_nonzero(size > high)) if np.isfinite(high) else 0
    inside = size[(size >= low) & (size <= high)] if np.isfinite(low) or np.isfinite(high) else size
    wanted = count - over
    if not 0 < wanted <= inside.size:  # the sample was not like the rest
        inside, wanted = size, count
    value = float(np.partition(inside, inside.size - wanted)[inside.size - wanted])
    return value, int(np.count_nonzero(size > value))


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that pruning is usually applied to: parameters of two dimensions or more, by name."""
    return {name: p for name, p in module.named_parameters() if p.ndim >= 2}


class Masks:
    """Masks of a network's weights. ``apply()`` after each optimizer step keeps pruned weights at zero."""

    def __init__(self, module: nn.Module, weights: Mapping[str, nn.Parameter] | None = None) -> None:
        self.weights = dict(weights_of(module) if weights is None else weights)
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self.weights.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Set the pruned weights to zero."""
        for name, w in self.weights.items():
            w.mul_(self.masks[name])

    @property
    def keep(self) -> float:
        """The fraction of weights kept."""
        return sum(int(m.sum()) for m in self.masks.values()) / max(1, sum(m.numel() for m in self.masks.values()))

    def state_dict(self) -> dict[str, Any]:
        """The masks, to go on training from."""
        return dict(self.masks)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take masks up again; KeyError for other names than the network's."""
        if set(state) != set(self.masks):
            raise KeyError(f"masks of {sorted(state)}; the network has {sorted(self.masks)}")
        self.masks = {k: v.bool() for k, v in state.items()}
        self.apply()
