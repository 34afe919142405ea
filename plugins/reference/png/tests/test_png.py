"""The codec on synthetic and real images."""

import numpy as np
import pytest

import tersor
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("png", fresh_process=False)


def test_values_off_the_grid_are_refused():
    with pytest.raises(tersor.InputError, match="k / 255"):
        tersor.codec("png").encode(np.full((1, 4, 4), 0.1234, np.float32))
