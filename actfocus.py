"""ActFocus: reasoning tokens get little gradient, action tokens more, and uncertain action tokens the most.

The idea in one file: token classes, Eq. (5), Eq. (6), and the two advantages it is laid over, Eqs. (3) and (12) of
"Resolving Action Bottleneck" (arXiv:2605.14558v1). Pure functions, tensors in, tensors out.

B trajectories = P prompts · G rollouts, a group's rows adjacent; T tokens; everything per token is (B, T).
Prompt, observation and padding tokens have weight 0, and nothing of them reaches a loss.

Differs from the paper, which is silent there: tags, white space and the end-of-turn token count as reasoning; a token
across a tag's edge is an action token if a non-space character of it lies inside the answer; ε of the std is 1e-6.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

# The first </think> closes the thought; what stands inside it, an <answer> too, is thought. (?>…) is never tried again:
# where no <answer> follows that first </think>, there is no match.
RESPONSE = re.compile(r"\s*<think>(?>.*?</think>)\s*<answer>(.*?)</answer>", re.DOTALL)


def answer_span(text: str) -> tuple[int, int] | None:
    """Where aₖ stands in a response `<think>…</think><answer>aₖ</answer>`; None without that structure. Eq. (1)."""
    match = RESPONSE.match(text)
    return match.span(1) if match else None


def classify_tokens(pieces: Sequence[str]) -> tuple[Tensor, Tensor]:
    """𝓣_reason and 𝓣_act of one response: where Eq. (5) puts which weight.

        t ∈ 𝓣_act  ⇔  a non-space character of token t lies inside the <answer>…</answer> of `answer_span`

    Every other token is reasoning; without the structure all are. Classes go by characters, nothing is re-encoded.

    Args:
        pieces: T texts, one a token, that concatenate to the response. An empty piece holds first bytes of the
            character that the next pieces complete, and shares its class.
    Returns:
        is_reasoning, is_action: (T,) bool, disjoint, together all True.
    """
    text = "".join(pieces)
    start, end = answer_span(text) or (0, 0)
    is_action, position = [], 0
    for piece in pieces:
        inside = text[max(position, start) : min(position + max(len(piece), 1), end)]
        is_action.append(bool(inside.strip()))
        position += len(piece)
    is_action = torch.tensor(is_action, dtype=torch.bool)
    return ~is_action, is_action


def token_weights(
    energy: Tensor, is_action: Tensor, is_reasoning: Tensor, alpha: float = 0.1, beta: float = 0.5, eps: float = 1e-6
) -> Tensor:
    """Gradient weight of every token. Eq. (5).

        wₜ = α                              t ∈ 𝓣_reason
        wₜ = 1 + β · sigmoid((Eₜ - μ_E) / σ_E)   t ∈ 𝓣_act,   σ_E = √(variance + ε)  (Eq. 16)
        wₜ = 0                              else: prompt, observation, padding

    Energy moves weight between action tokens and never above 1 + β. α = 1, β = 0 is uniform credit.
    μ_E and σ_E run over all action tokens of the batch, so a shift common to all energies changes nothing.

    Args:
        energy: (B, T) float, Eₜ in nats; read at action tokens only, never differentiated.
        is_action, is_reasoning: (B, T) bool, disjoint.
        alpha: α in [0, 1].   beta: β ≥ 0.   eps: ε, added to the population variance.
    Returns:
        (B, T) float weights without gradient.
    Raises:
        ValueError: shapes differ, masks overlap, or alpha or beta out of range.
    """
    _check_same_shape(energy=energy, is_action=is_action, is_reasoning=is_reasoning)
    if not energy.is_floating_point() or is_action.dtype != torch.bool or is_reasoning.dtype != torch.bool:
        got = [tensor.dtype for tensor in (energy, is_action, is_reasoning)]
        raise ValueError(f"energy must be float and both masks bool, got {got}")
    if (is_action & is_reasoning).any():
        raise ValueError(f"{(is_action & is_reasoning).sum()} tokens are both action and reasoning")
    if not 0 <= alpha <= 1 or not beta >= 0:
        raise ValueError(f"alpha must lie in [0, 1] and beta be at least 0, got {alpha} and {beta}")
    weights = alpha * is_reasoning.to(energy.dtype)
    signal = energy.detach()[is_action]  # (N,)
    if signal.numel():
        standardised = (signal - signal.mean()) / (signal.var(correction=0) + eps).sqrt()
        weights[is_action] = 1 + beta * standardised.sigmoid()
    return weights


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, weights: Tensor, clip_low: float = 0.2, clip_high: float = 0.28,
    total_weight: float | None = None,
) -> Tensor:
    """Weighted clipped surrogate. Eq. (6).

        L = -(1 / Σₜ wₜ) · Σₜ wₜ · min(ρₜ Aₜ, clip(ρₜ, 1 - ε_low, 1 + ε_high) Aₜ)      ρₜ = exp(log πₜ - log π_oldₜ)

    Σ wₜ in the denominator: a factor common to all weights cancels. All weights 1 is PPO's loss as a mean over tokens.
    Where nothing is clipped the gradient is Eq. (7). Its norm does depend on where the weight lies: the tiny model's
    first gradient on FrozenLake is 2.9 times as large with ActFocus as with uniform weights.

    Careful: at ρ = 1 the loss is minus the weighted mean of centred advantages, near 0; its gradient is not.

    Args:
        logp, old_logp: (B, T) nats, under π_θ (differentiated) and under the rollout policy.
        advantages: (B, T) or (B,), one for all tokens of a row.   weights: (B, T) wₜ ≥ 0, 0 outside the response.
        clip_low, clip_high: ε_low in [0, 1], ε_high ≥ 0.
        total_weight: Σ wₜ of the whole mini-batch, so micro-batch gradients add up; by default this tensor's own.
    Returns:
        Scalar; 0, with gradient 0, where no token has weight.
    Raises:
        ValueError: shapes differ, a clip range is impossible, or a weight is negative or not finite.
    """
    if advantages.shape == logp.shape[:1]:
        advantages = advantages[:, None].expand_as(logp)
    _check_same_shape(logp=logp, old_logp=old_logp, advantages=advantages, weights=weights)
    if not 0 <= clip_low <= 1 or not clip_high >= 0:
        raise ValueError(f"clip_low must lie in [0, 1] and clip_high be at least 0, got {clip_low} and {clip_high}")
    wrong = weights[~(weights.isfinite() & (weights >= 0))]
    if len(wrong):
        raise ValueError(f"weights must be finite and not negative, got {wrong[0].item()}")
    used = weights > 0
    log_ratio = torch.where(used, logp - old_logp.detach(), 0.0)  # before exp, so a NaN filler cannot leak
    advantages = torch.where(used, advantages.detach(), 0.0)
    ratio = log_ratio.clamp(max=20.0).exp()  # e²⁰ is far beyond any clip; e⁸⁹ would overflow and make 0 · ∞
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
    total = weights.sum().item() if total_weight is None else total_weight
    return -(weights.detach() * surrogate).sum() / (total or 1.0)


def group_advantages(returns: Tensor, group_size: int, eps: float = 1e-6) -> Tensor:
    """GRPO's advantage: the return, standardised among the rollouts of its own prompt. Eqs. (3) and (13).

        A = (R - mean_group) / (std_group + ε)        std with G - 1

    A group whose returns are all equal gets exactly 0, and so does a group of one: Careful, its std is NaN.

    Args:
        returns: (B,) R(τ), a group's rows adjacent.   group_size: G.   eps: ε.
    Returns:
        (B,) advantages.
    Raises:
        ValueError: the rows are not whole groups.
    """
    if returns.dim() != 1 or group_size < 1 or returns.numel() % group_size:
        raise ValueError(f"returns of shape {tuple(returns.shape)} are not whole groups of {group_size}")
    groups = returns.view(-1, group_size)  # (P, G)
    centred = groups - groups.mean(1, keepdim=True)
    std = groups.std(1, keepdim=True) if group_size > 1 else torch.zeros_like(centred)
    equal = (groups == groups[:, :1]).all(1, keepdim=True)  # not std == 0: a mean of equal floats may be off by one bit
    return torch.where(equal, 0.0, centred / (std + eps)).view(-1)


def gae(
    rewards: Tensor, values: Tensor, is_response: Tensor, gamma: float | Tensor = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation over response tokens. GAE, Eq. (12).

        δₜ = rₜ + γ V_next - Vₜ        Aₜ = δₜ + γλ A_next        value target = Aₜ + Vₜ

    "next" is the next *response* token of the row: observation tokens are stepped over and change nothing; after the
    last one V and A are 0. γ = λ = 1 is Aₜ = (sum of rewards from t on) - Vₜ.

    Args:
        rewards, values: (B, T); rₜ at the token that earned it, Vₜ before token t; read at response tokens only.
        is_response: (B, T) bool.   gamma, lam: γ, λ in [0, 1]; γ one number, or (B, T) of its own after each token.
    Returns:
        advantages, value_targets: (B, T), 0 outside the response, no gradient.
    Raises:
        ValueError: shapes differ, or γ or λ out of range.
    """
    gamma = torch.as_tensor(gamma, dtype=values.dtype)
    gamma = gamma if gamma.dim() else gamma.expand_as(values)
    _check_same_shape(rewards=rewards, values=values, is_response=is_response, gamma=gamma)
    if not (gamma.min() >= 0 and gamma.max() <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma and lam must lie in [0, 1], got {gamma.min()} to {gamma.max()} and {lam}")
    values, rewards = torch.where(is_response, values.detach(), 0.0), rewards.detach()
    advantages = torch.zeros_like(values)
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    for t in reversed(range(values.shape[1])):
        here = is_response[:, t]
        delta = rewards[:, t] + gamma[:, t] * next_value - values[:, t]
        advantages[:, t] = torch.where(here, delta + gamma[:, t] * lam * next_advantage, 0.0)
        next_value = torch.where(here, values[:, t], next_value)
        next_advantage = torch.where(here, advantages[:, t], next_advantage)
    return advantages, advantages + values


def whiten(advantages: Tensor, mask: Tensor, eps: float = 1e-8) -> Tensor:
    """Ours, as PPO codes do it: advantages of all tokens in `mask` to mean 0 and variance 1, before any weight."""
    chosen = advantages[mask]
    std = chosen.var(correction=0).add(eps).sqrt() if chosen.numel() else 1.0
    return torch.where(mask, (advantages - chosen.mean()) / std, 0.0)


def _check_same_shape(**tensors: Tensor) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if len(set(shapes.values())) > 1 or len(next(iter(shapes.values()))) != 2:
        raise ValueError(f"expected (B, T) tensors of one shape, got {shapes}")
