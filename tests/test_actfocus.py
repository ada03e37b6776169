"""actfocus.py: golden, literal, limit, gradient and invariance tests of every equation, and the pitfalls.

What a test says of `graded.NAME` is also said of the exercises: ACTFOCUS_MODULE=my_answer pytest -k eq5
"""

import math
import random
import re

import graded
import literal
import pytest
import torch
from torch import tensor
from torch.testing import assert_close

import actfocus

NAN = float("nan")
SEEDS = range(5)


def close(actual, expected):
    assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), atol=1e-6, rtol=1e-6)


def ragged_batch(seed, rows=8):
    """Rows of prompt, response, observation, response, each of its own length; padding and prompts hold NaN."""
    rng = random.Random(seed)
    kinds = [
        "-" * rng.randint(1, 3)
        + "".join(rng.choices("ra", (3, 1), k=rng.randint(1, 7)))
        + "-" * rng.randint(0, 3)
        + "".join(rng.choices("ra", (1, 1), k=rng.randint(0, 5)))
        for _ in range(rows)
    ]
    width = max(map(len, kinds)) + 2
    is_action, is_reasoning = (tensor([[k == c for k in row.ljust(width)] for row in kinds]) for c in "ar")
    generator = torch.Generator().manual_seed(seed)
    is_response = is_action | is_reasoning

    def noise(scale):
        values = scale * torch.randn(rows, width, dtype=torch.float64, generator=generator)
        return values.masked_fill(~is_response, NAN)

    batch = dict(energy=noise(2) - 10, is_action=is_action, is_reasoning=is_reasoning)
    old_logp = noise(1)
    return batch, old_logp + noise(0.3), old_logp, noise(1), [len(row) for row in kinds]


def cut(padded, lengths):
    """(B, T) → lists of the rows' own lengths."""
    return [row[:length] for row, length in zip(padded.tolist(), lengths, strict=True)]


def test_tokens_across_a_tags_edge_are_action_tokens_and_a_lone_space_is_not():
    """One non-space character inside the answer makes an action token; tags and lone spaces are reasoning."""
    pieces = ["<think>", "go", " right", "</think>", "\n<", "answer", ">Right", " ", "||", " Up</", "answer>", "<eos>"]
    is_reasoning, is_action = graded.classify_tokens(pieces)
    assert is_action.nonzero().flatten().tolist() == [6, 8, 9]
    assert torch.equal(is_reasoning, ~is_action) and is_action.dtype == torch.bool


def test_an_answer_inside_the_thought_is_reasoning():
    """Where the answer stands is answer_span's business: it knows which one is executed."""
    pieces = ["<think>", "<answer>", "Up", "</answer>", "</think>", "<answer>", "Down", "</answer>"]
    assert graded.classify_tokens(pieces)[1].nonzero().flatten().tolist() == [6]


def test_a_response_without_the_structure_is_all_reasoning():
    """Without <think>…</think><answer>…</answer>, in this order and from the start, nothing is an action token."""
    for text in (
        "", "Up", "<answer>Up</answer>", "<think>a</think>Up", "<think>a</think><answer>Up",
        "<think>a<answer>Up</answer>", "<think>a</think> so <answer>Up</answer>", "<answer>Up</answer><think>a</think>",
        "I say <think>a</think><answer>Up</answer>", "<THINK>a</THINK><answer>Up</answer>",
    ):  # fmt: skip
        is_reasoning, is_action = graded.classify_tokens(list(text))
        assert is_reasoning.all() and not is_action.any() and len(is_action) == len(text), text
        assert actfocus.answer_span(text) is None, text


def test_text_after_the_answer_is_reasoning():
    """Only the answer that is executed counts; what follows it is reasoning, a second answer too."""
    pieces = ["<think></think>", "<answer>", "Up", "</answer>", "Down", "<answer>", "Left", "</answer>"]
    assert graded.classify_tokens(pieces)[1].nonzero().flatten().tolist() == [2]


def test_an_empty_answer_has_no_action_token():
    """White space alone inside the answer is no action token."""
    assert actfocus.answer_span("<think></think><answer></answer>") == (23, 23)
    assert not graded.classify_tokens(["<think></think><answer>", " ", "</answer>"])[1].any()


def test_the_executed_span_is_the_text_between_the_answer_tags():
    text = " <think>\na\n</think>\n <answer> Up || Left </answer> then"
    assert text[slice(*actfocus.answer_span(text))] == " Up || Left "


def test_the_pieces_of_a_split_character_share_its_class():
    """An empty piece has no character of its own: look at the one that stands next."""
    # é and → come in several byte tokens; the decoder gives "" until the character is complete.
    pieces = ["<think>", "", "é", "</think><answer>", "", "", "→", "", "</answer>", ""]
    assert graded.classify_tokens(pieces)[1].nonzero().flatten().tolist() == [4, 5, 6]


@pytest.mark.parametrize("seed", SEEDS)
def test_classes_equal_the_loop_over_characters(seed):
    """Token t is the characters from the sum of the lengths before it on; one of them in the answer is enough."""
    rng = random.Random(seed)
    words = ["<think>", "</think>", "<answer>", "</answer>", "Up", " ", "\n", "||", "é", "<", ">"]
    good = ["<think>", "</think>", "<answer>", "</answer>"]
    found = 0
    for _ in range(400):
        between = [rng.choices(words, (1, 0.2, 1, 0.2, 4, 4, 1, 4, 1, 1, 1), k=rng.randint(0, 3)) for _ in good]
        glue = "" if rng.random() < 0.5 else " "
        parts = [good[0], *between[0], good[1], glue, good[2], *between[1], good[3], *between[2]]
        text = "".join(parts if rng.random() < 0.8 else rng.sample(parts, len(parts)))
        edges = sorted(rng.choices(range(len(text) + 1), k=rng.randint(0, 20)))  # equal edges make empty pieces
        pieces = [text[a:b] for a, b in zip([0, *edges], [*edges, len(text)], strict=True)]
        is_reasoning, is_action = graded.classify_tokens(pieces)
        assert is_action.tolist() == literal.classify_tokens(pieces), pieces
        assert torch.equal(is_reasoning, ~is_action)
        found += is_action.any().item()
    assert 100 < found < 400


def test_eq5_weights_of_three_action_tokens_by_hand():
    """α at reasoning, 0 elsewhere, 1 + β·sigmoid(z) at actions; μ_E, σ_E of all the batch's actions, variance / N."""
    # Action energies 1, 1, 4: mean 2, deviations -1, -1, 2, variance (1 + 1 + 4) / 3 = 2 (not 6 / 2: population).
    # z = -1/√2 = -0.707107, and 2/√2 = 1.414214; sigmoid(-0.707107) = 1/(1 + 2.028115) = 0.330238,
    # sigmoid(1.414214) = 1/(1 + 0.243117) = 0.804430. With β = 0.5: 1 + 0.165119 and 1 + 0.402215.
    energy = tensor([[9.0, 1, 7, 4], [1, 5, 0, 0]])
    is_action = tensor([[False, True, False, True], [True, False, False, False]])
    is_reasoning = tensor([[False, False, True, False], [False, True, False, False]])
    weights = graded.token_weights(energy, is_action, is_reasoning, alpha=0.1, beta=0.5)
    close(weights, [[0, 1.165119, 0.1, 1.402215], [1.165119, 0.1, 0, 0]])


def test_eq5_epsilon_is_added_to_the_variance_under_the_root():
    """σ_E = √(variance + ε): ε stands under the root."""
    # As above with ε = 2: z = -1/√(2 + 2) = -0.5 and 2/2 = 1; sigmoid: 0.377541 and 0.731059. β = 2.
    all_three = torch.ones(1, 3, dtype=torch.bool)
    weights = graded.token_weights(tensor([[1.0, 1, 4]]), all_three, ~all_three, beta=2.0, eps=2.0)
    close(weights, [[1.755082, 1.755082, 2.462117]])


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_equal_the_loop_on_ragged_batches(seed):
    """NaN stands wherever there is no response: pick the action tokens' energies out first."""
    batch, *_, lengths = ragged_batch(seed)
    weights = graded.token_weights(**batch, alpha=0.25, beta=1.5, eps=1e-3)
    expected = literal.token_weights(*(cut(v, lengths) for v in batch.values()), 0.25, 1.5, 1e-3)
    for row, literal_row in zip(weights, expected, strict=True):
        close(row, literal_row + [0.0] * (len(row) - len(literal_row)))


def test_alpha_one_beta_zero_is_uniform_bit_for_bit():
    """α = 1 and β = 0: weight 1 at every response token, exactly."""
    batch, *_ = ragged_batch(0)
    is_response = batch["is_action"] | batch["is_reasoning"]
    weights = graded.token_weights(**batch, alpha=1.0, beta=0.0)
    assert torch.equal(weights, is_response.double())


def test_beta_zero_gives_every_action_token_one_bit_for_bit():
    """β = 0 takes the energy away: 1 at every action token, exactly."""
    batch, *_ = ragged_batch(1)
    assert (graded.token_weights(**batch, beta=0.0)[batch["is_action"]] == 1).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_weights_stay_in_their_ranges_and_rise_with_energy(seed):
    """Between 1 and 1 + β at actions, more for more energy; α at reasoning; 0 elsewhere."""
    batch, *_ = ragged_batch(seed)
    weights = graded.token_weights(**batch, alpha=0.1, beta=0.5)
    by_energy = weights[batch["is_action"]][batch["energy"][batch["is_action"]].argsort()]
    assert by_energy.min() > 1 and by_energy.max() < 1.5 and (by_energy.diff() >= 0).all()
    close(weights[batch["is_reasoning"]], torch.full((int(batch["is_reasoning"].sum()),), 0.1))
    assert (weights[~(batch["is_action"] | batch["is_reasoning"])] == 0).all()


def test_equal_energies_and_a_single_action_token_get_the_middle_weight():
    """sigmoid(0) = ½: the weight is 1 + β/2."""
    one = tensor([[True, False, False]])
    close(graded.token_weights(tensor([[-3.0, 8, NAN]]), one, ~one, beta=0.5)[0, 0], 1.25)
    every = torch.ones(1, 3, dtype=torch.bool)
    close(graded.token_weights(torch.full((1, 3), -7.0), every, ~every, beta=0.5), [[1.25] * 3])


def test_a_batch_without_action_tokens_weighs_alpha_everywhere():
    """No action token, no mean: it must not become NaN."""
    every = torch.ones(2, 3, dtype=torch.bool)
    close(graded.token_weights(torch.randn(2, 3), ~every, every, alpha=0.3), [[0.3] * 3] * 2)


def test_weights_carry_no_gradient_to_the_energies():
    """Weights are numbers, not a path for the gradient: detach the energies."""
    batch, *_ = ragged_batch(0)
    batch["energy"].requires_grad_()
    assert not graded.token_weights(**batch).requires_grad


def test_weights_do_not_depend_on_padding_on_row_order_or_on_what_stands_at_other_tokens():
    """Only energies of action tokens may be read; elsewhere they can be anything, NaN too."""
    batch, *_ = ragged_batch(2)
    weights = graded.token_weights(**batch)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert_close(graded.token_weights(**{name: v[order] for name, v in batch.items()}), weights[order])
    wider = {
        name: torch.nn.functional.pad(v, (0, 3), value=NAN if v.is_floating_point() else 0) for name, v in batch.items()
    }
    assert torch.equal(graded.token_weights(**wider)[:, :-3], weights)
    other = torch.where(batch["is_action"], batch["energy"], 1e9)
    assert torch.equal(graded.token_weights(**batch | {"energy": other}), weights)


def test_a_shift_of_all_energies_changes_no_weight():
    """Standardised: only differences of energies count."""
    batch, *_ = ragged_batch(3)
    for shift in (-1000.0, 0.37, 1000.0):
        shifted = batch | {"energy": batch["energy"] + shift}
        close(graded.token_weights(**shifted), graded.token_weights(**batch))


def test_token_weights_refuses_impossible_input_and_says_which():
    energy, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for options in ({"alpha": 1.5}, {"alpha": -0.25}, {"alpha": NAN}, {"beta": -0.75}, {"beta": NAN}):
        with pytest.raises(ValueError, match=str(*options.values())):
            actfocus.token_weights(energy, mask, ~mask, **options)
    with pytest.raises(ValueError, match="6 tokens"):
        actfocus.token_weights(energy, mask, mask)
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        actfocus.token_weights(energy, mask[:, :1], ~mask)
    with pytest.raises(ValueError, match="float32"):
        actfocus.token_weights(energy, energy, ~mask)


def test_eq6_one_token_of_every_clipping_case_by_hand():
    """The smaller of ρA and clip(ρ)A, times w, summed, divided by Σw (not by the number of tokens), negated."""
    # ρ = 1.5, A = 2:  min(3.0, 1.28 · 2)  = 2.56     w = 0.1 →  0.256
    # ρ = 0.5, A = 2:  min(1.0, 0.8 · 2)   = 1.0      w = 1.2 →  1.2
    # ρ = 1.5, A = -1: min(-1.5, -1.28)    = -1.5     w = 1.4 → -2.1
    # ρ = 0.5, A = -1: min(-0.5, -0.8)     = -0.8     w = 0.3 → -0.24
    # Σ = -0.884, Σw = 3, L = 0.884 / 3 = 0.294667
    old_logp = tensor([[-1.0, -2.0, -0.5, -3.0]])
    logp = old_logp + tensor([[1.5, 0.5, 1.5, 0.5]]).log()
    advantages, weights = tensor([[2.0, 2, -1, -1]]), tensor([[0.1, 1.2, 1.4, 0.3]])
    close(graded.policy_loss(logp, old_logp, advantages, weights), 0.294667)
    # With ε_low = 0.6 and ε_high = 1 nothing is clipped: 0.3 + 1.2 - 2.1 - 0.15 = -0.75, L = 0.25
    close(graded.policy_loss(logp, old_logp, advantages, weights, clip_low=0.6, clip_high=1.0), 0.25)


def test_eq7_gradient_is_the_reasoning_and_the_action_sum_by_hand():
    """The gradient goes through logp and nothing else: old log-probs, advantages and weights are numbers."""
    # ρ = 1, α = 0.25, Σw = 0.25 + 1.25 + 0.25 + 1.75 = 3.5; dL/dlogp = -w A / Σw:
    # reasoning: -0.25 · 2 / 3.5 = -0.142857, -0.25 · -1 / 3.5 = 0.0714286
    # action:    -1.25 · 2 / 3.5 = -0.714286, -1.75 · -1 / 3.5 = 0.5
    logp = tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    weights = tensor([[0.25, 1.25], [0.25, 1.75]])
    graded.policy_loss(logp, logp.detach(), tensor([2.0, -1.0]), weights).backward()
    close(logp.grad, [[-0.142857, -0.714286], [0.0714286, 0.5]])


def test_with_uniform_weights_the_loss_is_the_mean_of_ppos_over_response_tokens():
    """All weights 1: the mean over all response tokens of the batch, not a mean of the rows' means."""
    batch, logp, old_logp, advantages, _ = ragged_batch(0)
    is_response = batch["is_action"] | batch["is_reasoning"]
    weights = is_response.double()  # α = 1, β = 0, and Eq. (6) is Eq. (11)
    ratio = (logp - old_logp)[is_response].exp()
    unclipped, clipped = (r * advantages[is_response] for r in (ratio, ratio.clamp(0.8, 1.28)))
    close(graded.policy_loss(logp, old_logp, advantages, weights), -torch.min(unclipped, clipped).mean())


@pytest.mark.parametrize("seed", SEEDS)
def test_loss_equals_the_loop_on_ragged_batches(seed):
    """NaN stands wherever w = 0, and NaN · 0 is NaN: put 0 in place (torch.where) before the exp. One sum, one Σw."""
    batch, logp, old_logp, advantages, lengths = ragged_batch(seed)
    weights = actfocus.token_weights(**batch)
    rows = (cut(v, lengths) for v in (logp, old_logp, advantages, weights))
    close(graded.policy_loss(logp, old_logp, advantages, weights, 0.1, 0.3), literal.policy_loss(*rows, 0.1, 0.3))


def test_one_advantage_for_a_row_is_that_advantage_at_every_token():
    """Advantages of shape (B,) hold for all tokens of their row."""
    batch, logp, old_logp, *_ = ragged_batch(4)
    per_row, weights = torch.randn(8, dtype=torch.float64), actfocus.token_weights(**batch)
    broadcast = per_row[:, None].expand_as(logp)
    assert torch.equal(
        graded.policy_loss(logp, old_logp, per_row, weights), graded.policy_loss(logp, old_logp, broadcast, weights)
    )


def test_the_loss_is_zero_at_ratio_one_with_centred_advantages_and_its_gradient_is_not():
    """ρ = 1 is a number with a gradient: old_logp is detached, logp is not."""
    logp = tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    loss = graded.policy_loss(logp, logp.detach(), tensor([1.0, -1.0]), torch.ones(2, 2))
    loss.backward()
    assert loss.item() == 0 and (logp.grad[0] < 0).all() and (logp.grad[1] > 0).all()


def test_an_equal_advantage_moves_the_policy_where_the_tokens_of_one_position_weigh_differently():
    # in expectation over y ~ π: Σ π(y) w(y) A ∇ log π(y) = A w Σ ∇ π(y) = 0 where w is one number. After a move stand
    # another move, w = 1.25, and </answer>, a tag, w = α = 0.1: for z = (go on, close)
    # ∂/∂z₁ = A π₁ π₂ (w₁ - w₂), and the loss has -1 / Σ π w of it
    logits = tensor([[0.3, -0.2]], dtype=torch.double, requires_grad=True)
    logp = logits.log_softmax(-1)
    go_on, close = (probabilities := logp.detach().exp())[0].tolist()
    for advantage in (1.0, -1.0):
        for weights in ((1.0, 1.0), (1.25, 0.1)):
            expected = probabilities * tensor([weights], dtype=torch.double)
            loss = actfocus.policy_loss(logp, logp, torch.full_like(logp, advantage).detach(), expected)
            (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
            push = -advantage * go_on * close * (weights[0] - weights[1]) / expected.sum().item()
            assert_close(gradient, tensor([[push, -push]], dtype=torch.double))


def test_loss_gradient_passes_gradcheck_and_is_zero_where_clipped():
    """Where the clipped product is the smaller one it is a constant: no gradient."""
    batch, logp, old_logp, advantages, _ = ragged_batch(0)
    weights = actfocus.token_weights(**batch)
    logp, old_logp = torch.where(weights > 0, logp, 0.0), torch.where(weights > 0, old_logp, 0.0)
    logp.requires_grad_()

    def loss(logp):
        return graded.policy_loss(logp, old_logp, advantages, weights)

    assert torch.autograd.gradcheck(loss, logp)
    loss(logp).backward()
    ratio = (logp - old_logp).exp().detach()
    clipped = ((ratio > 1.28) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    used = weights > 0
    assert (clipped & used).sum() >= 3 and (logp.grad[clipped] == 0).all()
    assert (logp.grad.sign() == -advantages.sign())[used & ~clipped].all()


def test_nothing_at_prompt_observation_or_padding_reaches_value_or_gradient():
    """NaN · 0 is NaN: where w = 0 put 0 in place (torch.where) before the exp."""
    batch, logp, old_logp, advantages, _ = ragged_batch(1)
    weights = actfocus.token_weights(**batch)
    masked = ~(batch["is_action"] | batch["is_reasoning"])
    results = []
    for filler in (0.0, NAN, math.inf, -math.inf, 1e30):
        filled = logp.masked_fill(masked, filler).requires_grad_()
        loss = graded.policy_loss(filled, *(v.masked_fill(masked, filler) for v in (old_logp, advantages)), weights)
        loss.backward()
        assert loss.isfinite() and (filled.grad[masked] == 0).all() and (filled.grad[~masked] != 0).any()
        results.append((loss, filled.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_only_logp_gets_a_gradient():
    """Old log-probs, advantages and weights are numbers: detach them."""
    batch, *rest, _ = ragged_batch(1)
    inputs = [v.nan_to_num().requires_grad_() for v in (*rest, actfocus.token_weights(**batch))]
    graded.policy_loss(*inputs).backward()
    assert [v.grad is None for v in inputs] == [False, True, True, True]


def test_a_ratio_too_large_for_a_float_times_an_advantage_of_zero_is_zero():
    """∞ · 0 is NaN: exp of more than 88 is infinite in float32, so cap the exponent far beyond the clip range."""
    logp = tensor([[0.0, -1.0]], requires_grad=True)
    loss = graded.policy_loss(logp, tensor([[-100.0, -1.0]]), tensor([[0.0, 2.0]]), torch.ones(1, 2))
    loss.backward()
    close(loss, -1.0)  # -(0 + 1 · 2) / 2
    close(logp.grad, [[0, -1.0]])


def test_no_weight_at_all_gives_zero_with_gradient_zero():
    """0 / 0: what if Σw is 0?"""
    logp = torch.full((2, 3), -1.0, requires_grad=True)
    loss = graded.policy_loss(logp, logp.detach(), torch.ones(2), torch.zeros(2, 3))
    loss.backward()
    assert loss.item() == 0 and (logp.grad == 0).all()


def test_loss_does_not_depend_on_padding_row_order_or_the_scale_of_the_weights():
    """One sum over all tokens over one sum of all weights: nothing is averaged row by row."""
    batch, logp, old_logp, advantages, _ = ragged_batch(2)
    inputs = [logp, old_logp, advantages, actfocus.token_weights(**batch)]
    loss = graded.policy_loss(*inputs)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    close(graded.policy_loss(*(v[order] for v in inputs)), loss)
    fillers = (NAN, NAN, NAN, 0.0)
    wider = [torch.nn.functional.pad(v, (0, 4), value=f) for v, f in zip(inputs, fillers, strict=True)]
    close(graded.policy_loss(*wider), loss)
    close(graded.policy_loss(*inputs[:3], 7 * inputs[3]), loss)  # divided by Σw: weights move, they don't rescale


def test_one_batch_of_eight_equals_eight_micro_batches_of_one():
    """total_weight, where it is given, stands in the denominator, so that parts of a batch add up to the whole."""
    batch, logp, old_logp, advantages, _ = ragged_batch(3)
    weights = actfocus.token_weights(**batch)
    whole, parts = logp.clone().requires_grad_(), logp.clone().requires_grad_()
    loss = graded.policy_loss(whole, old_logp, advantages, weights)
    loss.backward()
    total = weights.sum().item()

    def row_loss(i, total_weight):
        row = slice(i, i + 1)
        return graded.policy_loss(parts[row], old_logp[row], advantages[row], weights[row], total_weight=total_weight)

    accumulated = sum(row_loss(i, total) for i in range(8))
    accumulated.backward()
    close(accumulated, loss)
    close(parts.grad, whole.grad)
    mean_of_means = sum(row_loss(i, None) for i in range(8)) / 8
    assert abs(mean_of_means - loss) > 1e-3  # the mistake that total_weight is there to prevent


def test_policy_loss_refuses_impossible_input_and_says_which():
    logp, weights = torch.zeros(2, 3), torch.ones(2, 3)
    for options in ({"clip_low": 1.5}, {"clip_low": -0.25}, {"clip_high": -0.75}, {"clip_high": NAN}):
        with pytest.raises(ValueError, match=str(*options.values())):
            actfocus.policy_loss(logp, logp, logp, weights, **options)
    for bad in (logp[:1], logp[:, :2]):
        with pytest.raises(ValueError, match=rf"\({bad.shape[0]}, {bad.shape[1]}\)"):
            actfocus.policy_loss(logp, bad, logp, weights)
        with pytest.raises(ValueError, match=rf"\({bad.shape[0]}, {bad.shape[1]}\)"):
            actfocus.policy_loss(logp, logp, bad, weights)


def test_policy_loss_refuses_one_advantage_a_row_for_another_number_of_rows_and_shows_it():
    logp = torch.zeros(2, 3)
    for number in (1, 3):
        with pytest.raises(ValueError, match=rf"\({number},\)"):
            actfocus.policy_loss(logp, logp, torch.ones(number), torch.ones(2, 3))


def test_policy_loss_refuses_an_impossible_weight_and_shows_it():
    logp = torch.zeros(2, 3)
    for value in (-0.25, NAN, math.inf):
        weights = torch.ones(2, 3)
        weights[1, 2] = value
        with pytest.raises(ValueError, match=str(value)):
            actfocus.policy_loss(logp, logp, logp, weights)


def test_eq3_advantages_of_a_group_by_hand():
    """The group's std is divided by G - 1, and ε is added behind the root."""
    # 1, 0, 0, 3: mean 1, deviations 0, -1, -1, 2, variance 6 / (4 - 1) = 2, std 1.414214.
    # ε = 1: -1 / 2.414214 = -0.414214 and 2 / 2.414214 = 0.828427; ε outside the root.
    returns = tensor([1.0, 0, 0, 3])
    close(graded.group_advantages(returns, 4), [0, -0.707106, -0.707106, 1.414213])
    close(graded.group_advantages(returns, 4, eps=1.0), [0, -0.414214, -0.414214, 0.828427])


@pytest.mark.parametrize("seed", SEEDS)
def test_group_advantages_equal_the_loop(seed):
    """Mean and std are those of the group, not of the batch; a group of one gets 0."""
    returns = torch.randint(-2, 3, (12,), generator=torch.Generator().manual_seed(seed)).double() / 10
    for group_size in (1, 2, 3, 6):
        expected = literal.group_advantages(returns.tolist(), group_size, 1e-6)
        close(graded.group_advantages(returns, group_size), expected)


def test_a_group_of_equal_returns_and_a_group_of_one_get_exactly_zero():
    """Compare the returns themselves: a std that should be 0 may be 1e-8, and that of one sample is NaN."""
    # The mean of seven times 0.1 is off by one bit in float32: std is not 0, and A would be -0.007.
    for value in (0.0, 0.1, 1 / 3, -0.7, 10.9, 1e8):
        for size in (1, 2, 3, 7, 16):
            assert (graded.group_advantages(torch.full((size,), value), size) == 0).all()
            assert (graded.group_advantages(torch.full((3 * size,), value), size) == 0).all()
    assert (graded.group_advantages(tensor([5.0, -3.0, 0.5]), 1) == 0).all()


def test_a_small_spread_is_a_spread_by_hand():
    """Only returns that are exactly equal give 0, not those of a small std."""
    # Mean 0.50125, deviations -0.00125 and 0.00375, variance (3 · 0.00125² + 0.00375²) / 3 = 0.0025².
    # -0.00125 / 0.002501 = -0.4998, 0.00375 / 0.002501 = 1.4994
    advantages = graded.group_advantages(tensor([0.5, 0.505, 0.5, 0.5], dtype=torch.float64), 4)
    assert_close(advantages, tensor([-0.4998, 1.4994, -0.4998, -0.4998], dtype=torch.float64), atol=1e-4, rtol=0)


def test_other_groups_change_nothing():
    """Mean and std are those of the group, not of the batch."""
    returns = torch.randn(12, generator=torch.Generator().manual_seed(0))
    advantages = graded.group_advantages(returns, 4)
    changed = torch.cat([100 * returns[:4] + 7, returns[4:8], tensor([NAN, 0.0, 1.0, 2.0])])
    assert torch.equal(graded.group_advantages(changed, 4)[4:8], advantages[4:8])


def test_group_advantages_follow_the_rows_and_ignore_shift_and_scale():
    """Every row keeps its place; a mean taken off and a std divided by, nothing else."""
    returns = tensor([0.3, 1.9, -0.4, 0.9], dtype=torch.float64)
    advantages = graded.group_advantages(returns, 4)
    order = [2, 0, 3, 1]
    close(graded.group_advantages(returns[order], 4), advantages[order])
    close(graded.group_advantages(returns + 50, 4), advantages)
    assert_close(graded.group_advantages(10 * returns, 4), advantages, atol=1e-5, rtol=1e-5)
    close(advantages.sum(), 0.0)
    assert (advantages.argsort() == returns.argsort()).all()


def test_group_advantages_pass_gradcheck():
    returns = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(lambda r: actfocus.group_advantages(r, 3), returns)


def test_group_advantages_refuse_what_is_not_whole_groups_and_show_it():
    for shape, size in (((5,), 2), ((4,), 0), ((4,), -2), ((2, 4), 4)):
        with pytest.raises(ValueError, match=f"{re.escape(str(shape))}.* {size}"):
            actfocus.group_advantages(torch.zeros(shape), size)


def test_eq12_gae_over_an_observation_by_hand():
    """From right to left; next means the next response token, and after the last one V and A are 0."""
    # Response tokens at 0, 1, 3; γ = 0.5, λ = 0.8, γλ = 0.4; the observation at 2 and the padding at 4 hold NaN.
    # δ₃ = 1 - 0.6 = 0.4                 A₃ = 0.4
    # δ₁ = 0 + 0.5 · 0.6 - 0.4 = -0.1    A₁ = -0.1 + 0.4 · 0.4 = 0.06
    # δ₀ = 0.5 + 0.5 · 0.4 - 0.2 = 0.5   A₀ = 0.5 + 0.4 · 0.06 = 0.524
    rewards = tensor([[0.5, 0, NAN, 1, NAN]])
    values = tensor([[0.2, 0.4, NAN, 0.6, NAN]])
    is_response = tensor([[True, True, False, True, False]])
    advantages, targets = graded.gae(rewards, values, is_response, gamma=0.5, lam=0.8)
    close(advantages, [[0.524, 0.06, 0, 0.4, 0]])
    close(targets, [[0.724, 0.46, 0, 1.0, 0]])


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_equals_the_double_sum_on_ragged_batches(seed):
    """δ has γ alone, what is carried γλ; every row for itself; NaN stands outside the response."""
    batch, rewards, values, *_ = ragged_batch(seed)
    is_response = batch["is_action"] | batch["is_reasoning"]
    for gamma, lam in ((1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 1.0)):
        advantages, targets = graded.gae(rewards, values, is_response, gamma, lam)
        rows = (rewards.tolist(), values.tolist(), is_response.tolist())
        close(advantages, [literal.gae(*row, gamma, lam) for row in zip(*rows, strict=True)])
        close(targets, torch.where(is_response, advantages + values, 0.0))


def test_gamma_and_lambda_one_is_return_to_come_minus_value():
    """γ = λ = 1: R(τ) reaches every response token whole, so A = R - V and the target is R."""
    batch, _, values, *_ = ragged_batch(0)
    is_response = batch["is_action"] | batch["is_reasoning"]
    returns = torch.arange(8.0, dtype=torch.float64)
    rewards = torch.zeros_like(values)
    for i in range(8):
        rewards[i, is_response[i].nonzero()[-1]] = returns[i]  # R(τ) on the last response token
    advantages, targets = graded.gae(rewards, values, is_response)
    close(advantages, torch.where(is_response, returns[:, None] - values, 0.0))
    close(targets, torch.where(is_response, returns[:, None].expand_as(values), 0.0))


def test_inserting_observation_tokens_changes_no_advantage():
    """What is carried from token to token must pass an observation unchanged, neither set to 0 nor discounted."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 6, generator=generator)
    every = torch.ones(3, 6, dtype=torch.bool)
    advantages, targets = graded.gae(rewards, values, every, 0.9, 0.8)
    for at in range(7):  # before, between and behind the response tokens
        kept = [t for t in range(8) if t not in (at, at + 1)]
        longer = [torch.full((3, 8), NAN) for _ in range(2)] + [torch.zeros(3, 8, dtype=torch.bool)]
        for wide, narrow in zip(longer, (rewards, values, every), strict=True):
            wide[:, kept] = narrow
        longer_advantages, longer_targets = graded.gae(*longer, 0.9, 0.8)
        assert torch.equal(longer_advantages[:, kept], advantages) and torch.equal(longer_targets[:, kept], targets)
        assert (longer_advantages[:, at : at + 2] == 0).all() and (longer_targets[:, at : at + 2] == 0).all()


def test_gae_ignores_other_rows():
    """V_next and A_next are carried along a row, never into another one."""
    batch, rewards, values, *_ = ragged_batch(2)
    is_response = batch["is_action"] | batch["is_reasoning"]
    advantages, _ = graded.gae(rewards, values, is_response, 0.9, 0.8)
    alone, _ = graded.gae(rewards[5:6], values[5:6], is_response[5:6], 0.9, 0.8)
    assert torch.equal(alone[0], advantages[5])


def test_gae_gives_no_gradient_to_the_critic():
    """Values are numbers here: detach them."""
    batch, rewards, values, *_ = ragged_batch(2)
    results = graded.gae(rewards, values.requires_grad_(), batch["is_action"] | batch["is_reasoning"], 0.9, 0.8)
    assert not any(result.requires_grad for result in results)


def test_gae_of_a_row_without_a_response_is_zero():
    """Outside the response the result is 0, whatever stands there."""
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    for result in graded.gae(torch.full((1, 3), NAN), torch.full((1, 3), NAN), nothing):
        assert torch.equal(result, torch.zeros(1, 3))


def test_gae_with_a_discount_of_its_own_after_each_token_by_hand():
    # Response tokens at 0, 2, 3; γ = 0.5, 1, 0.25 after them, λ = 0.8; the γ of the observation at 1 is not read.
    # δ₃ = 1 - 0.6 = 0.4 (nothing follows, so 0.25 has no effect)   A₃ = 0.4
    # δ₂ = 0 + 1 · 0.6 - 0.4 = 0.2                                  A₂ = 0.2 + 1 · 0.8 · 0.4 = 0.52
    # δ₀ = 2 + 0.5 · 0.4 - 0.2 = 2                                  A₀ = 2 + 0.5 · 0.8 · 0.52 = 2.208
    rewards, values = tensor([[2.0, NAN, 0, 1]]), tensor([[0.2, NAN, 0.4, 0.6]])
    is_response = tensor([[True, False, True, True]])
    for unread in (0.0, 0.9):
        gamma = tensor([[0.5, unread, 1.0, 0.25]])
        advantages, targets = actfocus.gae(rewards, values, is_response, gamma, lam=0.8)
        close(advantages, [[2.208, 0, 0.52, 0.4]])
        close(targets, [[2.408, 0, 0.92, 1.0]])


@pytest.mark.parametrize("seed", SEEDS)
def test_gae_with_discounts_equals_the_double_sum_on_ragged_batches(seed):
    batch, rewards, values, *_ = ragged_batch(seed)
    is_response = batch["is_action"] | batch["is_reasoning"]
    gamma = torch.rand(values.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for lam in (0.0, 0.7, 1.0):
        advantages, targets = actfocus.gae(rewards, values, is_response, gamma, lam)
        rows = zip(*(v.tolist() for v in (rewards, values, is_response, gamma)), strict=True)
        close(advantages, [literal.gae_with_discounts(*row, lam) for row in rows])
        close(targets, torch.where(is_response, advantages + values, 0.0))
        assert not advantages.requires_grad


def test_the_same_discount_after_every_token_is_ordinary_gae():
    batch, rewards, values, *_ = ragged_batch(3)
    is_response = batch["is_action"] | batch["is_reasoning"]
    for gamma in (0.0, 0.9, 1.0):
        everywhere = torch.full_like(values, gamma)
        for one, other in zip(
            actfocus.gae(rewards, values, is_response, everywhere, 0.8),
            actfocus.gae(rewards, values, is_response, gamma, 0.8),
            strict=True,
        ):
            assert torch.equal(one, other)


def test_a_discount_of_zero_after_a_token_hides_all_that_follows():
    rewards, values = torch.randn(2, 1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    every = torch.ones(1, 6, dtype=torch.bool)
    gamma = tensor([[0.9, 0.8, 0.0, 0.7, 0.6, 0.5]], dtype=torch.float64)
    advantages, _ = actfocus.gae(rewards, values, every, gamma, 0.95)
    for part in (slice(0, 3), slice(3, 6)):
        alone, _ = actfocus.gae(*(v[:, part] for v in (rewards, values, every, gamma)), 0.95)
        assert torch.equal(alone, advantages[:, part])


def test_gae_refuses_one_impossible_discount_among_many_and_shows_it():
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for value in (1.5, -0.25, NAN):
        gamma = torch.full((2, 3), 0.5)
        gamma[1, 2] = value
        with pytest.raises(ValueError, match=str(value)):
            actfocus.gae(values, values, mask, gamma)


def test_gae_refuses_impossible_input_and_says_which():
    values, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    for options in ({"gamma": 1.5}, {"gamma": -0.25}, {"lam": 1.75}, {"lam": NAN}):
        with pytest.raises(ValueError, match=str(*options.values())):
            actfocus.gae(values, values, mask, **options)
    with pytest.raises(ValueError, match=r"\(2, 1\)"):
        actfocus.gae(values[:, :1], values, mask)
    with pytest.raises(ValueError, match=r"\(3,\)"):
        actfocus.gae(*[v[0] for v in (values, values, mask)])


def test_whitened_advantages_by_hand():
    # 1, 1, 4 in the mask: mean 2, population variance 2, z = -0.707107, -0.707107, 1.414214. The 50 is outside.
    mask = tensor([[True, False], [True, True]])
    close(actfocus.whiten(tensor([[1.0, 50], [1, 4]]), mask), [[-0.707107, 0], [-0.707107, 1.414214]])


@pytest.mark.parametrize("seed", SEEDS)
def test_whiten_equals_the_loop_on_ragged_batches(seed):
    batch, *_, advantages, _ = ragged_batch(seed)
    mask = batch["is_action"] | batch["is_reasoning"]
    whitened = actfocus.whiten(advantages, mask, eps=0.1)
    close(whitened[mask], literal.whiten(advantages[mask].tolist(), 0.1))
    assert (whitened[~mask] == 0).all()


def test_whitening_gives_mean_zero_and_variance_one_and_is_already_done_the_second_time():
    batch, *_, advantages, _ = ragged_batch(0)
    mask = batch["is_action"] | batch["is_reasoning"]
    whitened = actfocus.whiten(100 * advantages + 3, mask)
    close(whitened[mask].mean(), 0.0)
    close(whitened[mask].var(correction=0), 1.0)
    close(actfocus.whiten(whitened, mask), whitened)


def test_whitening_one_token_or_equal_tokens_gives_zero_and_an_empty_mask_nothing():
    advantages = tensor([[0.3, NAN], [0.3, NAN]])
    for mask in (tensor([[True, False], [False, False]]), tensor([[True, False], [True, False]]), advantages > 9):
        assert torch.equal(actfocus.whiten(advantages, mask), torch.zeros(2, 2))


def test_whiten_passes_gradcheck_and_nothing_outside_the_mask_matters():
    batch, *_, advantages, _ = ragged_batch(1)
    mask = batch["is_action"] | batch["is_reasoning"]
    assert torch.equal(actfocus.whiten(advantages, mask), actfocus.whiten(advantages.masked_fill(~mask, 9.0), mask))
    order = torch.arange(7, -1, -1)
    close(actfocus.whiten(advantages[order], mask[order]), actfocus.whiten(advantages, mask)[order])
    small = advantages[:2].masked_fill(~mask[:2], 9.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: actfocus.whiten(a, mask[:2]), small)
