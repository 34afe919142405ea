"""Linear layers that compute from integer codes with torch's int4 and int8 kernels."""

import copy
import itertools
import pickle

import pytest

import tersor

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from tersor import model as M  # noqa: E402
from tersor.model import packed  # noqa: E402


def uniform(rows, columns, bits, group_size, sym, indexed=False, seed=0):
    g = torch.Generator().manual_seed(seed)
    groups = -(-columns // group_size)
    zero = None if sym else torch.randint(0, 2**bits, (rows, groups), generator=g).float()
    index = (torch.arange(columns) // group_size)[torch.randperm(columns, generator=g)] if indexed else None
    codes = torch.randint(0, 2**bits, (rows, columns), generator=g, dtype=torch.uint8)
    return tersor.Uniform(codes, torch.rand(rows, groups, generator=g) * 0.1 + 0.01, zero, bits, group_size, index)


def close(got, want):
    assert float((got.float() - want).norm() / want.norm()) < 0.01  # bfloat16 activations and scales


@pytest.mark.parametrize(("bits", "sym", "indexed"), list(itertools.product([2, 3, 4], [True, False], [True, False])))
@pytest.mark.parametrize(("columns", "group_size"), [(128, 32), (576, 128), (256, 256), (64, 64)])
def test_int4_kernel_multiplies_with_the_levels(bits, sym, indexed, columns, group_size) -> None:
    u = uniform(48, columns, bits, group_size, sym, indexed)
    x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1))
    close(packed.kernel_for(u)(x), x @ u.dense().T)


@pytest.mark.parametrize(("bits", "sym"), list(itertools.product([5, 6, 7, 8], [True, False])))
def test_int8_kernel_multiplies_with_the_levels(bits, sym) -> None:
    u = uniform(21, 80, bits, 80, sym)
    x = torch.randn(3, 80, generator=torch.Generator().manual_seed(1))
    close(packed.kernel_for(u)(x), x @ u.dense().T)


@pytest.mark.parametrize(
    ("u", "why"),
    [(uniform(16, 40, 4, 8, True), "32 columns"), (uniform(17, 64, 4, 32, True), "16 rows"), (uniform(16, 64, 8, 32, True), "one scale a row"),
     (uniform(16, 72, 8, 72, True), "16 columns")],
)  # fmt: skip
def test_what_does_not_fit_says_why(u, why) -> None:
    with pytest.raises(tersor.InputError, match=why):
        packed.kernel_for(u)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.GELU(), nn.Linear(48, 32, bias=False), nn.Linear(32, 5)).eval()


@pytest.mark.parametrize(
    "method", ["rtn:group_size=32", "rtn:bits=8,group_size=-1,sym=true", "rtn:bits=3,group_size=-1", "rtn:bits=8,group_size=-1"]
)
def test_packed_layers_give_what_decoded_ones_give(method) -> None:
    plain, small = net(), net()
    M.quantize(plain, method)
    M.compress_layers(small, method)
    found = M.pack_layers(small)
    kind = "int8" if "bits=8" in method else "int4"
    assert found["0"] == kind
    assert found["3"] == kind if kind == "int8" else "16 rows" in found["3"]  # 5 rows: no multiple of 16
    state = {k: v.clone() for k, v in small.state_dict().items()}
    g = torch.Generator().manual_seed(2)
    for shape in ((64,), (1, 64), (2, 3, 64), (packed.ROWS + 1, 64), (0, 64)):
        x = torch.randn(*shape, generator=g)
        with torch.no_grad():
            got, want = small(x), plain(x)
        assert got.shape == want.shape
        assert got.dtype == want.dtype
        assert torch.allclose(got, want, atol=0.02)
    x = torch.randn(4, 64, requires_grad=True)
    small(x).sum().backward()  # gradients go through the decoded weights
    want = torch.autograd.grad(plain(y := x.detach().requires_grad_()).sum(), y)[0]
    assert torch.allclose(x.grad, want, atol=1e-5)
    again = pickle.loads(pickle.dumps(copy.deepcopy(small)))  # noqa: S301
    assert again.state_dict().keys() == state.keys()
    with torch.no_grad():
        assert torch.equal(again(x), small(x))


def test_layers_without_levels_stay_as_they_are() -> None:
    small = net()
    M.compress_layers(small, "svd:rank=4")
    assert M.pack_layers(small) == {} or all("no evenly spaced" in why for why in M.pack_layers(small).values())


def test_payloads_are_put_into_a_network_by_name() -> None:
    plain = net()
    payloads = M.quantize(plain, "rtn:group_size=32")
    placed = M.place_layers(net(), payloads)
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(placed(x), plain(x), atol=1e-6)
    with pytest.raises(tersor.InputError, match="no tensor"):
        M.place_layers(net(), {"nowhere.weight": payloads["0.weight"]})
    with pytest.raises(tersor.InputError, match="shape"):
        M.place_layers(net(), {"2.weight": payloads["0.weight"]})


def test_levels_in_smaller_groups_are_the_same_levels() -> None:
    u = uniform(4, 72, 4, 48, False)
    assert torch.equal(u.regrouped(24).dense(), u.dense())
    assert torch.equal(u.regrouped(8).dense(), u.dense())
    with pytest.raises(ValueError, match="do not consist"):
        u.regrouped(36)
