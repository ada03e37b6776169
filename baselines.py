"""What ActFocus is combined with besides PPO and GRPO: the KL term and the trajectory filter.

KL estimators: Eq. (15) of arXiv:2605.14558v1 and its k1, k2, k3 forms. StarPO-S: the paper's filter of prompt groups.
Pure functions; B rows, T tokens, P groups of G rows.
"""

from torch import Tensor

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
