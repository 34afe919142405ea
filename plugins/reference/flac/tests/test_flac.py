import numpy as np
import pytest

import tersor
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("flac", fresh_process=False)


@pytest.mark.parametrize("bits", [16, 24])
def test_samples_and_rate_come_back_exactly(bits):
    rng = np.random.default_rng(0)
    full = 1 << (bits - 1)
    x = (rng.integers(-full, full, (2, 4096)) / full).astype(np.float32)
    x[0, :3] = -0.0
    flac = tersor.codec("flac", bits=bits)
    back = flac.decode(flac.encode(tersor.Audio(x, 48000)).to_bytes())
    assert back.rate == 48000
    assert np.array_equal(back.samples, x)


def test_values_off_the_grid_are_refused():
    with pytest.raises(tersor.InputError, match="k / 32768"):
        tersor.codec("flac").encode(np.full((1, 4), 0.123456789, np.float32))
