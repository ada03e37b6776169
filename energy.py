"""Token energy, the signals it is compared with, and the diagnosis that started it all.

Eq. (4), the four signals of the ablation and Figures 1-2 of arXiv:2605.14558v1. A signal is one number per token;
the diagnosis asks whether its mean over a prompt's action tokens tells how much that prompt's returns vary.

P prompts, G rollouts each, B = P·G rows, T tokens, V vocabulary. Energies and entropies are in nats.

Differs from the paper: p-values are of Student's t on P - 2 degrees of freedom, ties ranked by their mean.
"""

import numpy as np
import torch
from torch import Tensor

SIGNALS = ("energy", "entropy", "policy_nll", "logprob_shift")  # Eqs. (19)-(22)


def token_energy(logits: Tensor) -> Tensor:
    """Energy of the next-token distribution under the frozen reference model. Eq. (4).

        Eₜ = -log Σᵥ exp f_ref(t, v)

    Low: confident, high: uncertain. It does not depend on the token that was sampled.
    "Energy is uncertainty" is an observation, not a theorem: f + c has the same softmax and energy Eₜ - c.

    Args:
        logits: (…, V) f_ref at the position that predicts yₜ, temperature 1.
    Returns:
        (…) energies in nats.
    """
    return -logits.logsumexp(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits): of the policy's for the entropy bonus; of f_ref's it is a signal of the ablation.

        Hₜ = -Σᵥ pᵥ log pᵥ

    Args:
        logits: (…, V).
    Returns:
        (…) in nats, between 0 and log V.
    """
    logq = logits.log_softmax(-1)
    return -(logq.exp() * logq).sum(-1)


def policy_nll(old_logp: Tensor) -> Tensor:
    """Surprise at the sampled token under the rollout policy; drifts as that policy learns. Signal of the ablation.

        -log π_old(yₜ | cₜ)
    """
    return -old_logp


def logprob_shift(old_logp: Tensor, ref_logp: Tensor) -> Tensor:
    """How far training has moved the sampled token; 0 at the first step. Signal of the ablation.

        log π_old(yₜ | cₜ) - log π_ref(yₜ | cₜ)
    """
    return old_logp - ref_logp


def action_bottleneck(
    energy: Tensor, is_action: Tensor, is_reasoning: Tensor, returns: Tensor, group_size: int
) -> dict[str, float]:
    """The diagnosis of Figures 1 and 2: Spearman's ρ across groups between mean energy and the spread of returns.

        ē_g = mean of Eₜ over the group's tokens of one class        σ_g = std of R in the group

    Args:
        energy: (B, T) Eₜ (or another signal), B = P · group_size, a group's rows adjacent.
        is_action, is_reasoning: (B, T) bool, disjoint; together all response tokens.
        returns: (B,) R(τ).   group_size: G ≥ 2.
    Returns:
        rho_* and p_* for action, reasoning and response tokens, num_groups (P), action_fraction. Groups without a
        token of a class leave that class; ρ and p are NaN with fewer than 3 groups or where nothing varies.
    Raises:
        ValueError: shapes do not fit, masks overlap, or a group of one.
    """
    if group_size < 2 or returns.numel() % group_size:
        raise ValueError(f"group_size must be at least 2 and divide the {returns.numel()} rows, got {group_size}")
    if not energy.shape == is_action.shape == is_reasoning.shape or energy.shape[0] != returns.numel():
        raise ValueError(f"shapes differ: {[tuple(x.shape) for x in (energy, is_action, is_reasoning, returns)]}")
    if (is_action & is_reasoning).any():
        raise ValueError(f"{(is_action & is_reasoning).sum()} tokens are both action and reasoning")
    return_std = group_spread(returns, group_size)
    is_response = is_action | is_reasoning
    result = {"num_groups": len(return_std),
              "action_fraction": (is_action.sum() / is_response.sum().clamp(min=1)).item()}
    for name, mask in (("action", is_action), ("reasoning", is_reasoning), ("response", is_response)):
        result[f"rho_{name}"], result[f"p_{name}"] = spearman(group_means(energy, mask, group_size), return_std)
    return result


def group_spread(returns: Tensor, group_size: int) -> np.ndarray:
    """(P,) σ_g, std of each group's returns with G - 1; equal spreads are equal, whatever the rounding of their std."""
    return returns.double().view(-1, group_size).std(1).numpy().round(9)


def group_means(signal: Tensor, mask: Tensor, group_size: int) -> np.ndarray:
    """(P,) mean of `signal` over each group's tokens in `mask`, all its rows pooled; NaN for a group without any."""
    total = torch.where(mask, signal, 0).double().sum(1).view(-1, group_size).sum(1)
    count = mask.sum(1).view(-1, group_size).sum(1)
    return (total / count).numpy()


def spearman(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Spearman's ρ and its two-sided p-value; pairs with a NaN are left out. NaN for fewer than 3, or no variation."""
    keep = ~(np.isnan(first) | np.isnan(second))
    first, second = _ranks(first[keep]), _ranks(second[keep])
    n = len(first)
    if n < 3 or first.std() == 0 or second.std() == 0:
        return float("nan"), float("nan")
    rho = float(np.clip(np.corrcoef(first, second)[0, 1], -1, 1))
    return rho, _p_value(rho, n - 2)


def partial_spearman(first: np.ndarray, second: np.ndarray, *given: np.ndarray) -> tuple[float, float]:
    """Spearman's ρ between what is left of two ranks after a line in the ranks of k others, and its p-value.

        k = 1: ρ₁₂.₃ = (ρ₁₂ - ρ₁₃ ρ₂₃) / √((1 - ρ₁₃²)(1 - ρ₂₃²))        n - 2 - k degrees of freedom

    Careful: a line removes what rises or falls with another, nothing else. The spread of 0/1 returns is
    √(m (1 - m) G / (G-1)) of their mean m: given m alone a signal of nothing but m would seem to correlate with it,
    given m and m (1 - m) nothing is left. NaN there, where nothing varies, and for too few rows.
    """
    keep = ~np.isnan([first, second, *given]).any(0)
    one, other, *rest = (_ranks(values[keep]) for values in (first, second, *given))
    design = np.column_stack([np.ones(len(one)), *rest])
    fits = [np.linalg.lstsq(design, ranks, rcond=None) for ranks in (one, other)]
    left = [ranks - design @ fit[0] for ranks, fit in zip((one, other), fits, strict=True)]
    freedom = len(one) - 1 - int(fits[0][2])  # less the rank of the design: what says nothing new costs nothing
    if freedom < 1 or min(residual @ residual for residual in left) <= 1e-9 * len(one) ** 3:
        return float("nan"), float("nan")
    partial = float(np.clip(left[0] @ left[1] / np.sqrt((left[0] @ left[0]) * (left[1] @ left[1])), -1, 1))
    return partial, _p_value(partial, freedom)


def _p_value(rho: float, freedom: int) -> float:
    """Two-sided p of a correlation with ν degrees of freedom.

    With t = ρ·√(ν/(1-ρ²)) and θ = arctan(t/√ν) = arcsin ρ, Student's tail becomes an integral of cosines:
        p = ∫_{arcsin|ρ|}^{π/2} cosᵛ⁻¹θ dθ / ∫_0^{π/2} cosᵛ⁻¹θ dθ
    """
    def tail(start: float) -> float:
        theta = start + (np.pi / 2 - start) * np.linspace(0, 1, 20001) ** 2  # finest where the integrand is largest
        return np.trapezoid(np.cos(theta).clip(min=0) ** (freedom - 1), theta)

    return float(tail(np.arcsin(abs(rho))) / tail(0.0))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties by their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
