"""The attention cache of a network that FlatQuant compressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from tersor_flatquant.layer import FlatLinear


class _CacheLayer(DynamicLayer):  # type: ignore[misc]
    """The keys and values of one block as ``kv_bits`` give them back."""

    def __init__(self, key: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.round = key, value

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return super().update(self.round[0](key_states), self.round[1](value_states), *args, **kwargs)  # type: ignore[no-any-return]


class FlatCache(Cache):  # type: ignore[misc]
    """The attention cache of a transformers network whose layers are :class:`FlatLinear`: ``network(ids,
    past_key_values=FlatCache(network))``, or the same argument to ``generate``.

    Every key and value is rounded to ``kv_bits`` in its head's transform as it comes, the prompt's too. It holds the rounded values
    as floats: what is measured is their effect, not the memory. Blocks whose ``k_proj`` or ``v_proj`` is another layer keep theirs.
    """

    def __init__(self, network: nn.Module) -> None:
        pairs = [(m.k_proj, m.v_proj) for m in network.modules() if hasattr(m, "k_proj") and hasattr(m, "v_proj")]
        super().__init__(layers=[_CacheLayer(*(_rounding(layer) for layer in pair)) for pair in pairs])


def _rounding(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return layer.cached if isinstance(layer, FlatLinear) else lambda x: x
