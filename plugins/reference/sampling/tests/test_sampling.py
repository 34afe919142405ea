import numpy as np

import tersor
from tersor.testing import TableSource, assert_conforms


def test_conformance():
    assert_conforms("sampling")


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others():
    source = TableSource(50, sharpness=0.5)
    a, b, c = (tersor.decoder("sampling", seed=s).decode(source, [1], 20).tokens for s in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_top_k_of_one_and_a_tiny_nucleus_are_greedy():
    source = TableSource(9)
    want = tersor.decoder("greedy").decode(source, [1], 20).tokens
    for config in ({"top_k": 1}, {"top_p": 0.0}):
        assert np.array_equal(tersor.decoder("sampling", **config).decode(source, [1], 20).tokens, want)
