"""The codec on synthetic and real images."""

import numpy as np

import tersor
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("webp", fresh_process=False)


def test_lossless_is_exact_and_larger(photograph):
    x = photograph
    exact, lossy = tersor.codec("webp", lossless=True), tersor.codec("webp")
    payload = exact.encode(x)
    assert np.array_equal(exact.decode(payload), x)
    assert lossy.encode(x).nbytes < payload.nbytes


def test_lossless_conforms():
    assert_conforms(tersor.codec("webp", lossless=True, quality=10), fresh_process=False)
