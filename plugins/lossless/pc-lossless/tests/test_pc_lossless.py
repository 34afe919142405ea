import itertools
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tersor
from tersor import data
from tersor.testing import assert_conforms
from tersor_pc_lossless.circuit import TOTAL, UNIT
from tersor_pc_lossless.hclt import Tree, chow_liu, expectation, initial, maximization, mutual_information
from tersor_pc_lossless.pc_lossless import PCLossless


def _float(pixels):
    return np.asarray(pixels, np.uint8).astype(np.float32) / np.float32(255)


def _walks(n, side, levels, seed=0):
    """Images with neighbours alike: uint8 n x 1 x side x side of few values."""
    rng = np.random.default_rng(seed)
    walk = np.cumsum(rng.integers(-1, 2, (n, 1, side, side)), -1) + np.cumsum(rng.integers(-1, 2, (n, 1, side, 1)), -2)
    return (walk % levels * 10 + 5).astype(np.uint8)


@pytest.fixture(scope="module")
def small():
    return PCLossless(latents=4, epochs=3).fit([_float(_walks(200, 4, 6))])


def test_conformance():
    assert_conforms("pc-lossless", max_examples=5)


def test_chow_liu_finds_a_chain_and_roots_it_at_its_centre():
    rng = np.random.default_rng(0)
    x = np.empty((4000, 7), int)
    x[:, 0] = rng.integers(0, 3, 4000)
    for v in range(1, 7):
        x[:, v] = np.where(rng.random(4000) < 0.8, x[:, v - 1], rng.integers(0, 3, 4000))
    mi = mutual_information(x, 3)
    assert np.allclose(mi, mi.T, atol=1e-6)
    assert chow_liu(mi).tolist() == [1, 2, 3, -1, 3, 4, 5]


def test_order_takes_larger_branches_first_and_children_before_parents():
    tree = Tree(np.array([-1, 0, 0, 2, 2]))
    assert tree.order == [4, 3, 2, 1, 0] or tree.order == [3, 4, 2, 1, 0]
    counts = {s: sum(len(u) + len(d) for u, d, _ in tree.plan(s)) for s in ("tour", "cached", "naive")}
    assert counts["tour"] == 2 * 5 - 1 < counts["cached"] < counts["naive"]


def test_em_raises_the_likelihood():
    pixels = _walks(300, 4, 6).reshape(300, 16)
    x = np.unique(pixels, return_inverse=True)[1].reshape(300, 16)
    tree = Tree(chow_liu(mutual_information(x, 6)))
    marginal = np.full((16, 6), 1 / 6, np.float32)
    p, before = initial(tree, x, marginal, 4, np.random.default_rng(0)), -np.inf
    for _ in range(8):
        loglik, counts = expectation(tree, p, x)
        assert np.allclose(counts["emission"].sum((1, 2)), 300, rtol=1e-4)
        assert loglik.mean() > before - 1e-4
        p, before = maximization(counts, marginal, 1e-6), loglik.mean()


def _probabilities(codec, symbols):
    """The coder's exact probability of each row of symbols."""
    out = [Fraction(1)] * len(symbols)

    def step(table, v):
        assert ((table >= 0) & (table == np.floor(table))).all()
        assert (table.sum(-1, dtype=np.int64) + table.shape[1] == TOTAL).all()
        for i, s in enumerate(symbols[:, v]):
            out[i] *= Fraction(int(table[i, s]) + 1, TOTAL)
        return symbols[:, v]

    codec.circuit.run(len(symbols), step, codec.schedule)
    return out


def test_probabilities_of_all_states_sum_to_exactly_one():
    codec = PCLossless(latents=3, epochs=2).fit([_float(_walks(60, 2, 3))])
    m = len(codec.circuit.alphabet) + 1
    p = _probabilities(codec, np.array(list(itertools.product(range(m), repeat=4))))
    assert sum(p) == 1
    assert min(p) > 0


def test_the_circuit_is_the_learned_distribution():
    """Enumerating the latents of a small tree gives the marginal that the coder uses."""
    codec = PCLossless(latents=2, epochs=3).fit([_float(_walks(60, 2, 3))])
    prior, a, b = (codec.state[k].astype(float) / UNIT[k] for k in UNIT)
    tree, x = codec.circuit.tree, np.array([[0, 1, 2, 0], [1, 1, 1, 1], [2, 0, 2, 1]])
    want = np.zeros(3)
    for z in itertools.product(range(2), repeat=4):
        joint = prior[z[tree.root]] * np.prod([a[v, z[tree.parent[v]], z[v]] for v in range(4) if v != tree.root])
        want += joint * np.prod([b[v, z[v], x[:, v]] for v in range(4)], axis=0)
    assert np.allclose([float(p) for p in _probabilities(codec, x)], want, rtol=1e-4)


def test_code_length_is_the_models():
    test = _float(data.digits()[0][1500:, None])
    codec = PCLossless()
    p = {k: (codec.state[k] / UNIT[k]).astype(np.float32) for k in UNIT}
    lookup = np.zeros(256, int)
    lookup[codec.circuit.alphabet] = np.arange(len(codec.circuit.alphabet))
    ideal = -expectation(codec.circuit.tree, p, lookup[np.rint(test * 255).astype(int)].reshape(297, 64))[0].sum()
    assert codec.encode(test).parts["stream"].nbytes * 8 == pytest.approx(ideal, rel=0.005)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(0, 2**16), st.sampled_from([6, 20, 256]), st.sampled_from(["image", "video"]))
def test_round_trip_of_any_bytes(small, n, seed, levels, domain):
    pixels = _walks(n, 4, 6, seed)
    noise = np.random.default_rng(seed)
    pixels = np.where(noise.random(pixels.shape) < 0.1, noise.integers(0, levels, pixels.shape), pixels)
    x = _float(pixels if domain == "video" else pixels[0])
    payload = small.encode(x)
    assert payload.spec.domain == domain
    assert small.decode(payload.to_bytes()).tobytes() == x.tobytes()


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 6), (3, 4, 5), (2, 3, 7, 3)])
def test_other_shapes_are_cut_into_tiles(small, shape):
    x = _float(np.random.default_rng(0).choice(small.circuit.alphabet, shape))
    assert np.array_equal(small.decode(small.encode(x)), x)


def test_values_outside_the_alphabet_are_escaped(small):
    pixels = _walks(50, 4, 6)
    pixels[3, 0, 1, 2], pixels[40, 0, 3, 3] = 254, 1
    assert not np.isin([254, 1], small.circuit.alphabet).any()
    payload = small.encode(_float(pixels))
    assert "stream" in payload.parts
    assert np.array_equal(small.decode(payload), _float(pixels))


def test_noise_is_stored_and_never_expands(small):
    x = _float(np.random.default_rng(0).integers(0, 256, (1, 40, 40)))
    payload = small.encode(x)
    assert payload.nbytes < x.size + 100
    assert np.array_equal(small.decode(payload), x)


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_other_float_types(small, dtype):
    x = np.arange(16, dtype=dtype).reshape(1, 4, 4) / np.dtype(dtype).type(255)
    again = small.decode(small.encode(x))
    assert again.dtype == dtype
    assert again.tobytes() == x.tobytes()


@pytest.mark.parametrize("margin", [0, 2])  # constant pixels share nothing with any other: the tree has a hub
def test_schedules_give_the_same_stream(margin):
    pixels = np.pad(_walks(130, 4, 6), ((0, 0), (0, 0), (margin, margin), (margin, margin)))
    fitted, x = PCLossless(latents=4, epochs=2).fit([_float(pixels[:100])]), _float(pixels[100:])
    assert margin == 0 or max(map(len, fitted.circuit.tree.children)) > 30
    codecs = [PCLossless(schedule=s).with_state(fitted.state) for s in ("tour", "cached", "naive")]
    payloads = [c.encode(x) for c in codecs]
    assert len({p.parts["stream"].tobytes() for p in payloads}) == 1
    for codec, payload in zip(codecs, payloads[1:] + payloads[:1]):
        payload.method = codec
        assert np.array_equal(codec.decode(payload), x)


def test_marginals_do_not_depend_on_the_batch(small):
    symbols = np.random.default_rng(0).integers(0, 6, (70, 16))
    together, alone = [], []
    small.circuit.run(70, lambda t, v: (together.append(t[13]), symbols[:, v])[1], "tour")
    small.circuit.run(1, lambda t, v: (alone.append(t[0]), symbols[13:14, v])[1], "tour")
    assert np.array_equal(together, alone)


def test_decoding_does_not_depend_on_the_number_of_threads(tmp_path):
    x = _float(data.digits()[0][1500:, None])
    PCLossless().encode(x).save(tmp_path / "x.tsr")
    code = "import sys, tersor; sys.stdout.buffer.write(tersor.decompress(sys.argv[1]).tobytes())"
    for threads in "1", "2":
        env = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
        got = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "x.tsr")], env=env, capture_output=True, check=True
        ).stdout
        assert got == x.tobytes()


def test_shipped_circuit_is_reproducible_in_shape_and_better_than_zstd():
    codec, test = tersor.codec("pc-lossless"), _float(data.digits()[0][1500:, None])
    assert codec.circuit.tile == (1, 8, 8)
    assert codec.circuit.alphabet.tolist() == list(range(0, 241, 15))
    assert codec.encode(test).bits_per_element < 2.1
    with pytest.raises(tersor.MissingStateError):
        tersor.codec("pc-lossless", latents=5).encode(test)


def test_tiles_of_larger_samples():
    codec = PCLossless(latents=3, epochs=1, tile=4).fit([_float(_walks(1, 21, 6)[0]), _float(_walks(2, 12, 6))])
    assert codec.circuit.tile == (1, 4, 4)
    x = _float(_walks(1, 10, 6)[0])
    assert np.array_equal(codec.decode(codec.encode(x)), x)


def test_refusals(small):
    with pytest.raises(tersor.InputError, match="k/255"):
        small.encode(np.full((1, 4, 4), 0.3333, np.float32))
    with pytest.raises(tersor.InputError, match="one shape"):
        PCLossless().fit([np.zeros((1, 4, 4), np.float32), np.zeros((1, 4, 5), np.float32)])
    with pytest.raises(tersor.InputError, match="multiples of 3"):
        PCLossless(latents=2, epochs=1).fit([np.zeros((3, 2, 2), np.float32)]).encode(np.zeros((1, 2, 2), np.float32))
    with pytest.raises(tersor.InputError, match="too thin"):
        PCLossless(latents=2, epochs=1).fit([np.zeros((1, 32, 32), np.float32)]).encode(np.zeros((1, 2**20, 1), np.float32))
    state = dict(small.state)
    with pytest.raises(tersor.StateError):
        small.with_state({**state, "emission": state["emission"] + 1}).encode(_float(_walks(1, 4, 6)[0]))
    with pytest.raises(tersor.StateError):
        small.with_state({**state, "parent": np.zeros(16, np.int32)}).encode(_float(_walks(1, 4, 6)[0]))
    with pytest.raises(tersor.ConfigError):
        PCLossless(schedule="other")
