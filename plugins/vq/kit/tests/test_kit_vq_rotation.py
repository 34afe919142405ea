import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersor_kit_vq import rotate_to


def rotation(e, q):
    """The rotation in the plane of e and q, d x d in float64, by its angle: no reflections."""
    e, q = e.double() / e.double().norm(), q.double() / q.double().norm()
    cosine = float(e @ q)
    other = q - cosine * e
    if float(other.norm()) < 1e-12:
        return torch.eye(len(e), dtype=torch.float64)
    other = other / other.norm()
    sine = float(q @ other)
    plane = torch.outer(e, e) + torch.outer(other, other)
    turn = torch.outer(other, e) - torch.outer(e, other)
    return torch.eye(len(e), dtype=torch.float64) + (cosine - 1) * plane + sine * turn


def gradient(z, values, g):
    z = z.clone().requires_grad_()
    out = rotate_to(z, values)
    assert torch.equal(out, values.to(z.dtype))
    assert out.dtype == z.dtype
    (out * g).sum().backward()
    return z.grad


@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([1e-18, 1.0, 1e15]), st.sampled_from([1e-3, 1.0, 50.0]))
@settings(deadline=None, max_examples=40)
def test_the_gradient_is_the_rotated_one(seed, dim, scale, ratio):
    generator = torch.Generator().manual_seed(seed)
    z, values, g = (torch.randn(2, 3, dim, generator=generator) for _ in range(3))
    found = gradient(z * scale, values * scale * ratio, g)
    for i in range(2):
        for j in range(3):
            e, q = z[i, j], values[i, j] * ratio
            expected = q.double().norm() / e.double().norm() * (rotation(e, q).T @ g[i, j].double())
            torch.testing.assert_close(found[i, j].double(), expected, rtol=2e-4, atol=2e-4 * float(expected.norm()))


def test_it_keeps_angles_and_scales_lengths():
    generator = torch.Generator().manual_seed(0)
    z, values, g = (torch.randn(500, 16, generator=generator) for _ in range(3))
    found = gradient(z, values, g)
    ratio = values.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(found.norm(dim=1), g.norm(dim=1) * ratio)
    torch.testing.assert_close((found * z).sum(1), (g * values).sum(1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tilt", [0.0, 1e-12, 1e-7, 1e-5, 1e-3, 0.04])
@pytest.mark.parametrize("dim", [1, 2, 5])
def test_opposite_vectors(tilt, dim):
    generator = torch.Generator().manual_seed(1)
    z, g = torch.randn(50, dim, generator=generator), torch.randn(50, dim, generator=generator)
    values = -2 * z + tilt * torch.randn(50, dim, generator=generator) * (dim > 1)
    found = gradient(z, values, g)
    # an isometry times |q| / |e| that takes e's direction to q's
    torch.testing.assert_close(found.norm(dim=1), g.norm(dim=1) * values.norm(dim=1) / z.norm(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((found * z).sum(1), (g * values).sum(1), rtol=1e-3, atol=1e-3)


def test_vectors_without_a_direction():
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    words = torch.ones(4, 3)
    for z in (torch.zeros(4, 3), torch.full((4, 3), 1e-9), torch.full((4, 3), 1e-42)):
        assert torch.equal(gradient(z, words, g), g)  # as straight through
    assert torch.equal(gradient(words, torch.zeros(4, 3), g), torch.zeros(4, 3))  # |q| / |e| = 0
    assert torch.equal(gradient(torch.zeros(4, 3), torch.zeros(4, 3), g), g)
    assert gradient(torch.zeros(0, 3), torch.zeros(0, 3), g[:0]).shape == (0, 3)
    assert bool(torch.isfinite(gradient(words * 1e38, words * -1e38, g)).all())


def test_where_they_agree_it_is_straight_through():
    generator = torch.Generator().manual_seed(3)
    z, g = torch.randn(20, 4, generator=generator), torch.randn(20, 4, generator=generator)
    torch.testing.assert_close(gradient(z, z.clone(), g), g)


def test_half_precision_and_second_derivatives():
    generator = torch.Generator().manual_seed(4)
    z, values, g = (torch.randn(6, 3, generator=generator) for _ in range(3))
    half = gradient(z.bfloat16(), values, g.bfloat16())
    torch.testing.assert_close(half.float(), gradient(z, values, g), rtol=0.1, atol=0.1)
    # R and the scale are constants, so that the map from values' gradient to z's is linear
    z = z.double().requires_grad_()
    out = rotate_to(z, values.double())
    (first,) = torch.autograd.grad((out**3).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), z)
    e, q = z.detach(), values.double()
    for i in range(6):
        matrix = q[i].norm() / e[i].norm() * rotation(e[i], q[i])
        torch.testing.assert_close(first[i].detach(), matrix.T @ (3 * q[i] ** 2))
        expected = matrix.T @ ((2 * matrix @ first[i].detach()) * 6 * q[i])
        torch.testing.assert_close(second[i], expected)
