"""energy.py: Eq. (4), the four signals of the ablation and the diagnosis of Figures 1 and 2."""

import math

import graded
import literal
import numpy as np
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

import energy

SEEDS = range(5)


def logits_of(seed, *shape):
    return 3 * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_eq4_energies_by_hand():
    """Minus the log of the sum of exps, over the last dimension."""
    # exp f = 1, 2, 5: -log 8 = -2.0794415.    f = 0, 0, 0: -log 3 = -1.0986123.    f = -1, -1, -1: 1 - log 3.
    logits = tensor([[0.0, math.log(2), math.log(5)], [0, 0, 0], [-1, -1, -1]])
    assert_close(graded.token_energy(logits), tensor([-2.0794415, -1.0986123, -0.0986123]))


def test_entropies_by_hand():
    # p = 1/8, 2/8, 5/8: (1/8) log 8 + (2/8) log 4 + (5/8) log 1.6 = 0.2599302 + 0.3465736 + 0.2937523 = 0.9002561
    logits = tensor([[0.0, math.log(2), math.log(5)], [7, 7, 7]])
    assert_close(energy.token_entropy(logits), tensor([0.9002561, math.log(3)]))


def test_policy_nll_and_logprob_shift_by_hand():
    old_logp, ref_logp = tensor([[-0.5, -2.0]]), tensor([[-0.75, -1.5]])
    assert torch.equal(energy.policy_nll(old_logp), tensor([[0.5, 2.0]]))
    assert torch.equal(energy.logprob_shift(old_logp, ref_logp), tensor([[0.25, -0.5]]))


@pytest.mark.parametrize("seed", SEEDS)
def test_energy_and_entropy_equal_the_loops(seed):
    """The sum runs over the vocabulary, the last dimension, however many stand before it."""
    logits = logits_of(seed, 2, 3, 7)
    for vectorised, loop in (
        (graded.token_energy, literal.token_energy),
        (energy.token_entropy, literal.token_entropy),
    ):
        expected = [[loop(position) for position in row] for row in logits.tolist()]
        assert_close(vectorised(logits), tensor(expected, dtype=torch.float64))


def test_a_constant_added_to_all_logits_moves_energy_by_minus_it_and_leaves_softmax_and_entropy():
    """Energies are of the logits themselves: nothing may be subtracted from them for good."""
    logits = logits_of(0, 4, 9)
    for c in (-20.0, 0.5, 300.0):
        assert_close((logits + c).softmax(-1), logits.softmax(-1))
        assert_close(graded.token_energy(logits + c), graded.token_energy(logits) - c)
        assert_close(energy.token_entropy(logits + c), energy.token_entropy(logits))


def test_one_dominant_logit_is_the_energy_and_leaves_no_entropy():
    """exp(500) is infinite: take the largest logit out of the sum first, or let logsumexp do it."""
    logits = tensor([[500.0, 0.0, 1.0], [-2000.0, -1000.0, -3000.0]])
    assert_close(graded.token_energy(logits), tensor([-500.0, 1000.0]))  # neither inf nor nan: no exp of 500
    assert_close(energy.token_entropy(logits), tensor([0.0, 0.0]))


def test_energy_and_entropy_do_not_depend_on_the_order_of_the_vocabulary_or_on_other_positions():
    """The sum runs over the vocabulary, the last dimension, and over nothing else."""
    logits = logits_of(1, 5, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for signal in (graded.token_energy, energy.token_entropy):
        assert_close(signal(logits[:, order]), signal(logits))
        assert_close(signal(logits[2]), signal(logits)[2])


def test_entropy_lies_between_zero_and_log_v():
    entropy = energy.token_entropy(logits_of(2, 50, 6))
    assert (entropy > 0).all() and (entropy < math.log(6)).all()


def test_energy_and_entropy_pass_gradcheck_and_energys_gradient_is_minus_the_softmax():
    logits = logits_of(3, 2, 5).requires_grad_()
    assert torch.autograd.gradcheck(energy.token_energy, logits)
    assert torch.autograd.gradcheck(energy.token_entropy, logits)
    energy.token_energy(logits).sum().backward()
    assert_close(logits.grad, -logits.detach().softmax(-1))


# The reference values below are scipy 1.17.1's, scipy.stats.spearmanr(first, second), printed in full.


def test_spearman_without_ties():
    # Ranks 2 1 4 3 6 5 against 1 .. 6: six differences of 1, ρ = 1 - 6 · 6 / (6 · 35) = 0.828571
    rho, p = energy.spearman(np.array([1.0, 2, 3, 4, 5, 6]), np.array([2.0, 1, 4, 3, 7, 5]))
    assert rho == pytest.approx(0.8285714285714287) and p == pytest.approx(0.04156268221574335, rel=1e-6)


def test_spearman_with_ties():
    rho, p = energy.spearman(np.array([3.0, 1, 4, 1, 5, 9, 2, 6]), np.array([2.0, 7, 1, 8, 2, 8, 1, 8]))
    assert rho == pytest.approx(0.19885368120992467) and p == pytest.approx(0.6368617833253286, rel=1e-6)


def test_spearman_of_very_small_p_values():
    i = np.arange(50.0)
    rho, p = energy.spearman(i, i + 7 * (i % 3))
    assert rho == pytest.approx(0.9352701080432172) and p == pytest.approx(2.7239578508726774e-23, rel=1e-4)
    i = np.arange(40.0)
    rho, p = energy.spearman(i, -(i // 4))  # ties, and falling
    assert rho == pytest.approx(-0.9952985165067818) and p == pytest.approx(3.834850056937669e-40, rel=1e-4)


def test_spearman_of_three_and_four_pairs():
    # Three: ρ = 0.5 and p = (π/2 - π/6) / (π/2) = 2/3. Four: ρ = 0.8 and p = 1 - 0.8, as ∫ cos θ dθ = sin θ.
    assert energy.spearman(np.array([1.0, 2, 3]), np.array([1.0, 3, 2])) == pytest.approx((0.5, 2 / 3), rel=1e-6)
    assert energy.spearman(np.arange(4.0), np.array([1.0, 2, 4, 3])) == pytest.approx((0.8, 0.2), rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_spearman_equals_the_loop_over_ranks(seed):
    first, second = np.random.default_rng(seed).integers(0, 9, (2, 23)).astype(float)
    rho, p = energy.spearman(first, second)
    assert rho == pytest.approx(literal.spearman(first.tolist(), second.tolist()))
    assert energy.spearman(second, first) == pytest.approx((rho, p))
    assert energy.spearman(np.exp(first), -second) == pytest.approx((-rho, p))  # only ranks count


def test_partial_spearman_of_four_triples_by_hand():
    # Ranks 1 2 3 4, 2 1 4 3 and 2 1 3 4: ρ₁₂ = 1 - 6 · 4 / 60 = 0.6, ρ₁₃ = ρ₂₃ = 1 - 6 · 2 / 60 = 0.8;
    # (0.6 - 0.64) / 0.36 = -1/9, and with one degree of freedom p = 1 - arcsin(1/9) / (π/2).
    values = np.array([10.0, 20, 30, 40]), np.array([2.0, 1, 4, 3]), np.array([-2.0, -3, 0, 7])
    expected = -1 / 9, 1 - np.arcsin(1 / 9) / (np.pi / 2)
    assert energy.partial_spearman(*values) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_partial_spearman_equals_the_correlation_of_residuals_of_ranks(seed):
    first, second, given = np.random.default_rng(seed).integers(0, 9, (3, 23)).astype(float)
    second += given
    rho, p = energy.partial_spearman(first, second, given)
    assert rho == pytest.approx(literal.partial_spearman(*(x.tolist() for x in (first, second, given))))
    assert energy.partial_spearman(second, first, np.exp(given)) == pytest.approx((rho, p))  # only ranks count
    nan = np.array([np.nan])
    longer = [np.concatenate([x, nan if i == seed % 3 else [5.0]]) for i, x in enumerate((first, second, given))]
    assert energy.partial_spearman(*longer) == pytest.approx((rho, p))


def test_partial_spearman_takes_out_what_a_common_cause_explains():
    rng = np.random.default_rng(0)
    cause = rng.standard_normal(400)
    first, second = cause + rng.standard_normal((2, 400))
    assert energy.spearman(first, second)[1] < 1e-10 and abs(energy.partial_spearman(first, second, cause)[0]) < 0.12
    assert energy.partial_spearman(first, second, rng.standard_normal(400))[1] < 1e-10  # an unrelated one: nothing


def test_partial_spearman_is_nan_where_the_third_determines_another_or_triples_are_few():
    values = np.arange(6.0), np.array([2.0, 1, 3, 4, 6, 5])
    for given in (values[0] ** 3, -values[1]):
        assert np.isnan(energy.partial_spearman(*values, given)).all()
    assert energy.partial_spearman(*values, np.ones(6)) == pytest.approx(energy.spearman(*values))  # takes nothing out
    assert np.isnan(energy.partial_spearman(*(v[:3] for v in values), np.array([1.0, 3, 2]))).all()


def test_a_signal_of_the_difficulty_alone_does_not_correlate_given_the_success_and_its_bend():
    rng, found = np.random.default_rng(0), []
    for _ in range(200):
        chance = rng.beta(1, 2.4, 256)
        solved = rng.binomial(16, chance) / 16
        signal, bend = -chance + 0.1 * rng.standard_normal(256), (solved * (1 - solved)).round(9)
        noisy = bend + 0.02 * rng.standard_normal(256)  # returns that are not quite 0 or 1, or nothing were left
        cases = (bend, []), (bend, [solved]), (noisy, [solved, bend])
        found.append([energy.partial_spearman(signal, spread, *given)[1] < 0.05 for spread, given in cases])
    plain, given_mean, given_both = np.mean(found, axis=0)
    assert plain > 0.9 and given_mean > 0.2 and given_both < 0.1
    assert np.isnan(energy.partial_spearman(signal, np.sqrt(bend), solved, bend)).all()  # 0/1 returns: nothing is left


def test_spearman_leaves_out_pairs_with_nan_and_is_nan_where_nothing_varies():
    nan = np.nan
    rho, p = energy.spearman(np.array([1, nan, 2, 3, 4.0, 9]), np.array([1, 5.0, 2, 4, 3, nan]))
    assert (rho, p) == pytest.approx((0.8, 0.2), rel=1e-6)
    for first, second in (([1, 2], [1, 2]), ([1, 2, nan], [1, 2, 3]), ([5, 5, 5], [1, 2, 3]), ([1, 2, 3], [0, 0, 0])):
        assert np.isnan(energy.spearman(np.array(first, float), np.array(second, float))).all()
    assert energy.spearman(np.arange(9.0), np.arange(9.0) ** 3) == pytest.approx((1, 0), abs=1e-12)


def planted(seed=0, num_groups=60, group_size=4):
    """Spread of returns grows with the groups' number, action energies with it; reasoning energies are noise.

    Per row 6 reasoning tokens, 2 action tokens, 2 of observation or padding, which hold NaN.
    """
    rng = np.random.default_rng(seed)
    spread = rng.permutation(num_groups) / num_groups + 0.05
    returns = tensor((rng.standard_normal((num_groups, group_size)) * spread[:, None]).ravel())
    kinds = np.array(list("rrr-rrraa-"))
    values = rng.standard_normal((num_groups * group_size, len(kinds))) - 9
    values[:, kinds == "a"] += 5 * returns.view(num_groups, -1).std(1).repeat_interleave(group_size)[:, None].numpy()
    values[:, kinds == "-"] = np.nan
    masks = {name: tensor(kinds == name[3]).repeat(len(values), 1) for name in ("is_action", "is_reasoning")}
    return dict(energy=tensor(values), returns=returns, group_size=group_size, **masks)


def test_the_planted_correlation_is_found_at_action_tokens_and_is_absent_at_reasoning_tokens():
    found = energy.action_bottleneck(**planted())
    assert set(found) == {f"{a}_{b}" for a in ("rho", "p") for b in ("action", "reasoning", "response")} | {
        "num_groups", "action_fraction",
    }  # fmt: skip
    assert found["num_groups"] == 60 and found["action_fraction"] == pytest.approx(2 / 8)
    assert found["rho_action"] > 0.8 and found["p_action"] < 1e-10
    assert abs(found["rho_reasoning"]) < 0.3 and found["p_reasoning"] > 0.05
    assert found["rho_reasoning"] < found["rho_response"] < found["rho_action"]


def test_the_diagnosis_of_four_groups_of_two_by_hand():
    # Spreads of R: 0, 1, 2, 4 times 1/√2, so ranks 1 2 3 4.
    # Action means of a group's pooled tokens: (1 + 2 + 7) / 3 = 3.3, 2, 9, (4 + 4) / 2 = 4: ranks 2 1 4 3, four
    # differences of 1, ρ = 1 - 6 · 4 / 60 = 0.6. (A mean of rows' means would be (1.5 + 7) / 2 = 4.25 in group 0.)
    # Reasoning means 4 3 2 1: ρ = -1.
    # Response: (10 + 8) / 5 = 3.6, (2 + 6) / 3 = 2.7, (9 + 4) / 3 = 4.3, (8 + 2) / 4 = 2.5: ranks 3 2 4 1,
    # differences 2 0 1 3, ρ = 1 - 6 · 14 / 60 = -0.4.
    returns = tensor([5.0, 5, 0, 1, 3, 1, 0, 4])
    values = tensor([[1.0, 2, 4], [7, 0, 4], [2, 0, 3], [0, 0, 3], [0, 9, 2], [0, 0, 2], [4, 0, 1], [0, 4, 1]])
    is_action = tensor([[1, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]]).bool()
    is_reasoning = tensor([[False, False, True]]).expand(8, 3)
    found = energy.action_bottleneck(values, is_action, is_reasoning, returns, 2)
    assert found["rho_action"] == pytest.approx(0.6) and found["rho_reasoning"] == pytest.approx(-1)
    assert found["rho_response"] == pytest.approx(-0.4) and found["action_fraction"] == pytest.approx(7 / 15)


def test_as_many_failures_as_successes_elsewhere_are_the_same_spread():
    solved = torch.arange(17)  # of 16: m and 16 - m have the same std, up to its rounding
    returns = (torch.arange(16) < solved[:, None]).float()
    spread = energy.group_spread(returns.flatten(), 16)
    assert len(set(returns.double().std(1).tolist())) > 9 == len(set(spread)) and (spread == spread[::-1]).all()


def test_a_group_lacking_action_tokens_leaves_that_class_only():
    batch = planted()
    batch["is_action"][4:8] = False  # group 1
    others = {k: v if k == "group_size" else torch.cat([v[:4], v[8:]]) for k, v in batch.items()}
    found, without = energy.action_bottleneck(**batch), energy.action_bottleneck(**others)
    assert found["rho_action"] == without["rho_action"] and found["p_action"] == without["p_action"]
    assert found["rho_reasoning"] != without["rho_reasoning"] and found["num_groups"] == 60


def test_a_batch_lacking_action_tokens_has_no_correlation_there():
    batch = planted()
    batch["is_action"][:] = False
    found = energy.action_bottleneck(**batch)
    assert math.isnan(found["rho_action"]) and math.isnan(found["p_action"]) and found["action_fraction"] == 0
    assert found["rho_response"] == found["rho_reasoning"]


def test_the_diagnosis_ignores_padding_a_shift_of_energy_and_the_order_of_groups_and_of_rows_in_them():
    batch = planted(1)
    found = energy.action_bottleneck(**batch)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    rows = (order[:, None] * 4 + tensor([2, 0, 3, 1])).flatten()
    moved = {k: v if k == "group_size" else v[rows] for k, v in batch.items()}
    moved["energy"] = torch.nn.functional.pad(moved["energy"] + 100, (0, 2), value=np.nan)
    for mask in ("is_action", "is_reasoning"):
        moved[mask] = torch.nn.functional.pad(moved[mask], (0, 2))
    assert energy.action_bottleneck(**moved) == pytest.approx(found)


def test_the_diagnosis_refuses_shapes_that_do_not_fit_and_shows_them():
    batch = planted()
    for size in (1, 0, 7):
        with pytest.raises(ValueError, match=rf"240 rows.* {size}$"):
            energy.action_bottleneck(**batch | {"group_size": size})
    with pytest.raises(ValueError, match=r"\(240, 9\)"):
        energy.action_bottleneck(**batch | {"energy": batch["energy"][:, :9]})
    with pytest.raises(ValueError, match=r"\(236,\)"):
        energy.action_bottleneck(**batch | {"returns": batch["returns"][4:]})


def test_the_diagnosis_refuses_masks_that_overlap_and_shows_by_how_much():
    batch = planted()
    overlapping = batch["is_reasoning"].clone()
    overlapping[3:6, 7] = True  # three action tokens
    with pytest.raises(ValueError, match=r"\b3\b"):
        energy.action_bottleneck(**batch | {"is_reasoning": overlapping})
