import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tersor_kit_pruning import Masks, largest


@given(st.integers(0, 2**16), st.integers(1, 400), st.integers(1, 300), st.floats(0, 1), st.booleans())
@settings(deadline=None)
def test_exactly_the_largest_are_kept(seed, m, n, fraction, coarse):
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal(m).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    if coarse:
        a, b = np.round(a), np.round(b)
    count = round(fraction * (m + n))
    masks = largest({"a": torch.from_numpy(a), "b": torch.from_numpy(b)}, count)
    size, kept = np.abs(np.concatenate([a, b])), np.concatenate([masks["a"].numpy(), masks["b"].numpy()])
    assert kept.sum() == count
    if 0 < count < m + n:
        assert size[kept].min() >= size[~kept].max()


@pytest.mark.parametrize("kind", ["normal", "sorted", "constant", "few values", "one outlier"])
@pytest.mark.parametrize("count", [1, 1000, 250_000, 499_999])
def test_large_inputs_take_the_sampled_bracket_and_stay_exact(kind, count):
    n = 500_000
    x = np.random.default_rng(0).standard_normal(n).astype(np.float32)
    x = {
        "normal": x,
        "sorted": np.sort(x),
        "constant": np.ones_like(x),
        "few values": np.round(x),
        "one outlier": np.eye(1, n)[0].astype(np.float32),
    }[kind]
    kept = largest({"x": torch.from_numpy(x)}, count)["x"].numpy()
    assert kept.sum() == count
    assert np.abs(x[kept]).min() >= np.abs(x[~kept]).max()


def test_masks_hold_during_training():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    masks = Masks(net)
    assert set(masks.masks) == {"0.weight", "2.weight"}
    masks.masks["0.weight"][:4] = False
    optimizer = torch.optim.Adam(net.parameters(), 0.1)
    for _ in range(3):
        net(torch.randn(4, 8)).square().mean().backward()
        optimizer.step()
        masks.apply()
    assert torch.count_nonzero(net[0].weight[:4]) == 0
    assert masks.keep == 48 / 80
    again = Masks(net)
    again.load_state_dict(masks.state_dict())
    assert again.keep == masks.keep
    with pytest.raises(KeyError, match="the network has"):
        again.load_state_dict({"x": torch.ones(1)})
