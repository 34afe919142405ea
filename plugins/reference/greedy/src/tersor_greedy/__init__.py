"""Greedy for Tersor."""

from tersor import hookimpl
from tersor_greedy.greedy import Greedy

__all__ = ["Greedy"]


@hookimpl
def tersor_decoder() -> type[Greedy]:
    return Greedy
