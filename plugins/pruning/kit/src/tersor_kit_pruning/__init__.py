"""Exact selection of the largest elements, and masks that hold while a network trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Masks", "largest", "weights_of"]

_SAMPLE, _BLOCK = 1 << 16, 1 << 17  # elements; a block's magnitudes stay in the cache


def largest(tensors: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Boolean masks, True at the ``count`` elements of largest magnitude over all tensors together; of equals the first are kept.

    A sample brackets the threshold, so that only the few elements inside the bracket are kept aside and selected from: one pass
    over the memory instead of a sort, and beside the masks no more memory than those few.
    """
    total = sum(t.numel() for t in tensors.values())
    if not 0 <= count <= total:
        raise ValueError(f"count={count}; allowed: 0 to {total}")
    if count in (0, total):
        return {k: torch.full(t.shape, count > 0) for k, t in tensors.items()}
    flat = [t.detach().reshape(-1) for t in tensors.values()]
    masks = [np.empty(t.numel(), bool) for t in flat]
    low, high = _bracket(flat, count, total)
    over, near = _split(flat, masks, low, high)
    values = np.concatenate([v for _, _, v in near])
    if not 0 < count - over <= values.size:  # the sample was not like the rest
        over, near = _split(flat, masks, -np.inf, np.inf)
        values = np.concatenate([v for _, _, v in near])
    place = values.size - (count - over)
    threshold = np.partition(values, place)[place]
    ties = count - over - int(np.count_nonzero(values > threshold))
    for mask, places, v in near:
        keep = v > threshold
        if ties:
            equal = np.flatnonzero(v == threshold)[:ties]
            keep[equal] = True
            ties -= equal.size
        mask[places] = keep
    return {k: torch.from_numpy(m).reshape(t.shape) for (k, t), m in zip(tensors.items(), masks, strict=True)}


def _bracket(flat: list[Tensor], count: int, total: int) -> tuple[float, float]:
    """Bounds between which the ``count``-th largest magnitude most likely is, from a sample."""
    step = total // _SAMPLE
    if step < 4:
        return -np.inf, np.inf
    sample = np.sort(torch.cat([t[::step].float() for t in flat]).abs().numpy())
    place, slack = int((1 - count / total) * sample.size), 4 * int(sample.size**0.5)
    low = float(sample[place - slack]) if place >= slack else -np.inf
    return low, float(sample[place + slack]) if place + slack < sample.size else np.inf


def _split(
    flat: list[Tensor], masks: list[np.ndarray], low: float, high: float
) -> tuple[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Set the masks at magnitudes above ``high``; how many those are, and (mask of the block, places, magnitudes) of what lies
    between the bounds."""
    over, near = 0, []
    for t, mask in zip(flat, masks, strict=True):
        for start in range(0, t.numel(), _BLOCK):
            size = t[start : start + _BLOCK].float().abs().numpy()
            part = mask[start : start + _BLOCK]
            np.greater(size, high, out=part)
            over += int(np.count_nonzero(part))
            places = np.flatnonzero((size >= low) != part)
            near.append((part, places, size[places]))
    return over, near


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
