"""Six functions to write from their equations (arXiv:2605.14558v1). Copy this file to exercises/my_answer.py.

    ACTFOCUS_MODULE=my_answer pytest -x -k token_energy     # grade one; without -k all six
    python exercises/hints.py token_energy 1                # then 2, then 3

B trajectories, a group's rows adjacent; T tokens; V vocabulary. Where a token is neither reasoning nor action (prompt,
observation, padding) any number may stand, NaN too, and nothing of it may reach a result. Inputs need not be checked;
results have the dtype of what goes in, float32 or float64.
"""

from collections.abc import Sequence

import torch  # noqa: F401
from torch import Tensor

from actfocus import answer_span  # (start, end) of the executed answer in a response's text, or None  # noqa: F401


def token_energy(logits: Tensor) -> Tensor:
    """Eq. (4).

        Eₜ = -log Σᵥ exp f_ref(t, v)

    Args:
        logits: (…, V) f_ref; they can be as large as ±1000.
    Returns:
        (…) energies.
    """
    raise NotImplementedError


def group_advantages(returns: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """GRPO's advantage. Eq. (3).

        A = (R - mean_group) / (std_group + ε)        std with G - 1

    Args:
        returns: (B,) R(τ); rows 0 … G-1 are the first group, G … 2G-1 the second, and so on.   group_size: G ≥ 1.
    Returns:
        (B,) advantages; exactly 0 in a group whose returns are all equal, and so in a group of one.
    """
    raise NotImplementedError


def token_weights(
    energy: Tensor, is_action: Tensor, is_reasoning: Tensor, alpha: float = 0.1, beta: float = 0.5, eps: float = 1e-6
) -> Tensor:
    """Eq. (5).

        wₜ = α                                   t ∈ 𝓣_reason
        wₜ = 1 + β · sigmoid((Eₜ - μ_E) / σ_E)     t ∈ 𝓣_act
        wₜ = 0                                   else

    μ_E and σ_E = √(variance + ε): of all action tokens of the batch, the variance of the population (divided by N).

    Args:
        energy: (B, T) float.   is_action, is_reasoning: (B, T) bool, never both True.
    Returns:
        (B, T) float, without gradient; a batch without any action token is possible.
    """
    raise NotImplementedError


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, weights: Tensor, clip_low: float = 0.2, clip_high: float = 0.28,
    total_weight: float | None = None,
) -> Tensor:
    """Eq. (6).

        L = -(1 / Σₜ wₜ) · Σₜ wₜ · min(ρₜ Aₜ, clip(ρₜ, 1 - ε_low, 1 + ε_high) Aₜ)      ρₜ = exp(log πₜ - log π_oldₜ)

    Args:
        logp, old_logp: (B, T) log πₜ and log π_oldₜ; only logp gets a gradient.
        advantages: (B, T), or (B,), then one for all tokens of a row.   weights: (B, T), 0 outside the response.
        clip_low, clip_high: ε_low, ε_high.
        total_weight: what to write for Σₜ wₜ in the denominator, if given: the sum of a larger batch.
    Returns:
        Scalar; 0, with gradient 0, where all weights are 0. ρₜ can be too large for a float: where Aₜ is 0 it counts 0.
    """
    raise NotImplementedError


def classify_tokens(pieces: Sequence[str]) -> tuple[Tensor, Tensor]:
    """𝓣_reason and 𝓣_act of one response.

        t ∈ 𝓣_act  ⇔  a non-space character of token t lies inside the <answer>…</answer> of Eq. (1)

    Every other token is reasoning: the tags, white space, and all of a response without the structure.

    Args:
        pieces: T texts, one a token; joined they are the response. An empty piece holds the first bytes of the
            character with which the next pieces begin, and has that character's class.
    Returns:
        is_reasoning, is_action: (T,) bool.
    """
    raise NotImplementedError


def gae(
    rewards: Tensor, values: Tensor, is_response: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """GAE over response tokens. Eq. (12).

        δₜ = rₜ + γ V_next - Vₜ        Aₜ = δₜ + γλ A_next        value target = Aₜ + Vₜ

    "next" is the next response token of the row; after the last one V and A are 0.

    Args:
        rewards, values: (B, T).   is_response: (B, T) bool; observations stand between the responses of a row.
    Returns:
        advantages, value_targets: (B, T), without gradient, 0 outside the response.
    """
    raise NotImplementedError
