"""What a run starts from: a model by its name, taught the format where asked, on its device; and the dry run.

π_θ, π_ref and the critic are copies of one language model (arXiv:2605.14558v1, §5.1); with LoRA π_ref is no copy.

    python train.py --preset paper --env sokoban --dry_run      # settings, memory, prompt, token classes; no training
"""

import hashlib
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import warmstart
from actfocus import classify_tokens
from checkpoint import State, files_digest
from config import CRITIC, Config
from envs import BUDGETS
from lora import AdapterOff, add_lora
from memory import memory_line
from methods import build_env, env_options, evaluation_levels, make_episodes
from policy import (
    Critic,
    load_critic,
    load_model,
    load_tokenizer,
    opening_text,
    pick_device,
    recompute_layers,
    trainable,
    turn_text,
)
from rollout import load_policy, token_pieces
from smollm2 import cache_folder, source_model


def start_model(config: Config) -> str:
    """The model a run starts from, and its reference: converted, and taught the format, where the settings say so."""
    name = source_model(config)
    if not config.warmstart_steps:
        return name
    env = build_env(config)
    how = (config.env, env_options(config), *(getattr(env, name) for name in BUDGETS), config.prompt_style,
           config.max_context, config.warmstart_steps, config.warmstart_learning_rate, config.dtype)
    files = files_digest(Path(name), "*.safetensors", "*.bin", "*.json", "*.jinja")
    digest = hashlib.sha256(repr((name, files, *how)).encode()).hexdigest()[:8]
    folder = cache_folder(config) / f"{Path(name).name}-{config.env}-{digest}"
    if not folder.is_dir():  # one start for all seeds of a comparison
        check_prompts(config, load_tokenizer(name))  # or responses that do not fit would teach nothing
        warmstart.bring_to_format(config, name, folder)
    return str(folder)


def build_state(config: Config) -> State:
    """Policy, frozen reference and critic, all of one model; Adam as in the paper."""
    device, tokenizer = pick_device(config.device), load_tokenizer(config.model)
    check_prompts(config, tokenizer)
    policy = load_policy(config.model, device)
    set_up_learning(config, policy)
    reference = AdapterOff(policy) if config.lora_rank else load_model(config.model, device).requires_grad_(False)
    critic = build_critic(config, device) if config.algo in CRITIC else None
    critic_optimizer = torch.optim.Adam(trainable(critic), config.critic_learning_rate) if critic else None
    return State(policy, reference, tokenizer, torch.optim.Adam(trainable(policy), config.learning_rate),
                 torch.Generator().manual_seed(config.seed), critic, critic_optimizer)


def build_critic(config: Config, device: torch.device) -> Critic:
    """A critic that learns as the policy does."""
    critic = load_critic(config.model, device)
    set_up_learning(config, critic.body)
    return critic


def set_up_learning(config: Config, model: PreTrainedModel) -> None:
    """Which weights learn, and what is kept for their gradient."""
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.seed)
    if config.gradient_checkpointing:
        recompute_layers(model)


def check_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse tokens that lose text, a chat template that cannot be followed, prompts without room for a response."""
    text = "<think>so</think>\n<answer>Up || √</answer>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() != text:
        raise ValueError("the tokenizer loses tags, lines or symbols: a response is not the text that it decodes to")
    turn_text(tokenizer, "")
    levels = make_episodes(config, evaluation_levels(config), 1)
    texts = [opening_text(tokenizer, level.system(), level.user()) for level in levels]
    prompt = max(map(len, tokenizer(texts, add_special_tokens=False).input_ids))
    if prompt + config.max_response_tokens > config.max_context:
        raise ValueError(f"--max_context {config.max_context}: a prompt of {prompt} and a response of "
                         f"{config.max_response_tokens} tokens (--max_response_tokens) do not fit")


def dry_run(config: Config) -> None:
    """Print what a run would start with: settings, memory, and an episode of a scripted player, token by token."""
    print(*(f"--{name} {value}" for name, value in asdict(config).items()), sep="\n")
    name = source_model(config)
    tokenizer = load_tokenizer(name)
    check_prompts(config, tokenizer)
    print(memory_line(config, name))
    print("an episode: ·token·token·, ⟦action token⟧; everything else of a response is reasoning")
    played = (warmstart.transcript(config.env, level, 1.0, tokenizer, build_env(config), config.prompt_style)
              for level in range(20))
    for text, is_response in max(played, key=lambda parts: len(parts) > 2):  # of several turns, where one has them
        ids = tokenizer.encode(text, add_special_tokens=False)
        pieces = token_pieces(tokenizer, ids)
        if not is_response:
            print(f"--- prompt or observation, {len(ids)} tokens\n{text}")
            continue
        is_action = classify_tokens(pieces)[1].tolist()
        shown = "·".join(f"⟦{piece}⟧" if action else piece for piece, action in zip(pieces, is_action, strict=True))
        print(f"--- response, {len(ids)} tokens, {sum(is_action)} of them action\n{shown}")
