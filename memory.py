"""How much memory a run will take, from the shape of its model, and what to do where that is too much.

    weights 4 N      optimiser 12 N'      reference 4 N      critic 4 N + 12 N'      cache 2·b·layers·k·rows·positions
    activations C·layers·(n·d + b·(2 q + 2 k + 4 f) + 4 h + 8)        logits 4·V·COPIES·(tokens of a chunk)

N weights, N' of them learn (a gradient and Adam's two moments each); b bytes of a matrix product, 4 or 2 (bfloat16);
d width, f width of the feed-forward part, q and k widths of all query and all key heads, h query heads, n = 24 or 26
bytes, V vocabulary, C tokens of a forward pass. Activations are those that torch keeps for backward in a layer of a
Llama or Qwen2 with fused attention. Bytes throughout; MB = 10⁶. Libraries (a CUDA context: about 500 MB) come on top.
"""

import torch

import parallel
from config import CRITIC, Config
from lora import add_lora
from policy import CHUNK, LOGITS, outline

COPIES = 6  # of a chunk's logits at one time in its backward pass; measured
EVALUATED = 256  # rollouts of an evaluation that share a cache


def estimate(config: Config, name: str) -> dict[str, int]:
    """Bytes by part for the model `name` (a folder or a hub name, of which only config.json is read)."""
    model = outline(name)
    shape = model.config.get_text_config()
    weights, body = model.num_parameters(), model.base_model.num_parameters()
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.seed)
    learning, adapter = model.num_parameters(only_trainable=True), model.num_parameters() - weights
    head = shape.hidden_size + 1
    parts = {"weights": 4 * (weights + adapter), "optimiser": 12 * learning,
             "reference": 0 if adapter else 4 * weights}
    if config.algo in CRITIC:
        parts["critic"] = 4 * (body + adapter + head) + 12 * ((adapter or body) + head)
    kept, rounded = _activations(config, shape), 2 * weights * (config.dtype == "bfloat16")
    chunk = min(CHUNK, max(1, LOGITS // shape.vocab_size), max(config.micro_batch_tokens, config.max_context))
    return parts | {"cache": _cache(config, shape), "activations": kept + rounded,
                    "logits": 4 * shape.vocab_size * COPIES * chunk}


def memory_line(config: Config, name: str) -> str:
    """The estimate as a line; of the cache and the update only one exists at a time."""
    parts = estimate(config, name)
    peak = sum(parts.values()) - min(parts["cache"], parts["activations"] + parts["logits"])
    each = ", ".join(f"{part} {size / 1e6:,.0f}" for part, size in parts.items())
    return f"memory in MB: {each}; {peak / 1e6:,.0f} at the peak, libraries not counted"


def _cache(config: Config, shape) -> int:
    """Keys and values of all rollouts at once, at their longest."""
    trained = config.num_prompts // parallel.ranks() * config.num_generations
    evaluated = min(max(1, EVALUATED // config.eval_samples), config.eval_prompts) * config.eval_samples
    size, (_, keys) = getattr(torch, config.dtype).itemsize, _widths(shape)
    return 2 * size * shape.num_hidden_layers * keys * max(trained, evaluated) * config.max_context


def _activations(config: Config, shape) -> int:
    """What a forward pass keeps for backward; with gradient checkpointing every layer's input and one layer's own."""
    (queries, keys), size = _widths(shape), getattr(torch, config.dtype).itemsize
    tokens = max(config.micro_batch_tokens, config.max_context)  # a longer trajectory is a pass of its own
    inner = getattr(shape, "intermediate_size", None) or 4 * shape.hidden_size
    layer = (shape.hidden_size * (24 if size == 4 else 26) + 4 * shape.num_attention_heads + 8
             + size * (2 * queries + 2 * keys + 4 * inner))
    if config.gradient_checkpointing:
        return tokens * (4 * shape.hidden_size * shape.num_hidden_layers + layer)
    return tokens * shape.num_hidden_layers * layer


def _widths(shape) -> tuple[int, int]:
    heads = shape.num_attention_heads
    head = getattr(shape, "head_dim", None) or shape.hidden_size // heads
    return heads * head, (getattr(shape, "num_key_value_heads", None) or heads) * head


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, on a GPU or on the CPU, or Python asked for more memory than there is."""
    refused = "can't allocate memory", "not enough memory", "out of memory"  # the CPU's allocators have no type of it
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in refused))


def advice(error: Exception) -> str:
    """What happened, and the flags that help; the first two leave the result as it is: a run may resume with them."""
    reason = (str(error).splitlines() or ["Python could allocate no more"])[0][:200]
    return (f"error: out of memory ({reason}); try a smaller --micro_batch_tokens or --gradient_checkpointing, then "
            "--dtype bfloat16, --lora_rank 16, fewer --num_prompts or --num_generations, a shorter --max_context")
