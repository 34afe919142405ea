"""Every installed quantizer of vectors, fitted to plain ones of any size."""

from __future__ import annotations

from typing import Any

import attrs
import pytest
import torch

from tersor import registry

DIM = 8


def methods() -> dict[str, Any]:
    out = {}
    for about in registry.listing():
        if about["kind"] == "quantizer" and "latent" in about["domain"].split(","):
            cls = registry.lookup("quantizer", about["name"])
            several = next((m for bits in (6, 8) if (m := getattr(cls, "at_code_bits", lambda *_: [])(bits, DIM))), [])
            out.update((str(m), attrs.evolve(m, steps=150)) for m in several if cls.fitted and getattr(m, "dim", 0) == DIM)
    return out


@pytest.mark.parametrize("name", list(methods()))
def test_fitting_does_not_depend_on_the_unit_of_the_vectors(name: str) -> None:
    method = methods()[name]
    if name.startswith("softvq"):
        pytest.skip("its codewords have length 1, whatever the vectors")
    x = torch.randn(1500, DIM, generator=torch.Generator().manual_seed(0))
    errors = []
    for unit, offset in ((1.0, 0.0), (1e-3, 0.0), (1e4, 5e3)):
        vectors = x * unit + offset
        fitted = method.fit([vectors])
        back = fitted.dequantize(fitted.quantize(vectors))
        errors.append(float((back - vectors).square().sum() / (x * unit).square().sum()))
    assert errors[0] < 0.9
    assert max(errors) < 1.3 * min(errors) + 0.05
