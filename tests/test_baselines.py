"""baselines.py: KL estimators against an exact KL and its gradient, the trajectory filter on typed-in returns."""

from math import log

import pytest
import torch

from baselines import filter_groups, kl_estimate

PI, REF = (0.9, 0.1), (0.5, 0.5)
EXACT = 0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5)  # KL(π‖π_ref) = 0.368; the other way round it is 0.511


def expectation(kind, pi=PI, ref=REF):
    """Mean of the estimate over both symbols, each as often as π draws it."""
    pi, ref = torch.tensor(pi), torch.tensor(ref)
    return (pi * kl_estimate(pi.log(), ref.log(), kind)).sum().item()


def test_the_exact_kl_is_the_one_derived_by_hand():
    assert pytest.approx(0.368, abs=5e-4) == EXACT


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_have_the_exact_kl_as_their_mean(kind):
    assert expectation(kind) == pytest.approx(EXACT, abs=1e-6)
    assert expectation(kind, REF, PI) == pytest.approx(0.5 * log(0.5 / 0.9) + 0.5 * log(0.5 / 0.1), abs=1e-6)


def test_a_reversed_k3_would_have_another_mean():
    # E_π[π/ref - 1 - log(π/ref)] = .9 · 1.8 + .1 · .2 - 1 - .368 = .272
    pi, ref = torch.tensor(PI), torch.tensor(REF)
    assert (pi * kl_estimate(ref.log(), pi.log(), "k3")).sum().item() == pytest.approx(0.272, abs=5e-4)


def test_k2_is_half_the_squared_log_ratio():
    # .9 · ½ · .5878² + .1 · ½ · 1.6094² = .1555 + .1295
    assert expectation("k2") == pytest.approx(0.2850, abs=1e-4)


def test_k2_and_k3_are_never_negative_and_all_are_0_where_the_policies_agree():
    logp = -5 * torch.rand(100, generator=torch.Generator().manual_seed(0))
    ref_logp = -5 * torch.rand(100, generator=torch.Generator().manual_seed(1))
    assert (kl_estimate(logp, ref_logp, "k1") < 0).any()
    for kind in ("k2", "k3"):
        assert (kl_estimate(logp, ref_logp, kind) > 0).all()
    for kind in ("k1", "k2", "k3"):
        assert (kl_estimate(logp, logp, kind) == 0).all()


def mean_gradient(kind):
    """Gradient of the mean estimate for the first symbol's logit, the sample fixed as a loss has it."""
    logits = torch.tensor(PI, dtype=torch.float64).log().requires_grad_()
    logp = logits.log_softmax(-1)
    (logp.exp().detach() * kl_estimate(logp, torch.tensor(REF, dtype=torch.float64).log(), kind)).sum().backward()
    return logits.grad.tolist()


def test_gradient_of_k2_is_the_analytic_one():
    # ∂KL/∂logitᵢ = πᵢ (log(πᵢ/refᵢ) - KL): .9 · (.5878 - .3681) = .1978
    by_hand = [p * (log(p / q) - EXACT) for p, q in zip(PI, REF, strict=True)]
    assert mean_gradient("k2") == pytest.approx(by_hand, abs=1e-9)
    assert by_hand == pytest.approx([0.1978, -0.1978], abs=1e-4)


def test_gradient_of_k1_has_mean_0_and_that_of_k3_is_the_reverse_kls():
    assert mean_gradient("k1") == pytest.approx([0, 0], abs=1e-9)
    assert mean_gradient("k3") == pytest.approx([0.9 - 0.5, 0.1 - 0.5], abs=1e-9)  # ∇KL(ref‖π) = π - ref


def test_an_unknown_estimator_is_named():
    with pytest.raises(ValueError, match="'k4': choose from k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")


def test_the_filter_keeps_the_most_varied_groups_in_order():
    # four groups of two, spread 0, 5, ½, 1½
    returns = torch.tensor([3.0, 3, 0, 10, 1, 2, 5, 8])
    assert filter_groups(returns, 2, 0.25) == [2, 3]
    assert filter_groups(returns, 2, 0.5) == [2, 3, 6, 7]
    assert filter_groups(returns, 2, 0.75) == [2, 3, 4, 5, 6, 7]
    assert filter_groups(returns, 2, 1.0) == list(range(8))


def test_the_spread_counts_and_not_the_height():
    returns = torch.tensor([100.0, 100, 101, -2, 0, 2, -100, -100, -101])
    assert filter_groups(returns, 3, 0.34) == [3, 4, 5]


def test_the_filter_keeps_at_least_one_group_and_the_first_of_equals():
    assert filter_groups(torch.zeros(8), 2, 0.01) == [0, 1]
    assert filter_groups(torch.zeros(8), 2, 0.5) == [0, 1, 2, 3]


def test_a_quarter_of_the_papers_eight_groups_is_its_mini_batch():
    assert len(filter_groups(torch.rand(128), 16, 0.25)) == 32


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.01, float("nan")])
def test_an_impossible_fraction_is_refused(fraction):
    with pytest.raises(ValueError, match="filter_fraction"):
        filter_groups(torch.zeros(4), 2, fraction)
