"""The methods ActFocus is compared with, one section a paper, in one form:

    L = -Σ m·w·min(ρA, clip(ρ)A) / Σ m·w  +  c_KL·KL - c_H·H

They differ in the advantage A, the tokens m that are trained, the clip range and how rollouts are made; w is 1, or
ActFocus's on top. Token GAE (PPO) and the group advantage (GRPO) stand in actfocus.py.

In this order: KL estimators, Eq. (15) of arXiv:2605.14558v1 · StarPO-S, its filter · DAPO (arXiv:2503.14476) · EMPG
(arXiv:2509.09265) · POAD and NTPO (arXiv:2405.15821) · CARL (arXiv:2512.04949). Pure functions.
B rows in P groups of G, T tokens, K turns (a step of EMPG, an action of POAD and CARL is one response), S states.
"""

import torch
from torch import Tensor

from actfocus import gae

KINDS = ("k1", "k2", "k3")


def kl_estimate(logp: Tensor, ref_logp: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimate of KL(π‖π_ref) from tokens sampled under π. Eq. (15).

        k1 = log π - log π_ref      k2 = ½ (log π - log π_ref)²      k3 = π_ref/π - 1 - log(π_ref/π)

    k1 and k3 are unbiased in value, k3 is never negative. Careful: as a loss on fixed samples the gradient of k1 has
    mean 0 and that of k2 is the KL's; k3's is the reverse KL's.

    Args:
        logp, ref_logp: (…) nats, at the sampled token.   kind: one of KINDS.
    """
    difference = ref_logp - logp
    if kind == "k1":
        return -difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        return difference.exp() - difference - 1
    raise ValueError(f"unknown KL estimator {kind!r}: choose from {', '.join(KINDS)}")


def filter_groups(returns: Tensor, group_size: int, fraction: float) -> list[int]:
    """Rows of the `fraction` of prompt groups whose returns vary most, in order. StarPO-S.

    Args:
        returns: (B,) R(τ), a group's rows adjacent.   fraction: in (0, 1]; 1 keeps every group.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"filter_fraction must lie in (0, 1], got {fraction}")
    groups = returns.view(-1, group_size)
    kept = groups.std(1, correction=0).argsort(descending=True, stable=True)[: max(1, round(fraction * len(groups)))]
    return [int(group) * group_size + i for group in kept.sort().values for i in range(group_size)]


def varied_groups(returns: Tensor, group_size: int, num_groups: int) -> list[int]:
    """Rows of the first `num_groups` groups whose returns are not all equal, topped up by others. DAPO.

    The filter of dynamic sampling: a group of equal returns has advantage 0 everywhere and would waste its share of
    the batch. Groups stay in order.
    """
    groups = returns.view(-1, group_size)
    equal = (groups == groups[:, :1]).all(1)
    kept = equal.to(torch.int8).argsort(stable=True)[:num_groups].sort().values  # varied ones first
    return [int(group) * group_size + i for group in kept for i in range(group_size)]


def overlong_penalty(lengths: Tensor, max_length: int, buffer: float) -> Tensor:
    """Soft over-length punishment, added to the return. DAPO Eq. (13).

        min(-(|y| - (L_max - L_buf)) / L_buf, 0)        0 below the buffer, -1 at L_max

    Args:
        lengths: (…) tokens of a response.   max_length: L_max.   buffer: L_buf in (0, L_max].
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"the buffer must lie in (0, {max_length}], got {buffer}")
    return (-(lengths - (max_length - buffer)) / buffer).clamp(max=0)


def empg_advantages(
    advantages: Tensor, step_entropy: Tensor, is_step: Tensor, kappa: float = 1.0, kappa_bonus: float = 1.0,
    zeta: float = 0.05,
) -> Tensor:
    """A step's advantage, larger where the step was certain, plus a bonus where the next one is. EMPG Eqs. (7)-(12).

        H̃   = (H - min) / (max - min + 1e-8)        over all steps of the batch
        g(H) = exp(-κ H̃) / mean over all steps of exp(-κ H̃)        f(H) = exp(-κ' H̃)
        A_mod = A · g(Hₖ) + ζ · f(Hₖ₊₁)        no bonus at a row's last step
        A_fin = A_mod - mean of A_mod over all steps, no division by the std

    κ = ζ = 0 is GRPO up to the batch mean. Careful: ζ > 0 gives a batch of equal returns an advantage, too.

    Args:
        advantages: (B,) of the trajectories, e.g. GRPO's.   step_entropy: (B, K) mean token entropy of step k, nats.
        is_step: (B, K) bool, a row's steps first.   kappa, kappa_bonus, zeta: κ, κ', ζ.
    Returns:
        (B, K), 0 where there is no step.
    """
    if step_entropy.shape != is_step.shape or advantages.shape != is_step.shape[:1] or not is_step.any():
        shapes = [tuple(tensor.shape) for tensor in (advantages, step_entropy, is_step)]
        raise ValueError(f"expected (B,), (B, K) and (B, K) with at least one step, got {shapes}")
    entropy = torch.where(is_step, step_entropy, step_entropy[is_step].min())
    relative = (entropy - entropy.min()) / (entropy.max() - entropy.min() + 1e-8)  # H̃
    confidence = (-kappa * relative).exp()
    scale = confidence / confidence[is_step].mean()  # g, averages to 1
    clarity = torch.where(is_step, (-kappa_bonus * relative).exp(), 0.0)  # f
    bonus = torch.cat([clarity[:, 1:], torch.zeros_like(clarity[:, :1])], 1)  # the next step's
    modulated = advantages[:, None] * scale + zeta * bonus
    return torch.where(is_step, modulated - modulated[is_step].mean(), 0.0)


def poad_gae(
    rewards: Tensor, values: Tensor, is_response: Tensor, is_turn_end: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """GAE whose discount lies between actions and not inside them: Bellman backup with Action Decomposition. POAD.

        inside an action      δ = Vⱼ₊₁ - Vⱼ                    A = δ + λ A_next
        at its last token     δ = rₖ + γ V_next action - Vₙ     A = δ + γ λ A_next        V = A = 0 after the end

    So a token is not worth less for standing early in a long action. γ = 1 is GAE.

    Args:
        rewards: (B, T), read at turn ends only.   is_turn_end: (B, T) bool, last token of each response.
        values, is_response, gamma, lam and what is returned: as in `actfocus.gae`.
    """
    discount = torch.where(is_turn_end, torch.as_tensor(gamma, dtype=values.dtype), 1.0)
    return gae(torch.where(is_turn_end, rewards, 0.0), values, is_response, discount, lam)


def ntpo_gae(
    rewards: Tensor, values: Tensor, is_response: Tensor, is_turn_end: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """The naive twin of `poad_gae`: γ between all tokens. NTPO, of the POAD paper.

    An action's own reward reaches its token j of n as γⁿ⁻ʲ of POAD's, later rewards as less: a long action discounts
    its own beginning.
    """
    return gae(torch.where(is_turn_end, rewards, 0.0), values, is_response, gamma, lam)


def value_loss(values: Tensor, old_values: Tensor, targets: Tensor, clip: float = 0.0) -> Tensor:
    """½ (V - target)² of each token; with a clip the larger of it and the same with V within ±clip of its old value."""
    loss = (values - targets).square()
    if clip:
        near = old_values + (values - old_values).clamp(-clip, clip)
        loss = loss.maximum((near - targets).square())
    return loss / 2


def criticality(surprise: Tensor, source: Tensor, num_states: int) -> Tensor:
    """Where to fork next: H(s) / n(s), (S,), -∞ where nothing was sampled. CARL.

        H(s) ≈ mean over actions sampled at s of -(1/|a|) log π(a|s)        n(s) = how many there are

    Args:
        surprise: (N,) of each sampled action, nats a token.   source: (N,) int64, the state it was sampled at.
    """
    count = surprise.new_zeros(num_states).index_add(0, source, torch.ones_like(surprise))
    total = surprise.new_zeros(num_states).index_add(0, source, surprise)
    return torch.where(count > 0, total / count.clamp(min=1).square(), -torch.inf)


def tree_values(parent: Tensor, leaf_values: Tensor) -> Tensor:
    """V of every state of a forest: R at a leaf, the plain mean of its children's V elsewhere. CARL.

    Args:
        parent: (S,) int64, -1 at roots, always below the child's own number.   leaf_values: (S,), read at leaves.
    """
    total, count = torch.zeros(2, len(parent), dtype=torch.float64)  # so the mean of equal floats is that float
    values = leaf_values.clone()
    for state in reversed(range(len(parent))):
        if count[state]:
            values[state] = total[state] / count[state]
        if parent[state] >= 0:
            total[parent[state]] += values[state]
            count[parent[state]] += 1
    return values


def edge_advantages(parent: Tensor, values: Tensor) -> Tensor:
    """A(u→v) = V(v) - V(u) of the action that led to each state, 0 at roots; no std, no whitening. CARL."""
    return torch.where(parent >= 0, values - values[parent.clamp(min=0)], 0.0)


def update_set(parent: Tensor) -> Tensor:
    """(S,) bool: the action into a state is trained iff its source has another child, too. CARL.

    Where only one action was tried nothing says whether it was good; it leaves the mean, it does not count as 0.
    """
    children = torch.bincount(parent.clamp(min=0)[parent >= 0], minlength=len(parent))
    return (parent >= 0) & (children[parent.clamp(min=0)] > 1)
