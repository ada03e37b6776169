"""rollout.py: the ids trained are the ids sampled, the rollout's numbers are the training pass's, nothing after
</answer> is executed, and the cache's slots never mix rows up."""

from types import SimpleNamespace

import pytest
import torch
from tiny import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import rollout as module
from actfocus import policy_loss
from contrib.responses import response_classes
from envs import Episode, make_env
from policy import TINY, load_model, load_tokenizer, score_tokens
from rollout import Batch, Engine, Trajectory, load_policy, rollout, token_pieces

pytest_plugins = ["tiny"]

WORDS = ["<|end|>", "<think>", "</think>", "<answer>", "</answer>", "hm", "Up", "Down", "go", "Reward:"]
END, THINK, UNTHINK, ANSWER, UNANSWER, HM, UP, DOWN, GO, REWARD = range(10)
TURN = {GO: THINK, THINK: HM, HM: UNTHINK, UNTHINK: ANSWER, ANSWER: UP, UP: UNANSWER}
RESPONSE = [THINK, HM, UNTHINK, ANSWER, UP, UNANSWER]


def ten_words(template=None, eos="<|end|>"):
    """A tokenizer whose end-of-turn token is its padding token, and the 0 that tensors are padded with."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="go"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<|end|>",
                                   chat_template=template)


class Chain(nn.Module):
    """A model whose logits follow from the last token alone."""

    device = torch.device("cpu")

    def __init__(self, following, size=10):
        super().__init__()
        logits = torch.zeros(size, size)
        for token, after in following.items():
            if isinstance(after, int):
                logits[token, after] = 100.0
            else:
                logits[token] = after
        self.table, self.base_model = nn.Parameter(logits), self.forward

    def forward(self, input_ids, past_key_values=None, **_):
        if past_key_values is not None:
            nothing = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)  # (R, heads, C, head width)
            past_key_values.update(nothing, nothing, 0)
        return SimpleNamespace(last_hidden_state=self.table[input_ids])

    def get_output_embeddings(self):
        return nn.Identity()


class Game:
    """An episode that remembers the answers it was given and replies what it was told to."""

    seed = 0

    def __init__(self, *replies, prompt="go", return_=1.0):
        self.replies, self.prompt, self.return_, self.answers, self.rewards = list(replies), prompt, return_, [], []

    def system(self):
        return "go"

    def user(self):
        return self.prompt

    def act(self, answer):
        self.answers.append(answer)
        self.rewards.append(float(len(self.answers)))  # turn k earns k + 1
        return self.replies.pop(0) if self.replies else None


def play(model, episodes, tokenizer=None, seed=0, **options):
    return rollout(model, tokenizer or ten_words(), episodes, torch.Generator().manual_seed(seed), **options)


def lake(levels=3, rollouts=4, first=0, style="brief"):
    return [Episode(make_env("frozenlake"), first + level, replica, style)
            for level in range(levels) for replica in range(rollouts)]


def gap(model, rows, temperature):
    """Largest difference of any token's log-prob between the rollout and a forward pass without a cache."""
    batch = Batch.of(rows)
    logp = score_tokens(model, batch.tokens, batch.is_response, temperature).logp
    return (logp - batch.old_logp).abs().max().item()


SHAPE = {"vocab_size": 50, "initializer_range": 0.3}
LLAMAS = {**SHAPE, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
          "num_key_value_heads": 2}
GPTS = {**SHAPE, "n_embd": 32, "n_layer": 2, "n_head": 2}


@pytest.mark.parametrize("config, why", [
    (Qwen2Config(**LLAMAS), None), (MistralConfig(**LLAMAS), None), (GPT2Config(**GPTS), None),
    (GPTJConfig(**GPTS, rotary_dim=8), "it does not follow the rollouts' masks or positions"),  # True is 1, False 0
    (BloomConfig(**SHAPE, hidden_size=32, n_layer=2, n_head=2), "rollouts fail with it"),
    (MambaConfig(**SHAPE, hidden_size=32, num_hidden_layers=2, state_size=4), "rollouts fail with it"),
], ids=lambda given: getattr(given, "model_type", ""))
def test_a_model_that_an_engine_cannot_drive_is_refused(config, why, tmp_path):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    if why is None:
        load_policy(str(tmp_path))
        return
    with pytest.raises(ValueError, match=why) as caught:
        load_policy(str(tmp_path))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_is_1_in_the_first_pass(tiny, temperature):
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    rows = play(model, lake(), tokenizer, temperature=temperature, max_response_tokens=40)
    assert len({len(row.spans) for row in rows}) > 1 and len({len(row.tokens) for row in rows}) > 4  # a ragged batch
    assert gap(model, rows, temperature) < 1e-4
    assert gap(model, rows, 2 * temperature) > 0.01  # and the comparison can fail


def test_the_ratio_is_1_with_learned_positions():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=256, n_embd=32, n_layer=2, n_head=2)).eval()
    model.transformer.wpe.weight.data.normal_()  # as large as what is read: a wrong position would show
    episodes = [Game(*["go " * (3 + (5 * i + j) % 7) for j in range(i % 4)], prompt="go " * (1 + i % 3))
                for i in range(12)]
    rows = play(model, episodes, max_response_tokens=12, max_context=256)
    assert {len(row.spans) for row in rows} == {1, 2, 3, 4}
    assert gap(model, rows, 1.0) < 1e-4


def test_the_ratio_is_1_with_fewer_key_heads_than_query_heads():
    model = llama(10, num_key_value_heads=1)
    rows = play(model, [Game("go go", prompt="go " * (1 + i)) for i in range(5)], max_response_tokens=9)
    assert gap(model, rows, 1.0) < 1e-4


def test_memory_the_cache_has_not_written_reaches_no_row(tiny, monkeypatch):
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    clean = play(model, lake(2, 3), tokenizer, max_response_tokens=30)
    new_full = torch.Tensor.new_full
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda tensor, *size: new_full(tensor, size, float("nan")))
    dirty = play(model, lake(2, 3), tokenizer, max_response_tokens=30)
    assert [(row.tokens, row.logp) for row in dirty] == [(row.tokens, row.logp) for row in clean]


def test_the_ids_trained_are_the_ids_sampled(tiny, monkeypatch):
    model, tokenizer, sampled = load_model(str(tiny)), load_tokenizer(str(tiny)), {}
    write = Trajectory.write

    def spy(row, token, *numbers):
        sampled.setdefault(id(row), []).append(token)
        write(row, token, *numbers)

    monkeypatch.setattr(Trajectory, "write", spy)
    rows = play(model, lake(), tokenizer, temperature=1.5, max_response_tokens=40)
    batch = Batch.of(rows)
    assert [batch.tokens[b][batch.is_response[b]].tolist() for b in range(len(rows))] == [
        sampled[id(row)] for row in rows
    ]


def test_classes_made_of_ids_and_a_mask_alone_are_those_of_the_rollout(tiny):
    tokenizer = load_tokenizer(str(tiny))
    batch = Batch.of(play(load_model(str(tiny)), lake(), tokenizer))
    is_reasoning, is_action = response_classes(tokenizer, batch.tokens, batch.is_response)
    assert is_action.equal(batch.is_action) and is_reasoning.equal(batch.is_reasoning) and is_action.any()


def test_ids_survive_where_decoding_and_encoding_again_would_give_others():
    tokenizer = load_tokenizer(str(TINY))
    names = ["<think>", "</think>", "<answer>", "D", "o", "w", "n", "</answer>"]
    wanted = tokenizer.convert_tokens_to_ids(names)
    (newline,) = tokenizer.encode("\n")
    chain = dict(zip([newline, *wanted], wanted, strict=False))
    (row,) = play(Chain(chain, len(tokenizer)), [Game()], tokenizer)
    start, end = row.spans[0]
    assert row.tokens[start:end] == wanted and row.episode.answers == ["Down"]
    again = tokenizer.encode(tokenizer.decode(wanted), add_special_tokens=False)
    assert again != wanted and len(again) < len(wanted)
    assert row.is_action[start:end] == [name in "Down" for name in names]


def test_generation_stops_at_the_closing_answer_and_what_would_follow_is_never_executed():
    (row,) = play(Chain(TURN | {UNANSWER: ANSWER}), [Game("Reward: go", "go")])
    assert row.episode.answers == [" Up "] * 3
    prompt, reply, last = [GO, GO], [REWARD, GO], [GO]
    assert row.tokens == [*prompt, *RESPONSE, *reply, *RESPONSE, *last, *RESPONSE]
    assert row.is_response == [0] * 2 + [1] * 6 + [0] * 2 + [1] * 6 + [0] + [1] * 6
    assert row.spans == [(2, 8), (10, 16), (17, 23)]
    assert [t for t, action in enumerate(row.is_action) if action] == [6, 14, 21]
    outside = [row.logp[t] for t in range(23) if not row.is_response[t]]
    assert outside == [0] * 5 and len(row.logp) == len(row.entropy) == len(row.score_norm) == 23


def test_text_behind_the_closing_answer_in_the_same_token_is_not_executed():
    tokenizer = ten_words()
    tokenizer.backend_tokenizer.add_tokens(["</answer><answer>Down</answer>"])
    (row,) = play(Chain(TURN | {UP: 10}, 11), [Game()], tokenizer)
    assert row.tokens[-1] == 10 and [answer.strip() for answer in row.episode.answers] == ["Up"]


def test_a_closing_answer_of_several_tokens_ends_the_response(tiny):
    tokenizer = load_tokenizer(str(tiny))
    letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "</answer>"]
    (newline,) = tokenizer.encode("\n")
    chain = dict(zip([newline, *letters], [*letters, letters[0]], strict=True))
    (row,) = play(Chain(chain, len(tokenizer)), [Game()], tokenizer)
    assert row.tokens[row.spans[0][0] :] == letters


def test_with_pad_equal_to_eos_the_sampled_stop_token_is_trained():
    episodes = [Game(), Game("go")]  # the first row is the shorter one and ends in padding
    rows = play(Chain({GO: THINK, THINK: HM, HM: END}), episodes)
    batch = Batch.of(rows)
    assert rows[0].tokens[-1] == END == 0 and rows[0].episode.answers == [None]
    assert batch.is_response[0].tolist() == [False] * 2 + [True] * 3 + [False] * 4
    assert batch.is_reasoning.equal(batch.is_response) and batch.lengths.tolist() == [5, 9]
    logp = torch.zeros(batch.tokens.shape, requires_grad=True)
    policy_loss(logp, batch.old_logp, torch.ones(2), batch.is_reasoning.float()).backward()
    assert logp.grad[0, 4] < 0 and (logp.grad[0, 5:] == 0).all()


@pytest.mark.parametrize("eos", ["<|end|>", "Down"])  # base models' eos is another token than their template's
def test_the_end_of_turn_token_ends_a_response_and_is_said_once(eos):
    template = (
        "{% for m in messages %}{{ 'go ' if m.role == 'assistant' }}{{ m.content }} <|end|> {% endfor %}"
        "{{ 'go ' if add_generation_prompt }}"
    )
    for chain, response in ((TURN, RESPONSE), ({GO: THINK, THINK: HM, HM: END}, [THINK, HM, END])):
        (row,) = play(Chain(chain), [Game("Reward:")], ten_words(template, eos))
        end = [] if response[-1] == END else [END]
        assert row.tokens == [GO, END, GO, END, GO, *response, *end, REWARD, END, GO, *response]


def test_every_eos_token_of_the_model_ends_a_response():
    model = Chain({GO: THINK, THINK: HM})  # after HM any token, all alike
    model.table.data[HM, DOWN] = 100.0
    model.generation_config = SimpleNamespace(eos_token_id=[END, DOWN])  # Qwen2.5-Instruct has two
    (row,) = play(model, [Game()])
    assert row.tokens[2:] == [THINK, HM, DOWN] and row.episode.answers == [None]


def test_a_response_cut_short_is_an_invalid_turn():
    (row,) = play(Chain(TURN), [Game("go")], max_response_tokens=5)
    assert row.episode.answers == [None, None]
    assert row.tokens == [GO, GO, *RESPONSE[:5], GO, *RESPONSE[:5]] and not any(row.is_action)


def test_a_response_that_closes_with_its_last_token_is_valid():
    (row,) = play(Chain(TURN), [Game()], max_response_tokens=6)
    assert row.episode.answers == [" Up "]


def test_max_context_ends_the_episode_before_a_turn_that_might_not_fit():
    # 2 prompt tokens, then 6 a response and 1 an observation: after n turns 7 n + 1, and one more needs 7
    for room, turns in ((8, 1), (14, 1), (15, 2), (21, 2), (22, 3)):
        (row,) = play(Chain(TURN), [Game(*["go"] * 9)], max_response_tokens=6, max_context=room)
        assert len(row.episode.answers) == turns and len(row.tokens) == 7 * turns + 1 <= room


def test_a_prompt_that_leaves_no_room_for_a_response_is_refused():
    with pytest.raises(ValueError, match="prompt of 9 tokens"):
        play(Chain(TURN), [Game(), Game(prompt="go " * 8)], max_response_tokens=6, max_context=14)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_not_above_0_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be above 0"):
        play(Chain(TURN), [Game()], temperature=temperature)


def test_a_ragged_batch_equals_its_rows_rolled_out_alone(tiny):
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    options = {"temperature": 1e-4, "max_response_tokens": 30}  # as good as greedy: no draw decides anything
    rows = play(model, lake(8, 1), tokenizer, **options)
    alone = [play(model, lake(1, 1, first=level), tokenizer, **options)[0] for level in range(8)]
    assert len({len(row.tokens) for row in rows}) > 2
    assert [row.tokens for row in rows] == [row.tokens for row in alone]
    assert [row.episode.return_ for row in rows] == [row.episode.return_ for row in alone]
    assert [(row.is_response, row.is_action, row.spans) for row in rows] == [
        (row.is_response, row.is_action, row.spans) for row in alone
    ]


class Spy(Engine):
    """Counts the tokens each forward pass reads."""

    def __init__(self, model):
        super().__init__(model)
        self.passes = []

    def forward(self, pending, start, seen):
        self.passes.append([len(ids) for ids in pending])
        return super().forward(pending, start, seen)


def test_a_groups_prompt_is_run_once_and_every_later_token_once(tiny):
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    engine = Spy(model)
    rows = play(model, lake(3, 4), tokenizer, engine=engine, max_response_tokens=40)
    prompts = [row.tokens[: row.spans[0][0]] for row in rows]
    assert prompts[0] == prompts[3] != prompts[4] and prompts[8] == prompts[11]
    assert engine.passes[0] == [len(prompts[i]) for i in (0, 4, 8)]
    # after the prompt a row reads all it writes and is told but its last token; finished rows read nothing
    later = sum(len(row.tokens) - len(prompt) - 1 for row, prompt in zip(rows, prompts, strict=True))
    assert sum(map(sum, engine.passes[1:])) == later


def test_observations_are_read_in_a_few_passes_not_one_a_row(tiny):
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    engine = Spy(model)
    rows = play(model, lake(4, 4), tokenizer, engine=engine, max_response_tokens=40)
    observations = sum(len(row.spans) - 1 for row in rows)
    reading = sum(max(widths) > 1 for widths in engine.passes[1:])
    assert 0 < reading < observations / 2


def test_the_same_generator_state_gives_the_same_rollout_and_no_other_generator_counts(tiny):
    model, tokenizer = load_model(str(tiny)), load_tokenizer(str(tiny))
    runs = []
    for seed, noise in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(noise)
        rows = play(model, lake(2, 2), tokenizer, seed=seed, max_response_tokens=24)
        runs.append([(row.tokens, row.logp) for row in rows])
    assert runs[0] == runs[1] != runs[2]


def test_one_rollout_of_a_group_differs_from_the_next(tiny):
    rows = play(load_model(str(tiny)), lake(1, 6), load_tokenizer(str(tiny)), max_response_tokens=24)
    assert len({tuple(row.tokens) for row in rows}) == 6


def test_sampling_frequencies_and_the_numbers_beside_them_are_those_of_the_tempered_softmax():
    chances = torch.full((10,), 1e-30)
    chances[[HM, UP, DOWN]] = torch.tensor([0.5, 0.3, 0.2])
    model = Chain({GO: chances.log()})
    # at temperature ½ the chances are squared: .25, .09 and .04 of .38
    for temperature, expected in ((1.0, (0.5, 0.3, 0.2)), (0.5, (0.25 / 0.38, 0.09 / 0.38, 0.04 / 0.38))):
        rows = play(model, [Game() for _ in range(3000)], temperature=temperature, max_response_tokens=1)
        entropy = -sum(p * torch.tensor(p).log().item() for p in expected)
        for token, p in zip((HM, UP, DOWN), expected, strict=True):
            chosen = [row for row in rows if row.tokens[-1] == token]
            assert abs(len(chosen) / 3000 - p) < 4 * (p * (1 - p) / 3000) ** 0.5
            # ‖onehot - p‖² = (1 - p)² + Σ_others p²
            norm = ((1 - p) ** 2 + sum(q * q for q in expected) - p * p) ** 0.5
            assert chosen[0].logp[-1] == pytest.approx(torch.tensor(p).log().item(), abs=1e-5)
            assert chosen[0].entropy[-1] == pytest.approx(entropy, abs=1e-5)
            assert chosen[0].score_norm[-1] == pytest.approx(norm, abs=1e-5)
        assert {row.tokens[-1] for row in rows} == {HM, UP, DOWN}


def test_the_smallest_draw_does_not_pick_an_impossible_token(monkeypatch):
    logits = torch.full((10,), -1e4)
    logits[[HM, UP]] = 0.0
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.zeros(size))
    (row,) = play(Chain({GO: logits}), [Game()], max_response_tokens=1)
    assert row.tokens[-1] == HM
    monkeypatch.setattr(torch, "rand", lambda *size, **_: torch.full(size, 1 - 2**-24))
    (row,) = play(Chain({GO: logits}), [Game()], max_response_tokens=1)
    assert row.tokens[-1] == UP


def test_token_pieces_join_to_the_text_also_where_a_character_spans_tokens(tiny):
    tokenizer = load_tokenizer(str(tiny))
    text = "<think>a √ b</think>\n<answer>Up || √Down</answer>"
    ids = tokenizer.encode(text)
    pieces = token_pieces(tokenizer, ids)
    root = tokenizer.encode("√")
    assert len(root) == 3 and token_pieces(tokenizer, root) == ["", "", "√"]
    assert len(pieces) == len(ids) and "".join(pieces) == text


def test_token_pieces_survive_any_bytes_a_model_may_sample(tiny):
    tokenizer, generator = load_tokenizer(str(tiny)), torch.Generator().manual_seed(0)
    for ids in torch.randint(2, 258, (500, 8), generator=generator).tolist():  # the bytes' own tokens
        text, pieces = tokenizer.decode(ids), token_pieces(tokenizer, ids)
        joined = "".join(pieces)
        assert len(pieces) == 8 and text.startswith(joined)
        assert set(text[len(joined) :]) <= {"�"}  # a character that is not complete yet


def trajectory(length, responses, return_, actions=()):
    """Token t has id t + 1, log-prob -t, entropy t / 10 and norm t / 100."""
    row = Trajectory(Game(return_=return_), list(range(1, length + 1)), [], [], [], [], [])
    for t in range(length):
        row.is_response.append(t in responses)
        row.is_action.append(t in actions)
        for column, unit in ((row.logp, -1), (row.entropy, 0.1), (row.score_norm, 0.01)):
            column.append(t * unit * (t in responses))
    return row


def test_a_batch_pads_on_the_right_and_takes_rows_as_wide_as_their_longest():
    batch = Batch.of([trajectory(2, {1}, 0.5), trajectory(5, {1, 2, 4}, -1.0, {2}), trajectory(3, {2}, 2.0, {2})])
    assert batch.tokens.tolist() == [[1, 2, 0, 0, 0], [1, 2, 3, 4, 5], [1, 2, 3, 0, 0]]
    assert batch.is_action.nonzero().tolist() == [[1, 2], [2, 2]]
    assert batch.is_reasoning.nonzero().tolist() == [[0, 1], [1, 1], [1, 4]]
    assert batch.old_logp.tolist() == [[0, -1, 0, 0, 0], [0, -1, -2, 0, -4], [0, 0, -2, 0, 0]]
    batch.weights = batch.is_response.float()
    part = batch.take(torch.tensor([2, 0]))
    assert part.tokens.tolist() == [[1, 2, 3], [1, 2, 0]]
    assert part.weights.tolist() == [[0, 0, 1], [0, 1, 0]]
    assert part.returns.tolist() == [2, 0.5] and part.lengths.tolist() == [3, 2] and part.energy is None
    assert batch.take([1]).tokens.tolist() == [[1, 2, 3, 4, 5]]


def test_the_return_stands_on_the_last_response_token_and_nowhere_else():
    batch = Batch.of([trajectory(2, {1}, 0.5), trajectory(6, {1, 2, 4}, -1.0), trajectory(3, {2}, 2.0)])
    expected = torch.zeros(3, 6)
    expected[0, 1], expected[1, 4], expected[2, 2] = 0.5, -1.0, 2.0
    assert batch.final_rewards().equal(expected)


def test_every_response_token_knows_its_turn_and_the_last_of_each_has_the_turns_reward():
    rows = play(Chain(TURN), [Game("go"), Game()])
    batch = Batch.of(rows)  # 2 prompt tokens, 6 of the response, 1 of the observation, 6 of the response
    assert batch.turn.tolist() == [[-1] * 2 + [0] * 6 + [-1] + [1] * 6, [-1] * 2 + [0] * 6 + [-1] * 7]
    assert batch.is_turn_end.nonzero().tolist() == [[0, 7], [0, 14], [1, 7]]
    expected = torch.zeros(2, 15)
    expected[0, 7], expected[0, 14], expected[1, 7] = 1, 2, 1
    assert batch.rewards.equal(expected)


def test_keep_leaves_the_other_tokens_out_and_cuts_off_what_follows_the_last_one():
    batch = Batch.of([trajectory(6, {1, 2, 4, 5}, 0.5, {2, 5}), trajectory(4, {1, 3}, 1.0), trajectory(3, {2}, 0.0)])
    mask = torch.tensor([[True, False, True, True, True, False], [False, True] + [False] * 4, [False] * 6])
    batch.keep(mask)
    assert batch.is_response.nonzero().tolist() == [[0, 2], [0, 4], [1, 1]]
    assert batch.is_action.nonzero().tolist() == [[0, 2]] and batch.is_reasoning.nonzero().tolist() == [[0, 4], [1, 1]]
    assert batch.lengths.tolist() == [5, 2, 1] and batch.tokens.shape == (3, 6)
    assert batch.take([1, 2]).tokens.tolist() == [[1, 2], [1, 2]]


def test_learned_positions_are_never_asked_beyond_the_context(monkeypatch):
    for name in ("_ends_turn", "_may_close"):  # so that both rows read at the same time
        monkeypatch.setattr(module, name, lambda *_: set())
    model = GPT2LMHeadModel(GPT2Config(vocab_size=10, n_positions=64, n_embd=32, n_layer=1, n_head=2)).eval()
    # a long history that reads little, beside a short history that reads much
    episodes = [Game("go", prompt="go " * 45), Game("go " * 40, prompt="go")]
    rows = play(model, episodes, max_response_tokens=4, max_context=64)
    assert [len(row.spans) for row in rows] == [2, 2]
