"""The hard-concrete gates: statistics, gradients, exact clipping, determinism."""

import pytest
import torch

from fastgate.errors import ArgumentError
from fastgate.nn import hard_concrete


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("log_alpha", [-4.0, -1.5, 0.0, 0.7, 2.5])
def test_draws_match_their_probabilities(log_alpha):
    n = 200_000
    z = hard_concrete.draw(torch.full((n,), log_alpha, dtype=torch.float64), generator())
    value = torch.tensor(log_alpha, dtype=torch.float64)
    bound = 4 * 0.5 / n**0.5  # four standard errors of a frequency
    assert abs((z > 0).double().mean() - hard_concrete.p_open(value)) < bound
    # The stretch is symmetric around 1/2, so z is 1 as often as the gate of -log_alpha is 0.
    assert abs((z == 1).double().mean() - (1 - hard_concrete.p_open(-value))) < bound
    assert abs(z.mean() - hard_concrete.expected(value)) < bound
    assert z.min() >= 0 and z.max() <= 1


def test_clipped_draws_are_exact_and_have_zero_gradient():
    log_alpha = torch.zeros(1000, dtype=torch.float64, requires_grad=True)
    z = hard_concrete.draw(log_alpha, generator())
    (grad,) = torch.autograd.grad(z.sum(), log_alpha)
    clipped = (z == 0) | (z == 1)
    assert 0.2 < clipped.double().mean() < 0.8
    assert (grad[clipped] == 0).all()
    assert (grad[~clipped] > 0).all()


def test_gradient_of_a_draw_equals_finite_differences():
    log_alpha = torch.linspace(-3, 3, 64, dtype=torch.float64, requires_grad=True)
    z = hard_concrete.draw(log_alpha, generator(3))
    (grad,) = torch.autograd.grad(z.sum(), log_alpha)
    h = 1e-6
    with torch.no_grad():
        up, down = (
            hard_concrete.draw(log_alpha + h, generator(3)),
            hard_concrete.draw(log_alpha - h, generator(3)),
        )
    torch.testing.assert_close(grad, (up - down) / (2 * h), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("function", [hard_concrete.p_open, hard_concrete.expected])
def test_gradient_of_the_statistics(function):
    log_alpha = torch.linspace(-5, 5, 11, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (log_alpha,))


def test_expected_gate_limits_and_symmetry():
    x = torch.tensor([-40.0, 0.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(
        hard_concrete.expected(x), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64), atol=1e-12, rtol=0
    )
    y = torch.linspace(-4, 4, 9, dtype=torch.float64)
    torch.testing.assert_close(
        hard_concrete.expected(y) + hard_concrete.expected(-y), torch.ones(9, dtype=torch.float64)
    )


def test_expected_gate_equals_a_fine_sum():
    value = torch.tensor(0.8, dtype=torch.float64)
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    s = torch.sigmoid((torch.logit(u) + value) / hard_concrete.BETA)
    fine = (s * (hard_concrete.ZETA - hard_concrete.GAMMA) + hard_concrete.GAMMA).clamp(0, 1).mean()
    torch.testing.assert_close(hard_concrete.expected(value), fine, atol=1e-9, rtol=0)


def test_same_seed_same_draw_and_state_restores():
    log_alpha = torch.zeros(12)
    g = generator(7)
    first = hard_concrete.draw(log_alpha, g)
    state = g.get_state()
    second = hard_concrete.draw(log_alpha, g)
    assert torch.equal(first, hard_concrete.draw(log_alpha, generator(7)))
    assert not torch.equal(first, second)
    restored = generator()
    restored.set_state(state)
    assert torch.equal(second, hard_concrete.draw(log_alpha, restored))


def test_harden_is_exact_top_k_with_ties_to_the_lower_index():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.9, 0.5])
    assert hard_concrete.harden(scores, 0) == []
    assert hard_concrete.harden(scores, 1) == [1]
    assert hard_concrete.harden(scores, 3) == [1, 2, 3]
    assert hard_concrete.harden(scores, 5) == [0, 1, 2, 3, 4]
    with pytest.raises(ArgumentError, match="keep: got 6, wanted 0 to 5"):
        hard_concrete.harden(scores, 6)


def test_draw_refuses_another_device():
    with pytest.raises(ArgumentError, match="both on the CPU"):
        hard_concrete.draw(torch.zeros(3, device="meta"), generator())


def test_exact_draws_follow_the_scores():
    """One of three: with the probabilities of a softmax (the Gumbel-max theorem)."""
    log_alpha = torch.tensor([0.0, 1.0, -1.0])
    generator = torch.Generator().manual_seed(0)
    counts = sum(hard_concrete.draw_exact(log_alpha, 1, generator) for _ in range(4000)) / 4000
    torch.testing.assert_close(counts, log_alpha.softmax(0), atol=0.03, rtol=0)


@pytest.mark.parametrize("keep", range(5))
def test_an_exact_draw_keeps_as_many_as_asked(keep):
    log_alpha = torch.randn(4, generator=torch.Generator().manual_seed(1)).requires_grad_()
    z = hard_concrete.draw_exact(log_alpha, keep, torch.Generator().manual_seed(keep))
    assert sorted(z.tolist()) == [0.0] * (4 - keep) + [1.0] * keep
    (z * torch.arange(4)).sum().backward()
    assert bool(log_alpha.grad.any()) == (0 < keep < 4)


def test_the_gradient_of_an_exact_draw_is_the_sigmoids():
    """By finite differences of the sigmoid, the noise held: of the scores around the threshold."""
    log_alpha = torch.tensor([0.3, -0.2, 0.9, 0.1], dtype=torch.float64, requires_grad=True)

    def noise():
        u = torch.rand(4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        return -torch.log(-torch.log(u))

    def soft(x):
        scores = x + noise()
        ordered = scores.sort(descending=True).values
        return torch.sigmoid((scores - (ordered[1] + ordered[2]) / 2) / hard_concrete.BETA)

    weights = torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64)
    (hard_concrete.draw_exact(log_alpha, 2, torch.Generator().manual_seed(5)) * weights).sum().backward()
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = 1e-6
        x = log_alpha.detach()
        slope = ((soft(x + step) - soft(x - step)) * weights).sum() / 2e-6
        assert float(log_alpha.grad[i]) == pytest.approx(float(slope), abs=1e-6)


@pytest.mark.parametrize("keep", [-1, 5])
def test_an_exact_draw_of_more_than_there_are_is_refused(keep):
    with pytest.raises(ArgumentError, match="keep: got"):
        hard_concrete.draw_exact(torch.zeros(4), keep, torch.Generator())
