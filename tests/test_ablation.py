"""ablation.py and its flags: which signal, which tokens and which statistics the weights of Eq. (5) are made of."""

import pytest
import torch
from tiny import assert_same_run, config
from torch import tensor

import train
import viewer
from ablation import class_mean_weights, tag_mask, tag_tokens, weight_signal
from actfocus import policy_loss, token_weights
from config import Config
from energy import SIGNALS
from methods import sample
from policy import TokenScores, load_model
from rollout import Batch

pytest_plugins = ["tiny"]
SCORES = TokenScores(logp=tensor([[-1.0, -2.0]]), entropy=tensor([[0.5, 0.75]]), energy=tensor([[-9.0, -8.0]]))


@pytest.mark.parametrize("name, expected", [
    ("energy", [-9.0, -8.0]),
    ("entropy", [0.5, 0.75]),
    ("policy_nll", [1.25, 1.5]),  # -(-1.25), -(-1.5)
    ("logprob_shift", [-0.25, 0.5]),  # -1.25 + 1, -1.5 + 2
])
def test_the_four_signals(name, expected):
    assert weight_signal(name, SCORES, tensor([[-1.25, -1.5]])).tolist() == [expected]
    assert name in SIGNALS and len(SIGNALS) == 4


def test_an_unknown_signal_is_named():
    with pytest.raises(ValueError, match="'surprise': choose from energy, entropy"):
        weight_signal("surprise", SCORES, tensor([[0.0, 0.0]]))


@pytest.mark.parametrize("pieces, tags", [
    (["<think>", "hm", "</think>", "<answer>", "Up", "</answer>"], [1, 0, 1, 1, 0, 1]),
    ([" <thi", "nk>", "hm</", "think>", "\n", "<answer>", "Up", "</answer>"], [1, 1, 1, 1, 0, 1, 0, 1]),
    (["<think>", "<answer>", "Up", "</answer>", "</think>", "<answer>", "Up</", "answer>"], [1, 0, 0, 0, 1, 1, 0, 1]),
    (["<think>", "hm", "</think>", "<answer>", "Up"], [0, 0, 0, 0, 0]),  # no structure, no tags
    (["<think>", "hm", "</think>", "<answer>", "Up", "</answer>", "<think>"], [1, 0, 1, 1, 0, 1, 0]),  # and after it
    (["<think>", "", "é", "</think>", "<answer>", "</answer>"], [1, 0, 0, 1, 1, 1]),
])
def test_tags_are_those_of_the_structure_and_never_action_tokens(pieces, tags):
    assert tag_tokens(pieces).tolist() == [bool(tag) for tag in tags]


def step(tiny, **options):
    """The first iteration of a run and its batch."""
    settings = config(tiny, max_response_tokens=60, **options)
    state = train.build_state(settings)
    return settings, *train.iteration(settings, state, 0), state


def test_class_means_make_the_loss_the_mean_of_two_means():
    is_action = tensor([[0, 0, 0, 1, 0], [0, 1, 1, 0, 0]]).bool()
    is_reasoning = tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    weights = class_mean_weights(is_action, is_reasoning)
    # 3 tokens of each class and 6 in all: 6 / (2 · 3) = 1
    assert weights.tolist() == [[0, 1, 1, 1, 0], [0, 1, 1, 0, 1]]
    weights = class_mean_weights(is_action[:1], is_reasoning[:1])  # 1 and 2 of 3: 3 / 2 and 3 / 4
    assert weights.tolist() == [[0, 0.75, 0.75, 1.5, 0]]
    logp, advantages = tensor([[9.0, 1.0, 4.0, 2.0, 9.0]]), tensor([[9.0, 3.0, 5.0, 7.0, 9.0]])
    loss = policy_loss(logp, logp, advantages, weights)
    assert loss.item() == pytest.approx(-((3 + 5) / 2 + 7) / 2)
    assert class_mean_weights(is_action[:1], is_action[:1] & False).tolist() == [[0, 0, 0, 0.5, 0]]


def test_the_run_with_class_means_gives_each_class_half_of_the_weight(tiny):
    _, metrics, batch, _ = step(tiny, weights="class_mean")
    assert metrics["weight_share_action"] == pytest.approx(0.5) and (batch.weights > 0).equal(batch.is_response)


def test_by_default_the_signal_is_the_energy_and_the_weights_are_equation_5(tiny):
    settings, _, batch, _ = step(tiny)
    assert batch.signal is batch.energy and batch.is_tag is None
    assert (Config.signal, Config.tag_weight, Config.weight_stats) == ("energy", "alpha", "batch")
    assert batch.weights.equal(token_weights(batch.energy, batch.is_action, batch.is_reasoning, 0.1, 0.5))
    assert settings.alpha_beta == (0.1, 0.5)


def written_out(signal, scores, batch):
    """(19)-(22), by name."""
    return {"energy": scores.energy, "entropy": scores.entropy, "policy_nll": -batch.old_logp,
            "logprob_shift": batch.old_logp - scores.logp}[signal]


@pytest.mark.parametrize("signal", SIGNALS)
def test_the_weights_follow_the_chosen_signal(tiny, signal):
    settings, _, batch, state = step(tiny, signal=signal)
    scores = train.score_batch(state.reference, batch, settings)
    expected = written_out(signal, scores, batch)
    assert batch.weights.equal(token_weights(expected, batch.is_action, batch.is_reasoning))
    if signal != "logprob_shift":  # which is rounding only, while the policy is the reference
        assert batch.weights[batch.is_action].std() > 0.01


def test_tags_at_1_change_the_weights_of_tags_only(tiny):
    settings, metrics, batch, state = step(tiny, tag_weight="one")
    base = token_weights(batch.energy, batch.is_action, batch.is_reasoning)
    texts = [state.tokenizer.decode(token) for token in batch.tokens[batch.is_tag]]
    assert set(texts) == {"<think>", "</think>", "<answer>", "</answer>"} and len(texts) % 4 == 0
    assert (batch.weights[batch.is_tag] == 1).all() and (base[batch.is_tag] == 0.1).all()
    assert torch.where(batch.is_tag, base, batch.weights).equal(base)
    assert not (batch.is_tag & batch.is_action).any() and not (batch.is_tag & ~batch.is_response).any()
    assert metrics["weight_share_reasoning"] > step(tiny)[1]["weight_share_reasoning"]
    rows = sample(settings, train.build_state(settings), 0)
    assert tag_mask(settings.tag_weight, rows, state.tokenizer).equal(batch.is_tag)


def test_tags_at_1_are_no_change_to_uniform_weights(tiny):
    one, alpha = (step(tiny, weights="uniform", tag_weight=weight)[1] for weight in ("one", "alpha"))
    assert all(one[name] == alpha[name] for name in one if not name.startswith("seconds_"))


def test_statistics_of_a_mini_batch_are_those_of_its_rows(tiny):
    settings, _, batch, state = step(tiny, mini_batch_size=4, weight_stats="mini_batch")
    assert not batch.weights.equal(token_weights(batch.energy, batch.is_action, batch.is_reasoning))
    state = train.build_state(settings)
    sample(settings, state, 0)  # the generator is now where the update finds it
    for rows in torch.randperm(8, generator=state.generator).split(4):
        own = token_weights(batch.energy[rows], batch.is_action[rows], batch.is_reasoning[rows])
        assert batch.weights[rows].equal(own)


def test_one_mini_batch_a_step_makes_both_statistics_the_same(tiny):
    _, one, batch, _ = step(tiny, weight_stats="mini_batch")
    _, two, other, _ = step(tiny)
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    torch.testing.assert_close(batch.weights, other.weights)


@pytest.mark.parametrize("signal, tag_weight", [*((signal, "alpha") for signal in SIGNALS), ("energy", "one")])
def test_the_page_of_tokens_weighs_as_the_run_does(tiny, signal, tag_weight):
    settings = config(tiny, max_response_tokens=60, signal=signal, tag_weight=tag_weight)
    scene = viewer.stage(settings, tiny)
    batch = Batch.of(scene.rows)
    scores = train.score_batch(load_model(str(tiny)), batch, settings)
    expected = written_out(signal, scores, batch)
    weights = token_weights(expected, batch.is_action, batch.is_reasoning)
    if tag_weight == "one":
        weights = torch.where(tag_mask("one", scene.rows, scene.tokenizer), 1.0, weights)
    assert scene.batch.weights.equal(weights)
    plain = token_weights(scores.energy, batch.is_action, batch.is_reasoning)
    assert weights.equal(plain) == ((signal, tag_weight) == ("energy", "alpha"))


@pytest.mark.parametrize("name, wrong", [("signal", "surprise"), ("tag_weight", "2"), ("weight_stats", "epoch")])
def test_a_wrong_choice_is_one_line_and_code_2(tmp_path, capsys, name, wrong):
    assert train.main([f"--{name}", wrong, "--output_dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"--{name} {wrong}: choose from" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_with_all_three_resumes_bit_for_bit(tiny, tmp_path):
    flags = ["--signal", "logprob_shift", "--tag_weight", "one", "--weight_stats", "mini_batch"]
    arguments = ["--model", str(tiny), "--preset", "smoke", "--max_response_tokens", "24", "--mini_batch_size", "4"]
    for name, steps in (("whole", "2"), ("cut", "1")):
        target = ["--output_dir", str(tmp_path / name), "--max_steps", steps, "--eval_steps", "1"]
        assert train.main([*arguments, *flags, *target]) == 0
    assert train.main(["--resume_from_checkpoint", str(tmp_path / "cut"), "--max_steps", "2"]) == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
