"""baselines.py: KL estimators against an exact KL and its gradient, and every formula of the rivals.

By hand at asymmetric points, against the loops of literal.py, at the limits that recover a simpler method, and for
what must change nothing.
"""

import random
from math import exp, inf, log

import literal
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

from actfocus import gae, group_advantages
from baselines import (
    criticality,
    edge_advantages,
    empg_advantages,
    filter_groups,
    kl_estimate,
    ntpo_gae,
    overlong_penalty,
    poad_gae,
    tree_values,
    update_set,
    value_loss,
    varied_groups,
)

NAN = float("nan")
SEEDS = range(5)
F64 = torch.float64
PI, REF = (0.9, 0.1), (0.5, 0.5)
EXACT = 0.9 * log(0.9 / 0.5) + 0.1 * log(0.1 / 0.5)  # KL(π‖π_ref) = 0.368; the other way round it is 0.511


def close(actual, expected):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=1e-6)


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


def random_returns(seed, groups=9, size=3):
    """Groups of few different returns, about a third of them all equal."""
    rng = random.Random(seed)
    rows = []
    for _ in range(groups):
        rows += rng.choices((0.0, 0.1, 1.0), k=size) if rng.random() < 0.6 else [rng.random()] * size
    return tensor(rows)


def test_varied_groups_by_hand():
    # Groups of two: equal, varied, equal, varied, varied. The first n varied ones, then equal ones; always in order.
    returns = tensor([3.0, 3, 0, 10, -1, -1, 1, 2, 5, 8])
    assert varied_groups(returns, 2, 1) == [2, 3]
    assert varied_groups(returns, 2, 2) == [2, 3, 6, 7]
    assert varied_groups(returns, 2, 4) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert varied_groups(returns, 2, 5) == list(range(10))


@pytest.mark.parametrize("seed", SEEDS)
def test_varied_groups_equal_the_loop(seed):
    returns = random_returns(seed)
    for num_groups in range(1, 10):
        assert varied_groups(returns, 3, num_groups) == literal.varied_groups(returns.tolist(), 3, num_groups)


def test_a_tenth_seven_times_is_a_group_of_equal_returns_though_its_mean_is_off_by_one_bit():
    returns = tensor([0.1] * 7 + [0.0] * 6 + [1e-6])
    assert varied_groups(returns, 7, 1) == list(range(7, 14))


def test_which_groups_are_taken_does_not_depend_on_how_much_others_vary_or_on_the_order_inside():
    returns = tensor([4.0, 4, 4, 0, 1, 0, 2, 2, 2, 5, 6, 7])
    rows = varied_groups(returns, 3, 2)
    assert rows == [3, 4, 5, 9, 10, 11]
    assert varied_groups(tensor([9.0, 9, 9, 1, 0, 0, 2, 2, 2, 700, 5, -6]), 3, 2) == rows
    assert varied_groups(100 * returns - 7, 3, 2) == rows


def test_enough_varied_groups_leave_no_row_of_a_group_without_advantage():
    returns = random_returns(0)
    rows = varied_groups(returns, 3, 2)
    assert len(rows) == 6 and (group_advantages(returns[rows], 3).view(-1, 3) != 0).any(1).all()


def test_overlong_penalty_by_hand():
    # L_max = 20, L_buf = 5, so it starts at 15: -(16 - 15) / 5 = -0.2, -(18 - 15) / 5 = -0.6, -(20 - 15) / 5 = -1
    close(overlong_penalty(tensor([0, 14, 15, 16, 18, 20]), 20, 5), [0, 0, 0, -0.2, -0.6, -1])
    # a broken buffer: starts at 4 - 1.6 = 2.4, -(3 - 2.4) / 1.6 = -0.375
    close(overlong_penalty(tensor([[2.0, 3.0], [4.0, 0.0]]), 4, 1.6), [[0, -0.375], [-1, 0]])


@pytest.mark.parametrize("seed", SEEDS)
def test_overlong_penalty_equals_the_cases_of_the_paper(seed):
    rng = random.Random(seed)
    max_length = rng.randint(5, 40)
    lengths = torch.arange(max_length + 1)
    for buffer in (0.5, rng.uniform(1, max_length), max_length):
        expected = [literal.overlong_penalty(length, max_length, buffer) for length in range(max_length + 1)]
        close(overlong_penalty(lengths, max_length, buffer), expected)


def test_the_penalty_never_rises_with_the_length_and_is_minus_one_at_the_limit_whatever_the_buffer():
    for buffer in (0.25, 3, 10):
        penalty = overlong_penalty(torch.arange(11), 10, buffer)
        assert penalty[-1] == -1 and penalty[0] == 0 and (penalty.diff() <= 0).all()


@pytest.mark.parametrize("buffer", [0, -1, 20.5, NAN])
def test_an_impossible_buffer_is_refused_and_shown(buffer):
    with pytest.raises(ValueError, match=rf"^the buffer must lie in \(0, 20\], got {buffer}$"):
        overlong_penalty(tensor([1]), 20, buffer)


# EMPG. Two rows, one of three steps and one of one; H̃ = 0, 1/2, 1 and 1/4.
STEP_ENTROPY = tensor([[1.0, 2, 3], [1.5, NAN, NAN]], dtype=F64)
IS_STEP = tensor([[True, True, True], [True, False, False]])
TRAJECTORY = tensor([2.0, -1], dtype=F64)


def random_steps(seed, rows=6):
    """Rows of one to five steps; NaN where there is none."""
    rng = random.Random(seed)
    entropies = [[rng.uniform(0, 3) for _ in range(rng.randint(1, 5))] for _ in range(rows)]
    padded = tensor([row + [NAN] * (6 - len(row)) for row in entropies], dtype=F64)
    advantages = [rng.gauss(0, 1) for _ in range(rows)]
    return tensor(advantages, dtype=F64), padded, ~padded.isnan(), entropies


def test_empg_by_hand():
    # κ = log 16: exp(-κH̃) = 1, 1/4, 1/16 | 1/2, mean 29/64, so g = 64, 16, 4 | 32 in parts of 29.
    # κ' = log 4: f = 1, 1/2, 1/4 | …; the next step's: 1/2, 1/4, none | none; times ζ = 0.4: 0.2, 0.1, 0 | 0.
    # A = 2 | -1: A_mod = 128/29 + 0.2 = 4.613793, 32/29 + 0.1 = 1.203448, 8/29 = 0.275862 | -32/29 = -1.103448
    # mean 4.989655 / 4 = 1.247414
    result = empg_advantages(TRAJECTORY, STEP_ENTROPY, IS_STEP, kappa=log(16), kappa_bonus=log(4), zeta=0.4)
    close(result, [[3.366379, -0.043966, -0.971552], [-2.350862, 0, 0]])


def test_empg_with_the_papers_constants_by_hand():
    # κ = κ' = 1: exp(-H̃) = 1, 0.606531, 0.367879 | 0.778801, mean 0.688303; g = 1.452849, 0.881198, 0.534473 | 1.131480
    # A_mod = 2.905698 + 0.05 · 0.606531 = 2.936024, 1.762396 + 0.05 · 0.367879 = 1.780790, 1.068946 | -1.131480
    # mean 4.654281 / 4 = 1.163570
    result = empg_advantages(TRAJECTORY, STEP_ENTROPY, IS_STEP)
    close(result, [[1.772454, 0.617220, -0.094624], [-2.295050, 0, 0]])


@pytest.mark.parametrize("seed", SEEDS)
def test_empg_equals_the_loop_on_ragged_rows(seed):
    advantages, entropy, is_step, entropies = random_steps(seed)
    for settings in ((1.0, 1.0, 0.05), (2.5, 0.5, 0.3), (0.0, 1.0, 1.0), (1.0, 0.0, 0.1)):
        rows = literal.empg_advantages(advantages.tolist(), entropies, *settings)
        result = empg_advantages(advantages, entropy, is_step, *settings)
        assert (result[~is_step] == 0).all()
        close(result[is_step], [value for row in rows for value in row])


@pytest.mark.parametrize("seed", SEEDS)
def test_kappa_zero_and_zeta_zero_is_grpo_up_to_the_batch_mean(seed):
    _, entropy, is_step, _ = random_steps(seed)
    returns = torch.randn(6, dtype=F64, generator=torch.Generator().manual_seed(seed))
    grpo = group_advantages(returns, 3)[:, None].expand_as(entropy)
    expected = torch.where(is_step, grpo - grpo[is_step].mean(), 0.0)
    close(empg_advantages(grpo[:, 0], entropy, is_step, kappa=0.0, zeta=0.0), expected)


def test_steps_that_are_all_equally_sure_give_grpo_up_to_the_batch_mean_whatever_kappa():
    result = empg_advantages(TRAJECTORY, torch.full((2, 3), 0.7, dtype=F64), IS_STEP, kappa=3.0, zeta=0.0)
    close(result, [[0.75, 0.75, 0.75], [-2.25, 0, 0]])  # 2, 2, 2, -1 without their mean 1.25


@pytest.mark.parametrize("seed", SEEDS)
def test_the_scale_g_averages_to_one_over_all_steps(seed):
    _, entropy, is_step, _ = random_steps(seed)
    scales = []
    for b in range(6):  # A = 1 in this row and 0 in the others: the others show the batch mean, this row g above it
        result = empg_advantages(torch.eye(6, dtype=F64)[b], entropy, is_step, kappa=1.7, zeta=0.0)
        scales.append((result[b] - result[b - 1, 0])[is_step[b]])
    scales = torch.cat(scales)
    close(scales.mean(), 1.0)
    assert scales.min() > 0 and scales.max() > 1 + 1e-3
    assert (scales.argsort() == entropy[is_step].argsort(descending=True)).all()  # the surer the larger


def test_a_confident_wrong_step_is_punished_harder_and_an_uncertain_one_less():
    entropy = tensor([[0.2, 1.9], [1.0, 1.0]], dtype=F64)
    sure, unsure = empg_advantages(tensor([-1.0, 1], dtype=F64), entropy, torch.ones(2, 2) > 0, zeta=0.0)[0]
    plain, _ = empg_advantages(tensor([-1.0, 1], dtype=F64), entropy, torch.ones(2, 2) > 0, 0.0, zeta=0.0)[0]
    assert sure < plain < unsure


def test_empg_leaves_a_batch_whose_mean_over_steps_is_zero():
    for seed in SEEDS:
        advantages, entropy, is_step, _ = random_steps(seed)
        close(empg_advantages(advantages, entropy, is_step, zeta=0.3)[is_step].mean(), 0.0)


def test_a_port_that_multiplies_the_whole_batch_by_g_in_the_loop_over_steps_gives_other_numbers():
    # κ = log 16, ζ = 0. Right: 128/29, 32/29, 8/29 | -32/29, mean 34/29: 94/29, -2/29, -26/29 | -66/29.
    # The port multiplies everything by 64 · 16 · 4 · 32 / 29⁴ = 0.185319: 0.370637 thrice | -0.185319,
    # mean 0.231648: 0.138989 thrice | -0.416967; no step of a row is told from another.
    def port(entropies):
        confidence = [[exp(-log(16) * h) for h in row] for row in entropies]
        mean = sum(map(sum, confidence)) / sum(map(len, confidence))
        modulated = [[a] * len(row) for a, row in zip((2.0, -1.0), entropies, strict=True)]
        for row in confidence:
            for c in row:
                modulated = [[value * c / mean for value in other] for other in modulated]
        mean = sum(map(sum, modulated)) / sum(map(len, modulated))
        return tensor([value - mean for row in modulated for value in row], dtype=F64)

    right = empg_advantages(TRAJECTORY, STEP_ENTROPY, IS_STEP, kappa=log(16), zeta=0.0)[IS_STEP]
    close(right, [94 / 29, -2 / 29, -26 / 29, -66 / 29])
    close(port([[0, 0.5, 1], [0.25]]), [0.138989, 0.138989, 0.138989, -0.416967])
    equally_sure = empg_advantages(TRAJECTORY, torch.ones_like(STEP_ENTROPY), IS_STEP, log(16), zeta=0.0)[IS_STEP]
    close(port([[0, 0, 0], [0]]), equally_sure)  # where all steps are equally sure nobody notices


def test_only_the_next_step_of_the_same_row_earns_the_bonus():
    # A = 0, κ' = log 4, ζ = 0.4: bonus 0.2, 0.1, none | none; the second row's step must not be the first row's next.
    result = empg_advantages(torch.zeros(2, dtype=F64), STEP_ENTROPY, IS_STEP, kappa_bonus=log(4), zeta=0.4)
    close(result, [[0.125, 0.025, -0.075], [-0.075, 0, 0]])  # without their mean 0.075


def test_equal_returns_leave_empg_with_its_bonus_where_zeta_is_above_zero_and_with_nothing_where_it_is_zero():
    for seed in SEEDS:
        _, entropy, is_step, _ = random_steps(seed)
        advantages = group_advantages(torch.full((6,), 0.1, dtype=F64), 3)
        assert (empg_advantages(advantages, entropy, is_step, zeta=0.0) == 0).all()
        bonus = empg_advantages(advantages, entropy, is_step, zeta=0.05)
        assert bonus[is_step].std() > 1e-3  # it tells steps apart, and training would follow it
        close(empg_advantages(advantages, entropy, is_step, zeta=0.1), 2 * bonus)


def test_empg_ignores_padding_row_order_and_shift_and_scale_of_the_entropies():
    advantages, entropy, is_step, _ = random_steps(1)
    result = empg_advantages(advantages, entropy, is_step)
    order = [3, 0, 5, 1, 4, 2]
    close(empg_advantages(advantages[order], entropy[order], is_step[order]), result[order])
    close(empg_advantages(advantages, 7 * entropy + 3, is_step), result)
    for filler in (NAN, inf, -1e30):
        wider = torch.nn.functional.pad(entropy.masked_fill(~is_step, filler), (0, 2), value=filler)
        wider = empg_advantages(advantages, wider, torch.nn.functional.pad(is_step, (0, 2)))
        assert torch.equal(wider[:, :6], result) and (wider[:, 6:] == 0).all()


def test_a_row_without_a_step_changes_no_other_row_of_empg():
    advantages, entropy, is_step, _ = random_steps(2)
    more = torch.cat([advantages, tensor([NAN])]), torch.cat([entropy, torch.full((1, 6), NAN)])
    result = empg_advantages(*more, torch.cat([is_step, torch.zeros(1, 6, dtype=torch.bool)]))
    assert torch.equal(result[:6], empg_advantages(advantages, entropy, is_step)) and (result[6] == 0).all()


def test_empg_refuses_other_shapes_and_a_batch_without_a_step_in_one_line():
    entropy, is_step = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for arguments, shown in (
        ((torch.zeros(3), entropy, is_step), r"\(3,\)"),
        ((torch.zeros(2, 3), entropy, is_step), r"\[\(2, 3\)"),
        ((torch.zeros(2), entropy[:, :2], is_step), r"\(2, 2\)"),
        ((torch.zeros(2), entropy, ~is_step), "at least one step"),
    ):
        with pytest.raises(ValueError, match=shown) as caught:
            empg_advantages(*arguments)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_expected_squared_gradient_of_the_logits_is_one_minus_exp_of_minus_the_renyi_2_entropy(seed):
    generator = torch.Generator().manual_seed(seed)
    for size in (2, 3, 7):
        logits = (2 * torch.randn(size, dtype=F64, generator=generator)).requires_grad_()
        probabilities = logits.softmax(0).detach()
        expected_norm = 0.0
        for action in range(size):
            (gradient,) = torch.autograd.grad(logits.log_softmax(0)[action], logits)
            expected_norm += probabilities[action] * gradient.square().sum()
        renyi = -probabilities.square().sum().log()
        close(expected_norm, 1 - (-renyi).exp())


def test_the_squared_gradient_of_a_policy_of_nine_to_one_by_hand():
    # 1 - .9² - .1² = .18, and of (.5, .5) .5: the less sure the policy, the larger its gradient, which g undoes
    for pi, by_hand in ((PI, 0.18), (REF, 0.5)):
        logits = tensor(pi, dtype=F64).log().requires_grad_()
        gradients = [torch.autograd.grad(logits.log_softmax(0)[a], logits)[0] for a in (0, 1)]
        close(sum(p * gradient.square().sum() for p, gradient in zip(pi, gradients, strict=True)), by_hand)


# POAD and NTPO. One row: a prompt, an action of two tokens, an observation, an action of two tokens, padding.
VALUES = tensor([[NAN, 0.1, 0.4, NAN, 0.2, 0.6, NAN]])
REWARDS = tensor([[NAN, NAN, 1, NAN, NAN, 2, NAN]])  # read at turn ends only
IS_RESPONSE = tensor([[False, True, True, False, True, True, False]])
IS_TURN_END = tensor([[False, False, True, False, False, True, False]])


def random_turns(seed, rows=6):
    """Rows of one to four actions of one to four tokens, observations between them; all that is not read holds NaN."""
    rng = random.Random(seed)
    lengths = [rng.choices((1, 2, 3, 4), k=rng.randint(1, 4)) for _ in range(rows)]
    actions = [[[rng.gauss(0, 1) for _ in range(n)] for n in row] for row in lengths]
    rewards = [[rng.gauss(0, 1) for _ in row] for row in lengths]
    tokens = []  # of each row: value, reward, is_response, is_turn_end
    for row, earned in zip(actions, rewards, strict=True):
        line = []
        for action, reward in zip(row, earned, strict=True):
            line += [(NAN, NAN, False, False)] * rng.randint(0, 3)
            line += [(value, NAN, True, False) for value in action[:-1]] + [(action[-1], reward, True, True)]
        tokens.append(line)
    width = max(map(len, tokens)) + 2
    tokens = [line + [(NAN, NAN, False, False)] * (width - len(line)) for line in tokens]
    values, reward, is_response, is_turn_end = (
        tensor([[token[i] for token in line] for line in tokens], dtype=dtype)
        for i, dtype in enumerate((F64, F64, torch.bool, torch.bool))
    )
    return (reward, values, is_response, is_turn_end), actions, rewards


def test_poad_by_hand():
    # γ = 0.5, λ = 0.8
    # w₂² δ = 2 - 0.6 = 1.4                        A = 1.4
    # w₂¹ δ = 0.6 - 0.2 = 0.4                      A = 0.4 + 0.8 · 1.4 = 1.52
    # w₁² δ = 1 + 0.5 · 0.2 - 0.4 = 0.7            A = 0.7 + 0.5 · 0.8 · 1.52 = 1.308
    # w₁¹ δ = 0.4 - 0.1 = 0.3                      A = 0.3 + 0.8 · 1.308 = 1.3464
    advantages, targets = poad_gae(REWARDS, VALUES, IS_RESPONSE, IS_TURN_END, gamma=0.5, lam=0.8)
    close(advantages, [[0, 1.3464, 1.308, 0, 1.52, 1.4, 0]])
    close(targets, [[0, 1.4464, 1.708, 0, 1.72, 2.0, 0]])


def test_ntpo_by_hand():
    # γ = 0.5, λ = 0.8, γλ = 0.4
    # w₂² δ = 2 - 0.6 = 1.4                        A = 1.4
    # w₂¹ δ = 0.5 · 0.6 - 0.2 = 0.1                A = 0.1 + 0.4 · 1.4 = 0.66
    # w₁² δ = 1 + 0.5 · 0.2 - 0.4 = 0.7            A = 0.7 + 0.4 · 0.66 = 0.964
    # w₁¹ δ = 0.5 · 0.4 - 0.1 = 0.1                A = 0.1 + 0.4 · 0.964 = 0.4856
    advantages, targets = ntpo_gae(REWARDS, VALUES, IS_RESPONSE, IS_TURN_END, gamma=0.5, lam=0.8)
    close(advantages, [[0, 0.4856, 0.964, 0, 0.66, 1.4, 0]])
    close(targets, [[0, 0.5856, 1.364, 0, 0.86, 2.0, 0]])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("backup, loop", [(poad_gae, literal.poad_gae), (ntpo_gae, literal.ntpo_gae)])
def test_poad_and_ntpo_equal_their_loops_on_ragged_turns(seed, backup, loop):
    batch, actions, rewards = random_turns(seed)
    is_response = batch[2]
    for gamma, lam in ((0.95, 0.95), (0.5, 0.0), (0.0, 1.0), (0.9, 1.0), (1.0, 0.7)):
        advantages, targets = backup(*batch, gamma, lam)
        rows = [loop(*row, gamma, lam) for row in zip(actions, rewards, strict=True)]
        close(advantages[is_response], [value for row in rows for action in row for value in action])
        close(targets, torch.where(is_response, advantages + batch[1], 0.0))
        assert (advantages[~is_response] == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_poad_and_ntpo_with_gamma_one_are_ordinary_gae(seed):
    (rewards, values, is_response, is_turn_end), *_ = random_turns(seed)
    expected = gae(rewards.masked_fill(~is_turn_end, 0.0), values, is_response, 1.0, 0.9)
    for backup in (poad_gae, ntpo_gae):
        for one, other in zip(backup(rewards, values, is_response, is_turn_end, 1.0, 0.9), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("seed", SEEDS)
def test_poad_with_one_token_an_action_is_gae_over_actions_with_gamma(seed):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, 4, 9, dtype=F64, generator=generator)
    is_response = torch.rand(4, 9, generator=generator) < 0.6
    advantages, targets = poad_gae(rewards, values, is_response, is_response, 0.75, 0.9)  # 0.75: exact in float32
    rows = zip(rewards.tolist(), values.tolist(), is_response.tolist(), strict=True)
    close(advantages, [literal.gae(*row, 0.75, 0.9) for row in rows])
    for one, other in zip(
        (advantages, targets), ntpo_gae(rewards, values, is_response, is_response, 0.75, 0.9), strict=True
    ):
        assert torch.equal(one, other)


def test_with_gamma_below_one_poad_and_ntpo_are_neither_gae_nor_each_other():
    batch, *_ = random_turns(0)
    plain = gae(batch[0].masked_fill(~batch[3], 0.0), *batch[1:3], 1.0, 0.95)[0]
    poad, ntpo = poad_gae(*batch, 0.95, 0.95)[0], ntpo_gae(*batch, 0.95, 0.95)[0]
    for one, other in ((plain, poad), (plain, ntpo), (poad, ntpo)):
        assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_token_of_one_action_lacks_one_minus_gamma_to_the_n_minus_j_under_ntpo(n):
    # λ = 1, V = 0, one action of n tokens and reward r: POAD gives r at every token, NTPO γⁿ⁻ʲ r.
    gamma, reward = 0.9, 2.0
    rewards, every, end = torch.zeros(1, n, dtype=F64), torch.ones(1, n) > 0, torch.arange(n)[None] == n - 1
    rewards[0, -1] = reward
    poad = poad_gae(rewards, torch.zeros_like(rewards), every, end, gamma, 1.0)[0][0]
    ntpo = ntpo_gae(rewards, torch.zeros_like(rewards), every, end, gamma, 1.0)[0][0]
    close(poad, [reward] * n)
    close(ntpo, [reward * gamma ** (n - j) for j in range(1, n + 1)])
    close((poad - ntpo) / reward, [1 - gamma ** (n - j) for j in range(1, n + 1)])


@pytest.mark.parametrize("seed", SEEDS)
def test_a_later_reward_is_discounted_once_an_action_by_poad_and_once_a_token_by_ntpo(seed):
    batch, actions, rewards = random_turns(seed)
    values = torch.zeros_like(batch[1])
    gamma, poad, ntpo = 0.8, [], []
    for row, earned in zip(actions, rewards, strict=True):
        for k in range(len(row)):
            for j in range(1, len(row[k]) + 1):
                tokens = [len(row[k]) - j + sum(map(len, row[k + 1 : m + 1])) for m in range(k, len(row))]
                poad.append(sum(gamma ** (m - k) * earned[m] for m in range(k, len(row))))
                ntpo.append(sum(gamma**t * reward for t, reward in zip(tokens, earned[k:], strict=True)))
    close(poad_gae(batch[0], values, *batch[2:], gamma, 1.0)[0][batch[2]], poad)
    close(ntpo_gae(batch[0], values, *batch[2:], gamma, 1.0)[0][batch[2]], ntpo)


@pytest.mark.parametrize("backup", [poad_gae, ntpo_gae])
def test_observation_tokens_between_turns_padding_row_order_and_other_rows_change_no_advantage(backup):
    batch, *_ = random_turns(3)
    advantages, targets = backup(*batch, 0.9, 0.8)
    rows, width = batch[1].shape
    fillers = (NAN, NAN, False, False)
    for at in (0, *(batch[3][0].nonzero().flatten() + 1).tolist(), width):  # before, behind the first row's turns, last
        kept = [t for t in range(width + 2) if t not in (at, at + 1)]
        longer = [torch.full((rows, width + 2), f, dtype=v.dtype) for f, v in zip(fillers, batch, strict=True)]
        for wide, narrow in zip(longer, batch, strict=True):
            wide[:, kept] = narrow
        longer_advantages, longer_targets = backup(*longer, 0.9, 0.8)
        assert torch.equal(longer_advantages[:, kept], advantages) and torch.equal(longer_targets[:, kept], targets)
        assert (longer_advantages[:, at : at + 2] == 0).all()
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    assert torch.equal(backup(*(v[order] for v in batch), 0.9, 0.8)[0], advantages[order])
    for i in range(rows):
        assert torch.equal(backup(*(v[i : i + 1] for v in batch), 0.9, 0.8)[0][0], advantages[i])


@pytest.mark.parametrize("backup", [poad_gae, ntpo_gae])
def test_a_reward_inside_an_action_or_at_an_observation_is_not_read(backup):
    batch, *_ = random_turns(1)
    advantages, targets = backup(*batch, 0.9, 0.8)
    for filler in (0.0, 5.0, -inf):
        again = backup(batch[0].masked_fill(~batch[3], filler), *batch[1:], 0.9, 0.8)
        assert torch.equal(again[0], advantages) and torch.equal(again[1], targets)


@pytest.mark.parametrize("backup", [poad_gae, ntpo_gae])
def test_advantages_and_targets_of_poad_and_ntpo_carry_no_gradient(backup):
    rewards, values = REWARDS.clone().requires_grad_(), VALUES.clone().requires_grad_()
    for result in backup(rewards, values, IS_RESPONSE, IS_TURN_END, 0.9, 0.8):
        assert not result.requires_grad


@pytest.mark.parametrize("backup", [poad_gae, ntpo_gae])
def test_no_reward_and_no_value_gives_no_advantage(backup):
    nothing = torch.zeros_like(VALUES)
    assert (backup(nothing, nothing, IS_RESPONSE, IS_TURN_END, 0.95, 0.95)[0] == 0).all()


@pytest.mark.parametrize("backup", [poad_gae, ntpo_gae])
def test_poad_and_ntpo_refuse_impossible_input_in_one_line_and_show_it(backup):
    for gamma, lam, shown in ((1.5, 0.9, "1.5"), (-0.25, 0.9, "-0.25"), (0.9, 1.75, "1.75"), (0.9, NAN, "nan")):
        with pytest.raises(ValueError, match=shown) as caught:
            backup(REWARDS, VALUES, IS_RESPONSE, IS_TURN_END, gamma, lam)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"\(1, 6\)"):
        backup(REWARDS, VALUES[:, :6], IS_RESPONSE, IS_TURN_END, 0.9, 0.9)


# V, its old value and its target; with ±0.1: outside and the clipped error larger, outside and smaller, inside.
CRITIC = tensor([0.5, 0.9, 0.25], dtype=F64)
OLD_CRITIC = tensor([0.2, 0.2, 0.2], dtype=F64)
TARGETS = tensor([1.0, 0.0, 1.0], dtype=F64)


def test_value_loss_by_hand():
    # ½ · 0.5² = 0.125, ½ · 0.9² = 0.405, ½ · 0.75² = 0.28125
    close(value_loss(CRITIC, OLD_CRITIC, TARGETS), [0.125, 0.405, 0.28125])
    # V within 0.1 of 0.2: 0.3, 0.3, 0.25; ½ · 0.7² = 0.245 > 0.125, ½ · 0.3² = 0.045 < 0.405, the same
    close(value_loss(CRITIC, OLD_CRITIC, TARGETS, clip=0.1), [0.245, 0.405, 0.28125])


@pytest.mark.parametrize("seed", SEEDS)
def test_value_loss_equals_the_loop(seed):
    values, old, targets = torch.randn(3, 4, 9, dtype=F64, generator=torch.Generator().manual_seed(seed))
    for clip in (0.0, 0.2, 1.0):
        tokens = zip(*(v.flatten().tolist() for v in (values, old, targets)), strict=True)
        expected = [literal.value_loss(*token, clip) for token in tokens]
        close(value_loss(values, old, targets, clip).flatten(), expected)


def test_a_value_clip_of_zero_or_wider_than_every_change_is_half_the_squared_error():
    half = (CRITIC - TARGETS).square() / 2
    close(value_loss(CRITIC, OLD_CRITIC, TARGETS, clip=0.0), half)
    close(value_loss(CRITIC, OLD_CRITIC, TARGETS, clip=0.75), half)
    close(value_loss(CRITIC, CRITIC, TARGETS, clip=0.01), half)  # before the first optimiser step
    assert (value_loss(CRITIC, OLD_CRITIC, TARGETS, clip=0.1) >= half - 1e-12).all()


def test_gradient_of_value_loss_is_the_error_and_zero_where_the_clipped_value_is_worse():
    values = CRITIC.clone().requires_grad_()
    value_loss(values, OLD_CRITIC, TARGETS, clip=0.1).sum().backward()
    assert values.grad[0] == 0
    close(values.grad, [0, 0.9, -0.75])
    assert torch.autograd.gradcheck(lambda v: value_loss(v, OLD_CRITIC, TARGETS, 0.1), values)
    assert torch.autograd.gradcheck(lambda v: value_loss(v, OLD_CRITIC, TARGETS), values)


@pytest.mark.parametrize("seed", SEEDS)
def test_gradient_of_value_loss_draws_towards_the_target_or_is_zero(seed):
    values, old, targets = torch.randn(3, 60, dtype=F64, generator=torch.Generator().manual_seed(seed))
    values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: value_loss(v, old, targets, 0.3), values)
    value_loss(values, old, targets, 0.3).sum().backward()
    near = (old + (values - old).clamp(-0.3, 0.3)).detach()
    stopped = ((values - old).abs() > 0.3) & ((near - targets).abs() > (values - targets).abs())
    assert 5 < stopped.sum() < 55 and (values.grad[stopped] == 0).all()
    assert (values.grad.sign() == (values - targets).sign())[~stopped].all()


def test_a_tokens_value_loss_knows_no_other_token():
    order = [2, 0, 1]
    expected = value_loss(CRITIC, OLD_CRITIC, TARGETS, 0.1)
    again = value_loss(CRITIC[order], OLD_CRITIC[order], TARGETS[order], 0.1)
    assert torch.equal(again, expected[order])
    filled = [torch.nn.functional.pad(v, (1, 1), value=NAN) for v in (CRITIC, OLD_CRITIC, TARGETS)]
    assert torch.equal(value_loss(*filled, 0.1)[1:4], expected)


# CARL. Two trees: 0 → 1, 2; 1 → 3, 4, 5; 2 → 6, and 7 → 8. What stands at inner states is not read.
PARENT = tensor([-1, 0, 0, 1, 1, 1, 2, -1, 7])
LEAVES = tensor([NAN, NAN, NAN, 1, 0, 0.2, -1, NAN, 3])


def random_forest(seed, states=25):
    """Three roots; every further state hangs below a state drawn from all before it."""
    rng = random.Random(seed)
    parent = [-1, -1, -1] + [rng.randrange(state) for state in range(3, states)]
    return parent, [rng.gauss(0, 1) for _ in range(states)]


def renumber(seed, parent):
    """Another numbering, in which parents still come first: `order[i]` is the old number of state i."""
    rng = random.Random(seed)
    order, waiting = [], [state for state, above in enumerate(parent) if above < 0]
    while waiting:
        state = waiting.pop(rng.randrange(len(waiting)))
        order.append(state)
        waiting += [child for child, above in enumerate(parent) if above == state]
    new = {old: i for i, old in enumerate(order)}
    return order, [new.get(parent[old], -1) for old in order]


def test_tree_values_are_means_of_children_and_not_of_leaves_by_hand():
    # V₁ = (1 + 0 + 0.2) / 3 = 0.4, V₂ = -1, V₀ = (0.4 - 1) / 2 = -0.3; the mean of its four leaves would be 0.05
    close(tree_values(PARENT, LEAVES), [-0.3, 0.4, -1, 1, 0, 0.2, -1, 3, 3])


def test_edge_advantages_and_update_set_by_hand():
    # 0.4 + 0.3, -1 + 0.3; 1 - 0.4, 0 - 0.4, 0.2 - 0.4; 6 and 8 are only children and get 0
    close(edge_advantages(PARENT, tree_values(PARENT, LEAVES)), [0, 0.7, -0.7, 0.6, -0.4, -0.2, 0, 0, 0])
    assert update_set(PARENT).nonzero().flatten().tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("seed", SEEDS)
def test_values_edges_and_update_set_of_a_forest_equal_the_loops(seed):
    parent, leaf_values = random_forest(seed)
    values = tree_values(tensor(parent), tensor(leaf_values))
    expected = literal.tree_values(parent, leaf_values)
    close(values, expected)
    close(edge_advantages(tensor(parent), values), literal.edge_advantages(parent, expected))
    assert update_set(tensor(parent)).tolist() == literal.update_set(parent)


@pytest.mark.parametrize("seed", SEEDS)
def test_another_numbering_of_the_states_permutes_the_results(seed):
    parent, leaf_values = random_forest(seed)
    order, renumbered = renumber(seed, parent)
    assert order != sorted(order)
    values = tree_values(tensor(parent), tensor(leaf_values))
    again = tree_values(tensor(renumbered), tensor(leaf_values)[order])
    close(again, values[order])
    close(edge_advantages(tensor(renumbered), again), edge_advantages(tensor(parent), values)[order])
    assert torch.equal(update_set(tensor(renumbered)), update_set(tensor(parent))[order])


def test_what_is_inside_the_update_set_sums_to_zero_at_every_fork_and_what_is_outside_is_zero():
    for seed in SEEDS:
        parent, leaf_values = random_forest(seed)
        edges = edge_advantages(tensor(parent), tree_values(tensor(parent), tensor(leaf_values)))
        trained = update_set(tensor(parent))
        assert trained.any() and (~trained).any() and (edges[~trained] == 0).all()
        for state in range(len(parent)):
            assert abs(edges[tensor(parent) == state].sum()) < 1e-5


def test_a_tree_without_forks_has_an_empty_update_set():
    for parent in ([-1], [-1, 0, 1, 2], [-1, 0, -1, 2, 1, 3]):
        assert not update_set(tensor(parent)).any()
        values = tree_values(tensor(parent), torch.arange(1.0, len(parent) + 1))
        assert (edge_advantages(tensor(parent), values) == 0).all()


def test_a_tree_that_forks_at_its_root_only_is_grpo_without_the_std():
    returns = tensor([0.3, 1.9, -0.4, 0.9], dtype=F64)  # four rollouts of two actions each
    parent = tensor([-1, 0, 0, 0, 0, 1, 2, 3, 4])
    edges = edge_advantages(parent, tree_values(parent, torch.cat([torch.zeros(5, dtype=F64), returns])))
    close(edges[1:5], group_advantages(returns, 4) * (returns.std() + 1e-6))
    assert update_set(parent).tolist() == [False] + [True] * 4 + [False] * 4


def test_the_advantages_along_a_path_sum_to_the_return_minus_the_roots_value():
    parent, leaf_values = random_forest(0)
    values = tree_values(tensor(parent), tensor(leaf_values))
    edges = edge_advantages(tensor(parent), values)
    for state in range(3, 25):
        total, root = 0.0, state
        while parent[root] >= 0:
            total, root = total + edges[root], parent[root]
        close(total, values[state] - values[root])


def test_another_tree_changes_nothing_in_this_one():
    parent = torch.cat([PARENT, tensor([-1, 9, 9])])
    values = tree_values(parent, torch.cat([LEAVES, tensor([NAN, 50.0, -20.0])]))
    assert torch.equal(values[:9], tree_values(PARENT, LEAVES))
    assert torch.equal(update_set(parent)[:9], update_set(PARENT))


def test_equal_returns_give_no_advantage_in_grpo_dapo_and_carl():
    for value in (0.0, 1.0, -0.75, 0.1, 10.9):
        returns = torch.full((8,), value)
        assert (group_advantages(returns, 4) == 0).all()
        untouched = returns + overlong_penalty(tensor([3, 9, 15, 1, 0, 4, 2, 7]), 20, 5)  # none is too long
        assert (group_advantages(untouched, 4) == 0).all()
        for seed in SEEDS:
            parent = tensor(random_forest(seed)[0])
            assert (edge_advantages(parent, tree_values(parent, torch.full((25,), value))) == 0).all()
    too_long = torch.ones(4) + overlong_penalty(tensor([3, 16, 15, 1]), 20, 5)
    assert group_advantages(too_long, 4)[1] < 0  # the length is part of DAPO's return


def test_criticality_by_hand():
    # State 0: H = (0.6 + 0.9 + 1.2) / 3 = 0.9, n = 3: 0.3. State 2: 0.8 / 1. State 3: (1 + 2) / 2 / 2 = 0.75.
    surprise, source = tensor([0.6, 1.0, 0.9, 0.8, 2.0, 1.2]), tensor([0, 3, 0, 2, 3, 0])
    close(criticality(surprise, source, 5), [0.3, -inf, 0.8, 0.75, -inf])


@pytest.mark.parametrize("seed", SEEDS)
def test_criticality_equals_the_loop_over_sampled_tokens_and_follows_the_numbering_of_states(seed):
    rng = random.Random(seed)
    actions = [(rng.randrange(7), [-rng.expovariate(1) for _ in range(rng.randint(1, 5))]) for _ in range(12)]
    surprise = tensor([-sum(logps) / len(logps) for _, logps in actions])
    source = tensor([state for state, _ in actions])
    scores = criticality(surprise, source, 8)  # state 7 is never sampled
    close(scores, literal.criticality(actions, 8))
    assert scores[7] == -inf
    generator = torch.Generator().manual_seed(seed)
    number, order = torch.randperm(8, generator=generator), torch.randperm(12, generator=generator)
    close(criticality(surprise[order], number[source[order]], 8)[number], scores)


def test_states_expanded_once_are_ranked_by_their_surprise_alone():
    surprise = tensor([0.4, 2.5, 0.9])
    assert torch.equal(criticality(surprise, torch.arange(3), 3), surprise)


def test_forking_a_state_again_makes_it_less_critical_until_a_surer_one_is_due():
    # always 0.9 nats a token at state 0 and 0.4 at state 1: 0.9, 0.45, 0.3 against 0.4
    forked = [0, 1]
    for _ in range(4):
        surprise = tensor([(0.9, 0.4)[state] for state in forked])
        forked.append(int(criticality(surprise, tensor(forked), 2).argmax()))
    assert forked[2:] == [0, 0, 1, 0]
