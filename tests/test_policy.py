"""policy.py: one shift, padding that changes nothing, and gradients only where a response token is predicted."""

import json
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from tiny import llama
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    PreTrainedTokenizerFast,
)

import policy
from policy import Critic, load_critic, load_model, load_tokenizer, micro_batches, opening_text, score_tokens, turn_text

pytest_plugins = ["tiny"]

VOCAB = 50
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = CHATML.replace("m.content }}", "m.content.split('</think>')[-1] }}")  # as reasoning models' templates do
PREFILLED = CHATML.replace("assistant\n{% endif", "assistant\n<think>{% endif")


class Known(nn.Module):
    """A model whose hidden states, and logits, at position t are row t of a table, whatever it reads."""

    def __init__(self, table):
        super().__init__()
        self.table, self.config = table, SimpleNamespace(hidden_size=table.shape[1])
        self.base_model = self

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(last_hidden_state=self.table[: input_ids.shape[1]].expand(len(input_ids), -1, -1))

    def get_output_embeddings(self):
        head = nn.Linear(*self.table.shape[1:] * 2, bias=False)
        nn.init.eye_(head.weight)
        return head


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2)).eval()


MODELS = {"rotary": lambda: llama(VOCAB), "learned positions": gpt2}


def ragged(lengths=(7, 12, 5), seed=0):
    """Padded random tokens, and responses in two pieces with an observation between."""
    generator = torch.Generator().manual_seed(seed)
    tokens = policy.pad([torch.randint(2, VOCAB, (n,), generator=generator) for n in lengths], torch.int64)
    place = torch.arange(max(lengths)).expand_as(tokens)
    is_response = (place >= 2) & (place != 4) & (place < torch.tensor(lengths)[:, None])
    return tokens, is_response


def test_the_entry_of_token_t_comes_from_position_t_minus_1():
    # probabilities of the next token at positions 0 … 3; log-probs of tokens (·, 2, 1, 0) are log .25, log .2, log .6
    probs = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.8, 0.1, 0.1]])
    shift = torch.tensor([1.0, 2.0, 3.0, 4.0])  # logsumexp of the logits at that position
    model = Known(probs.log() + shift[:, None])
    tokens = torch.tensor([[0, 2, 1, 0]])
    scores = score_tokens(model, tokens, torch.tensor([[False, True, True, True]]))
    assert scores.logp[0].exp().tolist() == pytest.approx([1, 0.25, 0.2, 0.6], abs=1e-6)
    assert scores.energy[0].tolist() == pytest.approx([0, -1, -2, -3], abs=1e-6)
    # -(½ log ½ + 2 · ¼ log ¼) = 1.5 log 2; -(.1 log .1 + .2 log .2 + .7 log .7) = .80182; the same with .6, .3, .1
    assert scores.entropy[0].tolist() == pytest.approx([0, 1.039721, 0.801819, 0.897946], abs=1e-5)


def test_entries_outside_the_response_are_zero_and_position_0_is_refused():
    model, (tokens, is_response) = llama(VOCAB), ragged()
    for column in score_tokens(model, tokens, is_response):
        assert column.shape == tokens.shape and (column[~is_response] == 0).all() and (column[is_response] != 0).all()
    is_response[1, 0] = True
    with pytest.raises(ValueError, match="position 0"):
        score_tokens(model, tokens, is_response)


def test_no_response_token_at_all_gives_zeros():
    tokens, is_response = ragged()
    scores = score_tokens(llama(VOCAB), tokens, torch.zeros_like(is_response))
    assert all(column.shape == tokens.shape and not column.any() for column in scores)


@pytest.mark.parametrize("kind", MODELS)
def test_a_padded_batch_equals_its_single_rows(kind):
    model, lengths = MODELS[kind](), (7, 12, 5)
    tokens, is_response = ragged(lengths)
    critic = Critic(model.base_model, model.config.hidden_size)
    nn.init.normal_(critic.head.weight)
    whole = [*score_tokens(model, tokens, is_response), critic(tokens, is_response)]
    for row, n in enumerate(lengths):
        one = tokens[row : row + 1, :n], is_response[row : row + 1, :n]
        for column, single in zip(whole, [*score_tokens(model, *one), critic(*one)], strict=True):
            torch.testing.assert_close(column[row, :n], single[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", MODELS)
def test_scores_equal_a_plain_log_softmax_of_the_models_logits(kind):
    model, (tokens, is_response) = MODELS[kind](), ragged()
    scores = score_tokens(model, tokens, is_response, temperature=0.7)
    logits = model(tokens).logits[:, :-1].double() / 0.7
    logq = logits.log_softmax(-1)
    chosen = is_response[:, 1:]
    logp = logq.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    assert (scores.logp[:, 1:] - logp)[chosen].abs().max() < 1e-5
    assert (scores.entropy[:, 1:] + (logq.exp() * logq).sum(-1))[chosen].abs().max() < 1e-5


def test_temperature_divides_in_log_probs_and_entropy_and_never_in_energy():
    model, (tokens, is_response) = llama(VOCAB), ragged()
    one, cold = (score_tokens(model, tokens, is_response, temperature) for temperature in (1.0, 0.5))
    assert torch.equal(one.energy, cold.energy)
    assert (cold.entropy < one.entropy)[is_response].all()
    assert (cold.logp != one.logp)[is_response].all()


def test_chunks_change_neither_scores_nor_gradients(monkeypatch):
    tokens, is_response = ragged()
    results = []
    for chunk in (1000, 3):
        monkeypatch.setattr(policy, "CHUNK", chunk)
        model = llama(VOCAB)
        scores = score_tokens(model, tokens, is_response)
        (scores.logp.sum() + scores.entropy.sum()).backward()
        results.append([*scores, *(parameter.grad for parameter in model.parameters())])
    for whole, pieces in zip(*results, strict=True):
        torch.testing.assert_close(whole, pieces, atol=1e-5, rtol=1e-4)


def test_gradient_flows_only_from_the_positions_that_predict_response_tokens():
    model, (tokens, is_response) = llama(VOCAB), ragged()
    kept = {}

    def keep(name):
        def hook(module, inputs, output):
            kept[name] = output
            output.retain_grad()
        return hook

    model.base_model.norm.register_forward_hook(keep("hidden"))
    model.base_model.embed_tokens.register_forward_hook(keep("embedded"))
    scores = score_tokens(model, tokens, is_response)
    (scores.logp.sum() + scores.entropy.sum()).backward()
    predicts = is_response.roll(-1, 1)
    predicts[:, -1] = False
    assert ((kept["hidden"].grad != 0).any(-1) == predicts).all()
    last = is_response.int().cumsum(1).argmax(1)  # the last response token is only predicted, never read
    read = torch.arange(tokens.shape[1]) < last[:, None]
    assert ((kept["embedded"].grad != 0).any(-1) == read).all()


def test_energy_has_no_gradient():
    scores = score_tokens(llama(VOCAB), *ragged())
    assert scores.logp.requires_grad and scores.entropy.requires_grad and not scores.energy.requires_grad


@pytest.mark.parametrize("budget", [1, 30, 100, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(budget):
    lengths = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    batches = micro_batches(lengths, budget)
    assert sorted(row for rows in batches for row in rows) == list(range(40))
    for rows in batches:
        assert len(rows) == 1 or len(rows) * max(lengths[row] for row in rows) <= budget
    if budget == 10_000:
        assert len(batches) == 1


def test_the_critic_starts_at_zero_and_its_value_of_token_t_comes_from_position_t_minus_1():
    table = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 7.0], [9.0, 0.0]])
    critic = Critic(Known(table), 2)
    tokens, is_response = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[False, True, False, True]])
    assert critic(tokens, is_response).tolist() == [[0, 0, 0, 0]]
    critic.head.weight.data, critic.head.bias.data = torch.tensor([[2.0, 1.0]]), torch.tensor([0.5])
    assert critic(tokens, is_response).tolist() == [[0, 2.5, 0, 17.5]]  # 2 · 1 + ½ at t = 1; 2 · 5 + 7 + ½ at t = 3


def test_critic_and_policy_share_no_weights_and_come_from_one_folder(tiny):
    model, critic = load_model(str(tiny)), load_critic(str(tiny))
    ours, theirs = dict(model.base_model.named_parameters()), dict(critic.body.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not {p.data_ptr() for p in ours.values()} & {p.data_ptr() for p in theirs.values()}
    assert model.dtype == torch.float32 and not model.training


def spoil(folder, tiny, how):
    """A model folder with one thing wrong."""
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    if how == "weights cut short":
        (folder / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes()[:1000])
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "config is not JSON":
        (folder / "config.json").write_text("{")
    elif how == "config of another size":
        config = json.loads((tiny / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif how == "empty folder":
        for path in folder.iterdir():
            path.unlink()
    return folder


@pytest.mark.parametrize("how", [
    "empty folder",
    "no weights",
    "config is not JSON",
    "weights cut short",
    "config of another size",
])
def test_a_broken_model_folder_is_one_clear_line(tiny, tmp_path, how):
    folder = spoil(tmp_path / "broken", tiny, how)
    with pytest.raises(ValueError) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("more", [{}, {"logits_scaling": 3.0}])
def test_a_model_whose_logits_are_not_just_its_heads_is_refused(tmp_path, more):
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 2, "vocab_size": 50, "initializer_range": 0.5}
    GraniteForCausalLM(GraniteConfig(**shape, **more)).save_pretrained(tmp_path)
    if not more:
        assert load_model(str(tmp_path)).config.logits_scaling == 1
        return
    with pytest.raises(ValueError, match="its logits are more than its head of the last hidden state") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["models/nope", "runs/nope", "./nope", "/nowhere/nope", "a/b/c"])
@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_critic])
def test_a_missing_model_folder_is_one_clear_line(load, name):
    with pytest.raises(ValueError, match=f"cannot load model '{name}': there is no such folder") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def templated(tiny, template) -> PreTrainedTokenizerFast:
    tokenizer = load_tokenizer(str(tiny))
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("known, begins", [(True, "<s>"), (False, "")])
def test_without_a_chat_template_a_text_begins_as_the_tokenizer_begins_one(known, begins):
    words = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if known:  # as Llama's and Gemma's
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    text = opening_text(tokenizer, "a", "b")
    assert text == f"{begins}a\nb\n"
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode("a\nb\n")


def test_a_template_that_names_the_day_is_the_same_tomorrow_and_one_that_fails_is_one_line(tiny):
    dated = templated(tiny, "{{ strftime_now('%d %B %Y') }} " + CHATML)
    assert opening_text(dated, "rules", "state").startswith("01 Jan 2026 <|im_start|>system")
    with pytest.raises(ValueError, match="the chat template cannot be followed: ") as caught:
        opening_text(templated(tiny, "{{ 1 + 'a' }}" + CHATML), "rules", "state")
    assert "\n" not in str(caught.value)


def test_the_critics_head_is_as_wide_as_the_last_hidden_state(tmp_path):
    shape = OPTConfig(vocab_size=50, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=1,
                      num_attention_heads=2, max_position_embeddings=32)
    AutoModelForCausalLM.from_config(shape).save_pretrained(tmp_path)
    values = load_critic(str(tmp_path))(torch.arange(6).view(1, 6), torch.arange(6).view(1, 6) > 2)
    assert values.tolist() == [[0] * 6]


def test_a_checkpoint_may_keep_constants_that_are_computed_today(tmp_path):
    GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    constants = {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}  # as GPT-2's older ones
    safetensors.torch.save_file(weights | constants, tmp_path / "model.safetensors", {"format": "pt"})
    load_model(str(tmp_path))


def test_without_a_chat_template_messages_are_plain_lines(tiny):
    tokenizer = templated(tiny, None)
    assert opening_text(tokenizer, "rules", "state") == "rules\nstate\n"
    assert turn_text(tokenizer, "state") == "\nstate\n"


def test_with_a_chat_template_the_pieces_join_to_the_full_rendering(tiny):
    tokenizer = templated(tiny, CHATML)
    users, answers = ["one", "two\n√", "three"], ["<think>a</think><answer>Up</answer>", "not even the format"]
    text = opening_text(tokenizer, "rules", users[0])
    messages = [{"role": "system", "content": "rules"}, {"role": "user", "content": users[0]}]
    for user, answer in zip(users[1:], answers, strict=True):
        text += answer + turn_text(tokenizer, user)
        messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": user}]
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert turn_text(tokenizer, "go") == "<|im_end|>\n<|im_start|>user\ngo<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat_template_that_leaves_out_the_rules_is_refused(tiny):
    silent = CHATML.replace("for m in messages", "for m in messages if m.role != 'system'")
    with pytest.raises(ValueError, match="leaves out or alters the system turn"):
        opening_text(templated(tiny, silent), "rules", "state")
    trimmed = CHATML.replace("m.content }}", "m.content.strip() }}")
    assert "rules" in opening_text(templated(tiny, trimmed), "rules\n", "state")


@pytest.mark.parametrize("template", [FORGETFUL, PREFILLED])
def test_a_chat_template_that_rewrites_earlier_turns_is_refused(tiny, template):
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        turn_text(templated(tiny, template), "state")
