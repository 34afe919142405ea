"""The codec on synthetic and real images."""

import tersor
from tersor import metrics
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("avif", fresh_process=False)


def test_a_lower_quality_is_smaller_and_worse(photograph):
    x = photograph
    low, high = (tersor.codec("avif", quality=q, speed=10) for q in (20, 90))
    a, b = low.encode(x), high.encode(x)
    assert a.nbytes < b.nbytes
    assert metrics.psnr(x, low.decode(a)) < metrics.psnr(x, high.decode(b))
