import numpy as np
import pytest

import tersor
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("zstd", fresh_process=False)


def test_shuffle_gathers_byte_planes_and_helps_smooth_floats():
    x = np.linspace(0, 1, 4096, dtype=np.float32)
    plain, shuffled = (tersor.codec("zstd", shuffle=s).encode(x).nbytes for s in (False, True))
    assert shuffled < plain


def test_a_bomb_is_not_decoded_further_than_the_header_says():
    payload = tersor.codec("zstd").encode(bytes(10_000_000))
    payload.spec = tersor.Spec("bytes", (10,), "bytes")
    with pytest.raises(tersor.CorruptPayloadError, match="the header says 10"):
        tersor.decompress(payload)
