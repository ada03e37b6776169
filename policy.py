"""Policy, frozen reference and critic, and what they say of given tokens: log-prob, entropy, energy, value.

`π_θ`, `π_ref` and the critic are three copies of one language model (arXiv:2605.14558v1, §5.1); the critic's
head is a scalar. Everything per token is (B, T) and aligned once, in `_hidden_before`: entry t belongs to token t
and was computed from tokens 0 … t-1. Logits exist only where a response token is predicted, a chunk at a time.

B rows, T tokens, N response tokens of the batch, V vocabulary, d width.
Rows are padded on the right, so causal attention needs no padding mask and positions are 0, 1, 2, …
"""

import logging
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from energy import token_energy, token_entropy

CHUNK, LOGITS = 2048, 2**24  # response tokens whose logits exist at one time, and how many numbers these may be
# Where a template names today's date: a run that goes on tomorrow has the prompts of today.
A_DAY = "{% macro strftime_now(form) %}01 Jan 2026{% endmacro %}"
TINY = Path(__file__).parent / "models" / "tiny"


class TokenScores(NamedTuple):
    """What a language model says of the tokens that were sampled; (B, T) float32, 0 outside the response."""

    logp: Tensor  # log π(yₜ | cₜ) at the sampling temperature, nats
    entropy: Tensor  # of the same distribution, nats
    energy: Tensor  # Eₜ, Eq. (4), at temperature 1, nats; no gradient


class Critic(nn.Module):
    """A language model's body with a scalar head: V(cₜ), the value before token t."""

    def __init__(self, body: PreTrainedModel, width: int):
        super().__init__()
        self.body = body
        self.head = nn.Linear(width, 1)
        nn.init.zeros_(self.head.weight)  # the first values are 0, whatever the body
        nn.init.zeros_(self.head.bias)

    def forward(self, tokens: Tensor, is_response: Tensor) -> Tensor:
        """(B, T) values, 0 outside the response."""
        hidden = _hidden_before(self.body, tokens, is_response)  # (N, d)
        return _spread(self.head(hidden).squeeze(-1).float(), is_response)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is a GPU where torch sees one, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {name}: torch cannot compute there ({one_line(error)})") from None
    return device


def load_model(name: str, device: torch.device | str = "cpu") -> PreTrainedModel:
    """A causal language model from a folder or a hub name, float32, dropout off."""
    model, found = _load(AutoModelForCausalLM, name, dtype=torch.float32, output_loading_info=True)
    unknown = {key for key in found["unexpected_keys"] if not key.endswith((".masked_bias", ".inv_freq"))}  # constants
    if strange := found["missing_keys"] | unknown:
        raise ValueError(f"cannot load model {name!r}: its weights are not those of its config.json, "
                         f"{len(strange)} are missing or unknown, {min(strange)} for one")
    if not all(weight.isfinite().all() for weight in model.parameters()):
        raise ValueError(f"cannot load model {name!r}: it has weights that are not finite")
    if not _head_is_all(model.eval()):
        raise ValueError(f"cannot use model {name!r}: its logits are more than its head of the last hidden state "
                         "(scaled or capped), and here they are taken to be just that")
    return model.to(device)


@torch.no_grad()
def _head_is_all(model: PreTrainedModel) -> bool:
    ids = torch.arange(8)[None] % model.get_input_embeddings().num_embeddings
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    logits = model(input_ids=ids, use_cache=False).logits
    return torch.allclose(model.get_output_embeddings()(hidden), logits, rtol=1e-3, atol=1e-3)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model."""
    tokenizer = _load(AutoTokenizer, name)
    if not tokenizer.is_fast:
        raise ValueError(f"cannot use the tokenizer of {name!r}: it has no tokenizer.json, which tells a token's text")
    if len(tokenizer) > (known := load_config(name).get_text_config().vocab_size):
        raise ValueError(f"cannot load model {name!r}: its tokenizer has {len(tokenizer)} tokens, the model {known}")
    return tokenizer


def load_critic(name: str, device: torch.device | str = "cpu") -> Critic:
    """A critic whose body is a copy of the language model `name`, and whose head reads what the model's head does."""
    model = load_model(name, device)
    return Critic(model.base_model, model.get_output_embeddings().weight.shape[1]).to(device)


def load_config(name: str) -> PreTrainedConfig:
    """A model's shape, without its weights."""
    return _load(AutoConfig, name)


def outline(name: str) -> PreTrainedModel:
    """A model without its numbers, from its config.json alone."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(load_config(name), dtype=torch.float32)


def check_positions(name: str, max_context: int) -> None:
    """Refuse contexts that are longer than a model's table of learned positions, or than its attention reaches back.

    Rotary positions have no end, but those that depend on the text's length are other ones for tokens that were read
    before. A sliding window would be there in training, and not in rollouts, whose mask is whole.

    Raises:
        ValueError: it names both lengths.
    """
    model = outline(name)
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["sliding_attention"]  # where all are alike, none is named
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None) or max_context
    if window < max_context and any(kind.startswith(("sliding", "chunked")) for kind in layers):
        raise ValueError(f"--max_context {max_context}: attention of {name} reaches {window} tokens back")
    known = getattr(config, "max_position_embeddings", max_context)
    ropes = getattr(config, "rope_parameters", None) or {}  # of all layers, or of each kind of them
    for rope in (ropes, *(part for part in ropes.values() if isinstance(part, dict))):
        first = rope.get("original_max_position_embeddings") or known
        if rope.get("rope_type") in ("dynamic", "longrope") and first < max_context:
            raise ValueError(f"--max_context {max_context}: {name} turns its positions otherwise in texts of more than "
                             f"{first} tokens")
    tables = [part.num_embeddings for part in model.modules()
              if isinstance(part, nn.Embedding) and part is not model.get_input_embeddings()]
    if known < max_context and any(size >= known for size in tables):
        raise ValueError(f"--max_context {max_context}: {name} knows {known} positions")


def shared_tokenizer(name: str, reference: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, which its reference must have as well.

    Raises:
        ValueError: it has another one.
    """
    tokenizer = load_tokenizer(name)
    if load_tokenizer(reference).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"--model {reference}: no reference for {name}, whose tokenizer is another")
    return tokenizer


def precision(dtype: str, device: torch.device) -> torch.autocast | nullcontext:
    """Where matrix products are rounded to `dtype`; weights, softmax and everything after it stay float32.

    Careful: a context keeps rounded copies of the weights, so none may span an optimiser step.
    """
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def recompute_layers(model: PreTrainedModel) -> None:
    """Gradient checkpointing: backward finds only the input of every layer, and runs the layer again."""
    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.forward = partial(_run_layer, layer.forward)


def _run_layer(forward: Callable, *args, **kwargs):
    if not torch.is_grad_enabled():  # a rollout, which needs no gradient but its cache
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The weights that learn; with LoRA few, else all."""
    return [weight for weight in model.parameters() if weight.requires_grad]


def _load(cls: type, name: str, **options):
    """`from_pretrained`, with one clear line where folder, name or network is missing."""
    if not Path(name).is_dir() and (name.startswith((".", os.sep, "models/", "runs/")) or name.count("/") > 1):
        raise ValueError(f"cannot load model {name!r}: there is no such folder")
    for library in ("huggingface_hub", "transformers"):  # their retries and tables would bury the one clear line
        logging.getLogger(library).setLevel(logging.ERROR)
    try:
        return cls.from_pretrained(name, **options)
    except Exception as error:  # a broken file shows as one of many: safetensors', json's, torch's, the hub's
        kind = "folder" if Path(name).is_dir() else "hub name, which needs a network"
        raise ValueError(f"cannot load model {name!r} ({kind}): {one_line(error)}") from None


def one_line(error: Exception) -> str:
    return textwrap.shorten(str(error), 200, placeholder=" …")


def save_whole(folder: Path, *parts: PreTrainedModel | PreTrainedTokenizerBase) -> None:
    """A model and its tokenizer as a folder that appears whole or not at all.

    Raises:
        ValueError: the place cannot be written.
    """
    temporary = place_beside(folder)
    with becoming(folder, temporary):
        for part in parts:
            part.save_pretrained(temporary)


def place_beside(folder: Path) -> Path:
    """An empty folder in the same place, to write to; a ValueError where that is not possible."""
    temporary = folder.with_name(f".{folder.name}-{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror})") from None
    return temporary


@contextmanager
def becoming(folder: Path, temporary: Path) -> Iterator[None]:
    """What is written into `temporary` becomes `folder` at the end; where that fails nothing of it is left.

    Raises:
        OSError: it cannot be written, in one line.
    """
    try:
        yield
        if not folder.is_dir():  # else another process was first, with the same
            os.replace(temporary, folder)
    except (OSError, RuntimeError, SafetensorError) as error:  # one kind each of files, torch and safetensors
        free = shutil.disk_usage(folder.parent).free / 1e6
        raise OSError(f"{folder}: cannot be written with {free:,.0f} MB free ({one_line(error)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def opening_text(tokenizer: PreTrainedTokenizerBase, system: str, user: str) -> str:
    """Everything before the first response."""
    if tokenizer.chat_template is None:
        bos = getattr(tokenizer, "bos_token_id", None)
        begins = tokenizer.bos_token if bos is not None and tokenizer.encode("")[:1] == [bos] else ""
        return f"{begins}{system}\n{user}\n"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    text = _render(tokenizer, messages)
    if system.strip() not in text:
        raise ValueError("the chat template leaves out or alters the system turn, in which the rules are")
    return text


def turn_text(tokenizer: PreTrainedTokenizerBase, user: str) -> str:
    """What stands between the end of a response and the start of the next; the history itself is never rewritten."""
    if tokenizer.chat_template is None:
        return f"\n{user}\n"
    answer = "<think>so</think><answer>it</answer>"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
                {"role": "assistant", "content": answer}, {"role": "user", "content": user}]
    before, after = _render(tokenizer, messages[:2]) + answer, _render(tokenizer, messages)
    if not after.startswith(before):
        raise ValueError("the chat template rewrites earlier turns: the tokens sampled could not be the ones trained")
    return after[len(before) :]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict]) -> str:
    try:
        template = A_DAY + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                             add_generation_prompt=True)
    except Exception as error:  # of any kind: it is wrong, or has no system turn
        raise ValueError(f"the chat template cannot be followed: {one_line(error)}") from None


def score_tokens(model: PreTrainedModel, tokens: Tensor, is_response: Tensor, temperature: float = 1.0) -> TokenScores:
    """Log-prob, entropy and energy of every response token under `model`.

    Args:
        tokens: (B, T) int64, padded on the right.   is_response: (B, T) bool, False at position 0 and padding.
        temperature: the rollout's; log-prob and entropy are of softmax(f / temperature), energy never is.
    """
    hidden = _hidden_before(model.base_model, tokens, is_response)  # (N, d)
    head, sampled = model.get_output_embeddings(), tokens[is_response]
    chunk = max(1, min(CHUNK, LOGITS // len(head.weight)))
    chunks = [
        checkpoint(_chunk_scores, head, h, y, temperature, use_reentrant=False)  # logits again in backward, not kept
        for h, y in zip(hidden.split(chunk), sampled.split(chunk), strict=True)
    ]
    columns = [torch.cat(column) for column in zip(*chunks, strict=True)]
    return TokenScores(*(_spread(column, is_response) for column in columns))


def _chunk_scores(head: nn.Module, hidden: Tensor, sampled: Tensor, temperature: float) -> tuple[Tensor, ...]:
    logits = head(hidden).float()  # (n, V)
    energy = token_energy(logits.detach())
    logits = logits / temperature
    logp = logits.gather(-1, sampled[:, None]).squeeze(-1) - logits.logsumexp(-1)
    return logp, token_entropy(logits), energy


def _hidden_before(body: PreTrainedModel, tokens: Tensor, is_response: Tensor) -> Tensor:
    """(N, d) last hidden states that predict the response tokens: the one causal shift of the project."""
    if is_response[:, 0].any():
        raise ValueError("position 0 has nothing before it and cannot be a response token")
    hidden = body(input_ids=tokens, use_cache=False).last_hidden_state  # (B, T, d)
    rows, columns = is_response.nonzero(as_tuple=True)
    return hidden[rows, columns - 1]


def _spread(values: Tensor, is_response: Tensor) -> Tensor:
    """(N,) → (B, T), zeros elsewhere."""
    return torch.zeros(is_response.shape, dtype=values.dtype, device=values.device).masked_scatter(is_response, values)


def pad(rows: Sequence[Sequence], dtype: torch.dtype) -> Tensor:
    """(B, T), zeros on the right; what is padding is known from lengths, never from token ids."""
    return pad_sequence([torch.as_tensor(row, dtype=dtype) for row in rows], batch_first=True)


def micro_batches(lengths: Sequence[int], token_budget: int, part: int = 0, parts: int = 1) -> list[list[int]]:
    """Row numbers, longest rows together, each list at most `token_budget` tokens with its padding (or one row).

    Of several parts, whose rows are dealt out in order of length, only one: a rank's share of a pass.
    """
    batches, width = [], 0
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i])[part::parts]:
        if not batches or (len(batches[-1]) + 1) * width > token_budget:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches
