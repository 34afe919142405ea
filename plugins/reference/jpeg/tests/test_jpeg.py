"""The codec on synthetic and real images."""

import numpy as np
import pytest

import tersor
from tersor import metrics
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("jpeg", fresh_process=False)


def test_a_lower_quality_is_smaller_and_worse(photograph):
    x = photograph
    low, high = (tersor.codec("jpeg", quality=q) for q in (20, 90))
    a, b = low.encode(x), high.encode(x)
    assert a.nbytes < b.nbytes
    assert metrics.psnr(x, low.decode(a)) < metrics.psnr(x, high.decode(b))


def test_transparency_is_refused_with_what_is_allowed():
    with pytest.raises(tersor.InputError, match=r"1 \(L\), 3 \(RGB\) channels; given: 4"):
        tersor.codec("jpeg").encode(np.zeros((4, 8, 8), np.float32))
