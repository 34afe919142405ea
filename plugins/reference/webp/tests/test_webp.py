"""The codec on synthetic and real images."""

import numpy as np

import tersor
from tersor.testing import assert_conforms


def photograph():
    """A smooth 8-bit picture with an edge."""
    y, x = np.mgrid[0:96, 0:128] / 128
    red = 0.5 + 0.4 * np.sin(7 * x + 3 * y)
    return (np.rint(255 * np.stack([red, 0.8 * y, np.where(x > y, 0.9, 0.2)])) / 255).astype(np.float32)


def test_conformance():
    assert_conforms("webp", fresh_process=False)


def test_lossless_is_exact_and_larger():
    x = photograph()
    exact, lossy = tersor.codec("webp", lossless=True), tersor.codec("webp")
    payload = exact.encode(x)
    assert np.array_equal(exact.decode(payload), x)
    assert lossy.encode(x).nbytes < payload.nbytes


def test_lossless_conforms():
    assert_conforms(tersor.codec("webp", lossless=True, quality=10), fresh_process=False)
