"""The codec on synthetic and real images."""

import numpy as np

import tersor
from tersor import metrics
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("jpeg2000", fresh_process=False)


def test_the_target_is_met(photograph):
    x = photograph
    for target in (32.0, 40.0):
        codec = tersor.codec("jpeg2000", psnr=target)
        assert abs(metrics.psnr(x, codec.decode(codec.encode(x))) - target) < 2.5


def test_lossless_is_exact(photograph):
    x = photograph
    codec = tersor.codec("jpeg2000", lossless=True)
    assert np.array_equal(codec.decode(codec.encode(x)), x)
