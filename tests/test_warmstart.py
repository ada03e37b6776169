"""warmstart.py: what the scripted players write, and the tokenizer that reads it."""

import re

import pytest
import torch
from tiny import llama

import methods
import train
import warmstart
from actfocus import answer_span, classify_tokens
from config import BY_ENV
from envs import make_env, random_player
from policy import load_model, load_tokenizer
from rollout import token_pieces
from warmstart import FIRST_SEED, GAMES, TAGS, build_tokenizer, encode, transcript

SEEDS = range(FIRST_SEED, FIRST_SEED + 60)
STEPS = r"(Left|Down|Right|Up)"
MOVES = {"frozenlake": STEPS, "sokoban": STEPS, "sudoku": r"[1-4],[1-4],[1-4]", "webshop": r"search\[.+\]|click\[.+\]"}
FACTS = {"frozenlake": r"\(\d, \d\)", "sokoban": r"\(\d, \d\)", "sudoku": r"\d+ blanks are left",
         "webshop": r"I want \w|So far I chose \w"}


@pytest.fixture(scope="module")
def tokenizer():
    """Built as the committed one is, from fewer transcripts."""
    return build_tokenizer("".join(text for text, _ in transcript(game, FIRST_SEED - 1 - i, 0.5))
                           for game in GAMES for i in range(100))


@pytest.fixture(scope="module", params=GAMES)
def game(request):
    return request.param


@pytest.fixture(scope="module")
def responses(game):
    return [text for seed in SEEDS for text, is_response in transcript(game, seed, 0.5) if is_response]


def test_every_response_names_moves_and_no_more_than_a_turn_has(game, responses):
    assert len(responses) > len(SEEDS)
    for text in responses:
        start, end = answer_span(text)
        moves = text[start:end].split(" || ")
        assert 1 <= len(moves) <= make_env(game).actions_per_turn
        assert all(re.fullmatch(MOVES[game], move) for move in moves)


def test_a_player_with_a_single_move_is_not_led_further_from_the_start_than_that():
    env = make_env("frozenlake")
    env.max_actions = 1
    for seed in range(30):  # up to five random moves would leave fewer than none
        assert transcript("frozenlake", seed, 0.5, env=env)


def test_nearly_all_response_tokens_stand_inside_the_thought(responses, tokenizer):
    inside = total = actions = 0
    for text in responses:
        ids = tokenizer.encode(text)
        inside += ids.index(tokenizer.convert_tokens_to_ids("</think>")) - 1
        total += len(ids)
        actions += int(classify_tokens(token_pieces(tokenizer, ids))[1].sum())
    assert inside / total >= 0.75
    assert actions / total < 0.16  # the paper's Table 1


def test_the_thought_never_names_the_move(game, responses):
    products = {number.lower() for number in make_env("webshop").products}
    for text in responses:
        thought = text[: text.index("</think>")]
        assert not re.search(rf"\b({MOVES[game]})\b|\|\|", thought) and not products & set(thought.split())


def test_thoughts_are_grounded_and_varied(game, responses):
    thoughts = [text[: text.index("</think>")] for text in responses]
    assert len(set(thoughts)) > 0.9 * len(thoughts)
    assert all(re.search(FACTS[game], thought) for thought in thoughts)


def test_the_same_seed_writes_the_same_transcript_and_another_seed_another(game):
    assert transcript(game, FIRST_SEED, 0.5) == transcript(game, FIRST_SEED, 0.5)
    assert transcript(game, FIRST_SEED, 0.5) != transcript(game, FIRST_SEED + 1, 0.5)


def test_a_transcript_alternates_between_what_is_read_and_what_is_written_in_the_rollouts_form(game):
    for seed in SEEDS[:20]:
        parts = transcript(game, seed, 1.0)
        assert [is_response for _, is_response in parts] == [i % 2 == 1 for i in range(len(parts))]
        env = make_env(game)
        assert re.match(rf"{re.escape(env.brief)}.*\nTurn 1: {env.max_actions} left.\n", parts[0][0])
        assert all(text[0] == text[-1] == "\n" for text, _ in parts[2::2])


def test_a_skilled_player_needs_fewer_turns_than_a_random_one(game):
    def turns(skill):
        return sum(is_response for seed in SEEDS for _, is_response in transcript(game, seed, skill)) / len(SEEDS)

    assert turns(1.0) < turns(0.0) - 0.5


def test_the_four_tags_are_single_tokens_wherever_they_stand(tokenizer):
    for tag in TAGS:
        assert len(tokenizer.encode(tag)) == 1
        token = tokenizer.encode(tag)[0]
        assert tokenizer.encode(f"Up{tag} a{tag}\n{tag}{tag}").count(token) == 4
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


@pytest.mark.parametrize("text", [
    "##____\n#P_X√#\n_SO_G_", "Player (0, 3). Box (2, 11). Target (1, 1) (2, 2).", "größer 東京 🙂 Ω̂", "camelCase_1",
    "<think>a</think><answer>Up || Down</answer>", "<answer>UP||down</answer><|end|>", " two  spaces\t \r\n lines \n\n",
])
def test_encoding_and_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_cell_of_a_map_and_a_coordinate_and_a_move_are_one_token_each(tokenizer):
    assert [tokenizer.decode([i]) for i in tokenizer.encode("P_G_")] == ["P", "_", "G", "_"]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("Player (2, 3).")] == ["Player", " (2, 3)", "."]
    for name in ("Up", "Down", "Left", "Right"):
        assert len(tokenizer.encode(name)) == len(tokenizer.encode(f"{name} || {name}")) - 2 == 1


def test_loss_weights_are_0_outside_responses_and_higher_inside_answers(game, tokenizer):
    parts = transcript(game, FIRST_SEED, 0.5)
    ids, weights = encode(tokenizer, parts)
    assert len(ids) == len(weights) and tokenizer.decode(ids) == "".join(text for text, _ in parts)
    pairs = list(zip(ids, weights, strict=True))
    by_weight = {w: tokenizer.decode([token for token, own in pairs if own == w]) for w in set(weights)}
    assert set(by_weight) == {0, 1, warmstart.ACTION_WEIGHT}
    assert "<think>" in by_weight[1] and not any(tag in by_weight[0] for tag in TAGS)
    moves = re.split(r"</answer>| \|\| ", by_weight[warmstart.ACTION_WEIGHT])
    assert moves.pop().strip() == "" and all(re.fullmatch(MOVES[game], move.strip()) for move in moves)


def test_its_levels_are_neither_trained_on_nor_evaluated_on():
    longest = train.Config(seed=9_999, max_steps=10_000, num_prompts=100, mini_batch_size=16)
    longest_reach = max(longest.max_steps * longest.num_prompts, methods.DAPO_ROUNDS * methods.MAX_LEVELS)
    last = methods.FIRST_TRAIN_SEED * (1 + longest.seed) + longest_reach
    first = FIRST_SEED - 2000  # the tokenizer's samples
    assert last < first and train.Config().eval_prompts < methods.FIRST_TRAIN_SEED


def test_training_lowers_the_loss_and_follows_its_seed(tokenizer, capsys):
    def losses():
        model = llama(len(tokenizer))
        skills = [dict.fromkeys(GAMES, 1.0)] * 4  # the learning rate has just begun to rise
        warmstart.train(model, tokenizer, skills, 0.3, 0, dict.fromkeys(GAMES, 3))
        return [float(x) for x in re.findall(r"loss (\S+)", capsys.readouterr().out)], model

    (first, model), (second, again) = losses(), losses()
    assert first == second and first[-1] < first[0] - 0.05
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_the_warm_starts_loss_is_of_the_whole_step_however_it_is_cut(tokenizer, monkeypatch, capsys):
    def one_step(cut):
        monkeypatch.setattr(warmstart, "micro_batches", cut)
        model = llama(len(tokenizer))
        warmstart.train(model, tokenizer, [dict.fromkeys(GAMES, 1.0)], 0.01, 0, dict.fromkeys(GAMES, 2))
        return float(re.search(r"loss (\S+)", capsys.readouterr().out)[1]), model

    whole, ours = one_step(lambda lengths, _: [list(range(len(lengths)))])
    pieces, theirs = one_step(lambda lengths, _: [[row] for row in range(len(lengths))])
    assert whole == pytest.approx(pieces, abs=2e-4)
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (one.grad is None) and torch.allclose(one, other, atol=1e-4)


@pytest.fixture(scope="module", params=GAMES)
def episodes(request):
    """Settings and rollouts of the committed model at temperature 1."""
    game = request.param
    settings = train.Config(**{"env": game, "eval_temperature": 1.0, **BY_ENV["laptop"].get(game, {}),
                               "eval_prompts": 24,
                               "eval_samples": 1 if game in ("sudoku", "webshop") else 2})  # these have many turns
    return settings, train.evaluate_policy(settings, load_model(settings.model), load_tokenizer(settings.model))


def test_the_committed_model_keeps_the_format(episodes):
    tokenizer, (_, rows) = load_tokenizer(episodes[0].model), episodes[1]
    texts = [tokenizer.decode(row.tokens[start:end]) for row in rows for start, end in row.spans]
    spans = [answer_span(text) for text in texts]
    moves = [text[slice(*span)].split(" || ") for text, span in zip(texts, spans, strict=True) if span]
    good = [all(re.fullmatch(MOVES[episodes[0].env], move) for move in turn) for turn in moves]
    assert len(texts) > 32 and sum(good) >= 0.97 * len(texts)


def test_the_committed_model_wins_less_than_half_the_time(episodes):
    assert episodes[1][0]["success"] < 0.5


@pytest.mark.slow
def test_the_committed_model_crosses_the_lake_more_often_than_chance():
    settings = train.Config()
    result, _ = train.evaluate_policy(settings, load_model(settings.model), load_tokenizer(settings.model))
    assert train.evaluate_player(settings, random_player)["success"] < result["success"] < 0.5
