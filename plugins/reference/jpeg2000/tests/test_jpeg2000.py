"""The codec on synthetic and real images."""

import numpy as np

import tersor
from tersor import metrics
from tersor.testing import assert_conforms


def photograph():
    """A smooth 8-bit picture with an edge."""
    y, x = np.mgrid[0:96, 0:128] / 128
    red = 0.5 + 0.4 * np.sin(7 * x + 3 * y)
    return (np.rint(255 * np.stack([red, 0.8 * y, np.where(x > y, 0.9, 0.2)])) / 255).astype(np.float32)


def test_conformance():
    assert_conforms("jpeg2000", fresh_process=False)


def test_the_target_is_met():
    x = photograph()
    for target in (32.0, 40.0):
        codec = tersor.codec("jpeg2000", psnr=target)
        assert abs(metrics.psnr(x, codec.decode(codec.encode(x))) - target) < 2.5


def test_lossless_is_exact():
    x = photograph()
    codec = tersor.codec("jpeg2000", lossless=True)
    assert np.array_equal(codec.decode(codec.encode(x)), x)
