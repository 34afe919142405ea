import pytest
import torch

from tersor_kit_vq import standard


@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("centre", [True, False])
def test_mean_deviation_and_the_way_back(factor, centre):
    x = (torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) * 3 + 5) * factor
    out, scale, offset = standard(x, centre)
    torch.testing.assert_close(out.square().mean(), torch.tensor(1.0))
    assert abs(float(out.mean())) < 1e-5 or not centre
    assert (float(offset) == 0) is not centre
    torch.testing.assert_close((out * scale + offset) / factor, x / factor, rtol=1e-5, atol=1e-5)


def test_nothing_to_scale():
    for x in (torch.zeros(0, 3), torch.zeros(4, 3)):
        out, scale, offset = standard(x)
        assert torch.equal(out, x)
        assert float(scale) == 1
        assert float(offset) == 0
    out, scale, offset = standard(torch.full((4, 3), 7.0))
    assert torch.equal(out, torch.zeros(4, 3))
    assert float(scale) == 1
    assert float(offset) == 7
