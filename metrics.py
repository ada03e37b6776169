"""What a step and an evaluation report; the README's glossary has a row for every key.

Gradient shares follow Eq. (7) of arXiv:2605.14558v1: the gradient is a sum over reasoning and one over action tokens.
"""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from envs import Episode
from rollout import Batch, Trajectory

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def rollout_metrics(rows: Sequence[Trajectory]) -> dict[str, float]:
    """What the step's trajectories were like, before any is filtered out."""
    episodes = [row.episode for row in rows]
    returns = np.array([episode.return_ for episode in episodes])
    groups = {}
    for episode, value in zip(episodes, returns, strict=True):
        groups.setdefault(episode.seed, set()).add(np.float32(value))  # as advantages see them: 0.1 + 0.2 is 0.3
    turns = sum(len(episode.rewards) for episode in episodes)
    return {
        "trajectories": len(rows),
        "success": float(np.mean([episode.success for episode in episodes])),
        "return_mean": float(returns.mean()),
        "return_std": float(returns.std()),
        "equal_groups": float(np.mean([len(values) == 1 for values in groups.values()])),
        "turns": turns / len(rows),
        "invalid_turns": sum(episode.invalid_turns for episode in episodes) / turns,
        "response_tokens": float(np.mean([end - start for row in rows for start, end in row.spans])),
    }


def token_metrics(batch: Batch) -> dict[str, float]:
    """Reasoning and action tokens apart: how many, how sure, and whose the gradient is. Eq. (7)."""
    mass = batch.advantages.abs() * batch.score_norm  # |Aₜ| · ‖∇ log π(yₜ)‖ at the logits, ratio 1
    metrics = {}
    for name, mask in (("reasoning", batch.is_reasoning), ("action", batch.is_action)):
        count = mask.sum().clamp(min=1)
        metrics |= {
            f"tokens_{name}": int(mask.sum()),
            f"weight_share_{name}": _share(batch.weights, mask),
            f"gradient_share_{name}": _share(batch.weights * mass, mask),
            f"gradient_share_{name}_uniform": _share(mass, mask),
            f"entropy_{name}": (batch.entropy[mask].sum() / count).item(),
            f"energy_{name}": (batch.energy[mask].sum() / count).item(),
        }
    return metrics


def _share(values: Tensor, mask: Tensor) -> float:
    return (values[mask].sum() / values.sum().clamp(min=1e-12)).item()


def clipped(log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> int:
    """Tokens whose gradient the clip of Eq. (6) has cut off; log ρₜ is 0 outside the response."""
    ratio = log_ratio.exp()
    high = (ratio > 1 + clip_high) & (advantages > 0)
    low = (ratio < 1 - clip_low) & (advantages < 0)
    return int((high | low).sum())


def summary(episodes: Sequence[Episode], samples: int) -> dict:
    """Success, its 95 % interval, mean return and n; of WebShop the share of episodes that bought anything, too."""
    success = np.array([episode.success for episode in episodes], dtype=float).reshape(-1, samples)
    low, high = success_interval(success)
    bought = [episode.purchased for episode in episodes if episode.purchased is not None]
    return {"success": float(success.mean()), "low": low, "high": high, "prompts": len(success), "n": success.size,
            "return_mean": float(np.mean([episode.return_ for episode in episodes])),
            **({"purchased": float(np.mean(bought))} if bought else {})}


def success_interval(success: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """95 % interval of the mean success, over prompts: samples of one prompt are no news.

    Args:
        success: (P, samples) of 0 and 1.   draws: bootstrap resamples.
    """
    return bootstrap_interval(success.mean(1), draws)


def bootstrap_interval(values: Sequence[float], draws: int = 10_000) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of independent values; resamples from a fixed seed.

    Careful: of five values it is too narrow (it covers the mean of a normal distribution in about 84 % of cases, not
    95 %); `mean_interval` is not, where values are about normal. Of one value it has no width.
    """
    values = np.asarray(values, dtype=float)
    index = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[index].mean(1), [0.025, 0.975])
    return float(low), float(high)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of 2 to 16 values, e.g. of runs with different seeds."""
    if not 2 <= len(values) <= len(STUDENT) + 1:
        raise ValueError(f"expected 2 to {len(STUDENT) + 1} values, got {len(values)}")
    return pooled_interval([values])


def pooled_interval(groups: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Student's 95 % interval of the mean of the groups' means, e.g. of games, each with seeds of its own.

    Ours: the groups' variances may differ, so degrees of freedom are Welch's and Satterthwaite's, rounded down:

        s² = Σᵢ sᵢ² / nᵢ        ν = s⁴ / Σᵢ (sᵢ² / nᵢ)² / (nᵢ - 1)        mean ± t_ν s / groups
    """
    noise = np.array([np.var(group, ddof=1) / len(group) for group in groups])
    freedom = noise.sum() ** 2 / max(sum(noise**2 / [len(group) - 1 for group in groups]), 1e-300)
    half = STUDENT[min(int(freedom + 1e-9), len(STUDENT)) - 1] * float(noise.sum()) ** 0.5 / len(groups)
    mean = float(np.mean([np.mean(group) for group in groups]))
    return mean - half, mean + half


def describe(result: dict) -> str:
    """An evaluation in one line."""
    success, low, high = (100 * result[key] for key in ("success", "low", "high"))
    return (f"success {success:.1f} %, 95 % interval [{low:.1f}, {high:.1f}], "
            f"n = {result['n']} episodes on {result['prompts']} levels"
            + (f", purchased in {100 * result['purchased']:.1f} %" if "purchased" in result else ""))
