"""What the tests of the reference image codecs share."""

import numpy as np
import pytest


@pytest.fixture
def photograph():
    """A smooth 8-bit picture with an edge."""
    y, x = np.mgrid[0:96, 0:128] / 128
    red = 0.5 + 0.4 * np.sin(7 * x + 3 * y)
    return (np.rint(255 * np.stack([red, 0.8 * y, np.where(x > y, 0.9, 0.2)])) / 255).astype(np.float32)
