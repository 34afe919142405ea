import numpy as np

import tersor
from tersor.testing import TableSource, assert_conforms


def test_conformance():
    assert_conforms("greedy")


def test_one_call_a_token():
    out = tersor.decoder("greedy").decode(TableSource(5), [1, 2], 10)
    assert (out.calls, out.steps, len(out.tokens)) == (10, 10, 10)
    assert out.tokens.dtype == np.int64
