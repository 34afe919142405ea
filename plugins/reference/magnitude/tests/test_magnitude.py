import numpy as np

import tersor
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("magnitude", fresh_process=False)


def test_scopes_differ_where_tensors_differ_in_scale():
    tensors = {"small": np.full((4, 4), 0.1, np.float32), "large": np.full((4, 4), 1.0, np.float32)}
    whole = tersor.pruner("magnitude", keep=0.5).prune(tensors)
    assert int(whole["small"].sum()) == 0
    assert int(whole["large"].sum()) == 16
    each = tersor.pruner("magnitude", keep=0.5, scope="tensor").prune(tensors)
    assert int(each["small"].sum()) == int(each["large"].sum()) == 8


def test_a_sparse_file_is_smaller_than_the_dense_one():
    x = np.random.default_rng(0).standard_normal((200, 300)).astype(np.float32)
    sizes = [tersor.pruner("magnitude", keep=k).encode(x).nbytes for k in (0.05, 0.5, 1.0)]
    assert sizes[0] < 0.07 * sizes[2]
    assert sizes[0] < sizes[1] < sizes[2]
