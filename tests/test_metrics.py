"""metrics.py on typed-in numbers, and the interval's coverage on simulated levels."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import make_batch

from actfocus import group_advantages
from metrics import (
    bootstrap_interval,
    clipped,
    describe,
    mean_interval,
    pooled_interval,
    rollout_metrics,
    success_interval,
    summary,
    token_metrics,
)
from rollout import Trajectory


def row(seed, rewards, success=False, invalid=0, spans=((0, 2),)):
    episode = SimpleNamespace(seed=seed, rewards=rewards, return_=sum(rewards), success=success, invalid_turns=invalid)
    return Trajectory(episode, [], [], [], [], [], [], list(spans))


def test_rollout_metrics_on_three_trajectories_of_two_prompts():
    rows = [row(7, [0.0, 1.0], success=True, spans=[(3, 5), (8, 14)]),  # return 1, responses of 2 and 6 tokens
            row(7, [-0.1], invalid=1, spans=[(3, 4)]),  # return -.1, one token
            row(9, [0.5, 0.5], spans=[(2, 5), (9, 12)])]  # return 1, three tokens each
    # mean .6333; variance (.3667² + .7333² + .3667²) / 3 = .2689; 5 turns, 1 of them invalid; 15 tokens in 5 responses
    assert rollout_metrics(rows) == pytest.approx({
        "trajectories": 3, "success": 1 / 3, "return_mean": 1.9 / 3, "return_std": 0.26889**0.5, "equal_groups": 0.5,
        "turns": 5 / 3, "invalid_turns": 0.2, "response_tokens": 3.0,
    }, abs=1e-4)


def test_a_group_counts_as_equal_only_if_all_its_returns_are():
    rows = [row(1, [1.0]), row(1, [1.0]), row(2, [1.0]), row(2, [0.0]), row(3, [0.0]), row(3, [0.0])]
    assert rollout_metrics(rows)["equal_groups"] == pytest.approx(2 / 3)


def batch():
    """One row: prompt, reasoning, action, action, padding; what stands outside the response must not count."""
    is_response = torch.tensor([[False, True, True, True, False]])
    is_action = torch.tensor([[False, False, True, True, False]])
    return make_batch(is_response, is_action=is_action, entropy=torch.tensor([[0.0, 2.0, 0.5, 1.5, 0.0]]),
                      score_norm=torch.tensor([[0.0, 0.5, 1.0, 0.25, 0.0]]),
                      energy=torch.tensor([[99.0, -3.0, -5.0, -8.0, 99.0]]),
                      advantages=torch.tensor([[0.0, -2.0, 1.0, -4.0, 0.0]]),
                      weights=torch.tensor([[0.0, 0.1, 1.2, 1.4, 0.0]]))


def test_token_metrics_on_one_row():
    # |A| · norm: 1, 1, 1; times the weights: .1, 1.2, 1.4
    assert token_metrics(batch()) == pytest.approx({
        "tokens_reasoning": 1, "weight_share_reasoning": 0.1 / 2.7, "gradient_share_reasoning": 0.1 / 2.7,
        "gradient_share_reasoning_uniform": 1 / 3, "entropy_reasoning": 2.0, "energy_reasoning": -3.0,
        "tokens_action": 2, "weight_share_action": 2.6 / 2.7, "gradient_share_action": 2.6 / 2.7,
        "gradient_share_action_uniform": 2 / 3, "entropy_action": 1.0, "energy_action": -6.5,
    })


def test_shares_of_both_classes_sum_to_1_and_gradient_shares_follow_the_advantages():
    made = batch()
    made.advantages = torch.tensor([[0.0, -6.0, 1.0, 0.0, 0.0]])  # |A| · norm: 3, 1, 0; weighted .3, 1.2, 0
    metrics = token_metrics(made)
    assert metrics["gradient_share_action"] == pytest.approx(1.2 / 1.5)
    assert metrics["gradient_share_action_uniform"] == pytest.approx(1 / 4)
    for share in ("weight_share_{}", "gradient_share_{}", "gradient_share_{}_uniform"):
        assert metrics[share.format("action")] + metrics[share.format("reasoning")] == pytest.approx(1)


def test_without_action_tokens_or_advantages_shares_are_0_and_never_nan():
    made = batch()
    made.is_action, made.is_reasoning = torch.zeros_like(made.is_action), made.is_response
    made.advantages = torch.zeros(1, 5)
    metrics = token_metrics(made)
    assert (metrics["tokens_action"], metrics["entropy_action"], metrics["gradient_share_reasoning"]) == (0, 0, 0)
    assert metrics["weight_share_reasoning"] == pytest.approx(1) and np.isfinite(list(metrics.values())).all()


def test_clipped_counts_tokens_beyond_the_range_that_the_advantage_pushes_further_out():
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.27, 0.81, 1.0]])
    advantages = torch.tensor([[1.0, -1.0, -1.0, 1.0, 1.0, -1.0, 5.0]])
    assert clipped(ratio.log(), advantages, 0.2, 0.28) == 2  # the first and the third
    assert clipped(ratio.log(), advantages, 0.1, 0.2) == 4  # now 1.27 and .81 as well


def episodes(*success, purchased=None):
    return [SimpleNamespace(success=s, return_=2.0 * s - 0.5, purchased=purchased) for s in success]


def test_webshops_summary_says_how_often_anything_was_bought():
    shoppers = [*episodes(True, True, False, purchased=True), *episodes(False, purchased=False)]
    result = summary(shoppers, 1)
    assert result["purchased"] == 0.75 and describe(result).endswith("n = 4 episodes on 4 levels, purchased in 75.0 %")


def test_returns_that_differ_in_their_rounding_only_make_an_equal_group():
    one, other = [-0.1, -0.1, -0.2, -0.2], [-0.1, -0.2, -0.2, -0.1]
    assert -0.1 - 0.1 - 0.2 - 0.2 != -0.1 - 0.2 - 0.2 - 0.1  # Python 3.12 has a `sum` that rounds once
    rows = [row(0, one), row(0, other), row(1, [-0.1]), row(1, [-0.2])]
    assert rollout_metrics(rows)["equal_groups"] == 0.5
    returns = torch.tensor([each.episode.return_ for each in rows])
    assert (group_advantages(returns, 2)[:2] == 0).all()


def test_summary_says_how_many_levels_and_episodes_it_saw():
    result = summary(episodes(True, False, True, True, False, False), 2)
    assert (result["success"], result["prompts"], result["n"], result["return_mean"]) == (0.5, 3, 6, 0.5)
    assert result["low"] == 0 and result["high"] == 1  # levels .5, 1, 0: 1 draw in 27 takes the worst one three times
    assert describe(result) == "success 50.0 %, 95 % interval [0.0, 100.0], n = 6 episodes on 3 levels"


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_levels_give_an_interval_without_width(value):
    assert success_interval(np.full((10, 4), value)) == (value, value)
    assert success_interval(np.tile([0.0, 1.0], (10, 2))) == (0.5, 0.5)


def test_the_interval_is_the_normal_one_where_levels_are_many_and_the_same_every_time():
    success = np.zeros((400, 1))
    success[:100] = 1  # mean ¼, standard error √(¼ · ¾ / 400) = .02165
    low, high = success_interval(success)
    assert (low, high) == pytest.approx((0.25 - 1.96 * 0.02165, 0.25 + 1.96 * 0.02165), abs=0.004)
    assert success_interval(success) == (low, high)


def test_more_samples_of_the_same_levels_are_no_news():
    levels = (np.random.default_rng(0).random((50, 1)) < 0.4).astype(float)
    assert success_interval(np.repeat(levels, 16, axis=1)) == success_interval(levels)


def test_the_bootstrap_interval_of_a_known_case():
    # One 1 among five: a resample's sum is Binomial(5, .2), P(0) = .328, P(≤ 2) = .942, P(≤ 3) = .9933: [0, 3/5].
    assert bootstrap_interval([0.0, 0.0, 1.0, 0.0, 0.0]) == (0, pytest.approx(0.6))
    # Two values: a resample's mean is the lower one, the middle or the upper one with ¼, ½, ¼.
    assert bootstrap_interval([-3.0, 5.0]) == (-3, 5)
    # Moved and stretched values have a moved and stretched interval.
    low, high = bootstrap_interval([1.0, 2.0, 4.0, 7.0, 11.0])
    assert bootstrap_interval([-8.0, -10.0, -14.0, -20.0, -28.0]) == pytest.approx((-6 - 2 * high, -6 - 2 * low))
    assert bootstrap_interval([0.25]) == (0.25, 0.25)


def test_the_bootstrap_interval_of_five_values_covers_less_than_it_says_and_students_does_not():
    rng, trials = np.random.default_rng(2), 1000
    samples = rng.standard_normal((trials, 5))
    for interval, low, high in ((lambda v: bootstrap_interval(v, 500), 0.80, 0.88), (mean_interval, 0.93, 0.97)):
        bounds = [interval(sample) for sample in samples]
        assert low < np.mean([one <= 0 <= other for one, other in bounds]) < high


def test_the_interval_over_runs_is_students():
    # mean 4; deviations -3, -1, 4; std √(26 / 2) = 3.6056, standard error 3.6056 / √3 = 2.0817; t₂ = 4.303
    assert mean_interval([1.0, 3.0, 8.0]) == pytest.approx((4 - 4.303 * 2.0817, 4 + 4.303 * 2.0817), abs=1e-3)
    assert mean_interval([2.0, 2.0, 2.0, 2.0]) == (2, 2)
    # two values 1 apart: standard error ½, t₁ = 12.706; sixteen: t₁₅ = 2.131
    assert mean_interval([0.0, 1.0]) == pytest.approx((0.5 - 6.353, 0.5 + 6.353))
    sixteen = [0.0, 1.0] * 8  # std √(16 · ¼ / 15) = .5164, standard error .1291
    assert mean_interval(sixteen) == pytest.approx((0.5 - 2.131 * 0.1291, 0.5 + 2.131 * 0.1291), abs=1e-4)
    for wrong in ([1.0], [1.0] * 17):
        with pytest.raises(ValueError, match=f"2 to 16 values, got {len(wrong)}"):
            mean_interval(wrong)


def test_the_interval_of_a_mean_of_groups_is_welchs():
    # s² / n of [0, 2] is 2 / 2, of [0, 2, 4] 4 / 3: standard error √(7/3) / 2; ν = (7/3)² / (1 + (4/3)² / 2) = 2.88: t₂
    half = 4.303 * 0.76376
    assert pooled_interval([[0.0, 2.0], [0.0, 2.0, 4.0]]) == pytest.approx((1.5 - half, 1.5 + half), abs=1e-4)
    assert pooled_interval([[1.0, 1.0], [4.0, 4.0]]) == (2.5, 2.5)
    assert pooled_interval([[1.0, 3.0, 8.0]]) == pytest.approx(mean_interval([1.0, 3.0, 8.0]))
    rng = np.random.default_rng(3)  # five seeds each, one game ten times as noisy
    bounds = [pooled_interval([rng.standard_normal(5), 10 * rng.standard_normal(5)]) for _ in range(2000)]
    assert 0.93 < np.mean([low <= 0 <= high for low, high in bounds]) < 0.98


def test_the_interval_covers_the_truth_as_often_as_it_says():
    # levels differ in difficulty (Beta(½, ½), mean ½), so that treating their samples as independent would fail
    rng, covered, naive, trials = np.random.default_rng(1), 0, 0, 400
    for _ in range(trials):
        success = (rng.random((64, 8)) < rng.beta(0.5, 0.5, (64, 1))).astype(float)
        low, high = success_interval(success, draws=500)
        covered += low <= 0.5 <= high
        mean = success.mean()
        naive += abs(mean - 0.5) <= 1.96 * (mean * (1 - mean) / success.size) ** 0.5
    assert 0.91 <= covered / trials <= 0.98
    assert naive / trials < 0.75
