import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tersor
from tersor.testing import assert_conforms


def test_conformance():
    assert_conforms("gradual-magnitude", fresh_process=False)


@given(st.floats(0, 0.5), st.floats(0.5, 1), st.integers(0, 100), st.integers(1, 1000))
def test_the_schedule_is_the_cubic_of_the_paper(keep, initial, begin, length):
    m = tersor.pruner("gradual-magnitude", keep=keep, initial_keep=initial, begin=begin, end=begin + length)
    final, first = 1 - keep, 1 - initial
    for t in (begin, begin + length // 3, begin + length):
        want = final + (first - final) * (1 - (t - begin) / length) ** 3
        assert 1 - m.kept_at(t) == pytest.approx(want, abs=1e-9)
    assert m.kept_at(begin + length + 5) == pytest.approx(keep, abs=1e-12)


def train(steps, m, resume=None):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3))
    pruning = m.attach(net)
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    kept = []
    for _ in range(steps):
        net(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        pruning.step()
        kept.append(pruning.keep)
    return net, pruning, kept


def test_sparsity_follows_the_schedule_inside_a_training_loop():
    m = tersor.pruner("gradual-magnitude", keep=0.1, begin=10, end=40, frequency=5)
    net, _pruning, kept = train(60, m)
    assert kept[:10] == [1.0] * 10
    assert all(a >= b for a, b in itertools.pairwise(kept))
    assert kept[40] == pytest.approx(0.1, abs=0.001) == kept[-1]
    assert kept[15] == pytest.approx(m.kept_at(15), abs=0.002)
    assert int(torch.count_nonzero(net[0].weight)) == 60
    assert int(torch.count_nonzero(net[2].weight)) == 9
    assert torch.count_nonzero(net[0].bias) == 30


def test_after_training_the_file_holds_what_survived():
    m = tersor.pruner("gradual-magnitude", keep=0.1, begin=0, end=20)
    net, _pruning, _ = train(30, m)
    weights = {k: p.detach() for k, p in net.named_parameters() if p.ndim == 2}
    back = tersor.decompress(m.encode(weights).to_bytes())
    assert all(torch.equal(back[k], weights[k]) for k in weights)


def test_a_schedule_can_be_taken_up_again():
    m = tersor.pruner("gradual-magnitude", keep=0.2, begin=0, end=20)
    net, pruning, _ = train(12, m)
    again = m.attach(net)
    again.load_state_dict(pruning.state_dict())
    assert (again.steps, again.keep) == (12, pruning.keep)


def test_settings_that_contradict_are_refused():
    with pytest.raises(tersor.ConfigError, match="begin=10, end=10; allowed: end after begin"):
        tersor.pruner("gradual-magnitude", begin=10, end=10)
    with pytest.raises(tersor.ConfigError, match="initial_keep=0.1 below keep=0.5"):
        tersor.pruner("gradual-magnitude", keep=0.5, initial_keep=0.1)


def test_each_layer_is_pruned_alone():
    x = {"small": np.full((4, 4), 0.1, np.float32), "large": np.ones((4, 4), np.float32)}
    mask = tersor.pruner("gradual-magnitude", keep=0.25).prune(x)
    assert int(mask["small"].sum()) == int(mask["large"].sum()) == 4
