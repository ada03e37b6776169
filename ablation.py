"""What the ablations of arXiv:2605.14558v1 put in the place of parts of Eq. (5): another signal, other tags.

    python train.py --signal entropy          # energy, entropy, policy_nll, logprob_shift: Eqs. (19)-(22)
    python train.py --tag_weight one          # the four tags weigh 1 and not α
    python train.py --weight_stats mini_batch # μ and σ of every mini-batch apart (train.update)
    python train.py --weights class_mean      # no Eq. (5): a loss that averages over each class of tokens

B trajectories, T tokens. Differs from the paper: the weight of tags and the extent of μ and σ are not in it; it is
silent about both, so they are tried.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from actfocus import RESPONSE, classify_tokens
from energy import SIGNALS, logprob_shift, policy_nll
from policy import TokenScores, pad
from rollout import Trajectory, token_pieces


def weight_signal(name: str, reference: TokenScores, old_logp: Tensor) -> Tensor:
    """(B, T): what Eq. (5) standardises over action tokens, one of the signals (19)-(22).

        energy  Eₜ    entropy  Hₜ of π_ref    policy_nll  -log π_old    logprob_shift  log π_old - log π_ref

    Args:
        reference: scores under π_ref; its entropy and log-probs are at the rollouts' temperature, 1 by default.
        old_logp: (B, T) log π_old at the sampled tokens, nats.
    """
    if name not in SIGNALS:
        raise ValueError(f"unknown signal {name!r}: choose from {', '.join(SIGNALS)}")
    return {"energy": reference.energy, "entropy": reference.entropy, "policy_nll": policy_nll(old_logp),
            "logprob_shift": logprob_shift(old_logp, reference.logp)}[name]


def class_mean_weights(is_action: Tensor, is_reasoning: Tensor) -> Tensor:
    """(B, T): what makes Eq. (6) over these rows the mean of two means, over action and over reasoning tokens. Ours.

        wₜ = N / (2 N_act)  t ∈ 𝓣_act        wₜ = N / (2 N_reason)  t ∈ 𝓣_reason        N = N_act + N_reason

    Each class has half of Σ w, and their mean is 1; in a mini-batch of other shares nearly so.
    It is α = N_act / N_reason, β = 0, up to a common factor.

    Args:
        is_action, is_reasoning: (B, T) bool, disjoint.
    """
    total = (is_action | is_reasoning).sum()
    return sum(mask * total / (2 * mask.sum().clamp(min=1)) for mask in (is_action, is_reasoning))


def tag_tokens(pieces: Sequence[str]) -> Tensor:
    """Which tokens of one response are its tags: those with a character of them, but for action tokens.

    The tags are the <think>, </think>, <answer> and </answer> of the structure that Eq. (1) asks for; the same words
    inside the thought are none, and a response without the structure has none.

    Args:
        pieces: T texts, one a token, as in `classify_tokens`.
    Returns:
        (T,) bool.
    """
    text, is_tag = "".join(pieces), []
    match = RESPONSE.match(text)
    if match is None:
        return torch.zeros(len(pieces), dtype=torch.bool)
    start, end = match.span(1)
    thought = text.index("<think>"), text.index("</think>")  # the first ones, as in RESPONSE
    spans = [(thought[0], thought[0] + 7), (thought[1], thought[1] + 8), (start - 8, start), (end, end + 9)]
    position = 0
    for piece in pieces:
        is_tag.append(any(max(position, low) < min(position + len(piece), high) for low, high in spans))
        position += len(piece)
    return torch.tensor(is_tag, dtype=torch.bool) & ~classify_tokens(pieces)[1]


def tag_mask(weight: str, rows: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase) -> Tensor | None:
    """(B, T): `tag_tokens` of every response of these trajectories; None where tags weigh what reasoning weighs."""
    if weight != "one":
        return None
    masks = []
    for row in rows:
        masks.append(torch.zeros(len(row.tokens), dtype=torch.bool))
        for start, end in row.spans:
            masks[-1][start:end] = tag_tokens(token_pieces(tokenizer, row.tokens[start:end]))
    return pad(masks, torch.bool)
