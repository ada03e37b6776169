"""The equations of arXiv:2605.14558v1 and of its rivals as plain loops: slow and obvious, on lists, without torch.

Rows are lists of their own lengths, so there is no padding to get wrong. The tests hold the tensor code equal to this.
"""

import math


def token_energy(logits):
    """E = -log Σᵥ exp f(v), one position. Eq. (4)."""
    total = 0.0
    for f in logits:
        total += math.exp(f)
    return -math.log(total)


def token_entropy(logits):
    """H = -Σᵥ pᵥ log pᵥ, one position."""
    total = sum(math.exp(f) for f in logits)
    entropy = 0.0
    for f in logits:
        p = math.exp(f) / total
        entropy -= p * math.log(p)
    return entropy


def classify_tokens(pieces):
    """For every token whether it is an action token, character by character and without a regular expression."""
    text = "".join(pieces)
    inside = [False] * len(text)
    thought = _skip_space(text, 0)
    if text.startswith("<think>", thought) and "</think>" in text:
        opening = _skip_space(text, text.index("</think>") + len("</think>"))
        start = opening + len("<answer>")
        if text.startswith("<answer>", opening) and "</answer>" in text[start:]:
            for i in range(start, text.index("</answer>", start)):
                inside[i] = not text[i].isspace()
    is_action, position = [], 0
    for piece in pieces:
        if piece:
            is_action.append(any(inside[position : position + len(piece)]))
        else:  # first bytes of the character that starts here, if there is one
            is_action.append(position < len(text) and inside[position])
        position += len(piece)
    return is_action


def _skip_space(text, i):
    while i < len(text) and text[i].isspace():
        i += 1
    return i


def token_weights(energy, is_action, is_reasoning, alpha, beta, eps):
    """w_t of every token of every row. Eq. (5), with the mean and std of Eq. (16)."""
    action_energies = []
    for i in range(len(energy)):
        for t in range(len(energy[i])):
            if is_action[i][t]:
                action_energies.append(energy[i][t])
    n = len(action_energies)
    mean = sum(action_energies) / n if n else 0.0
    variance = sum((e - mean) ** 2 for e in action_energies) / n if n else 0.0
    std = math.sqrt(variance + eps)
    weights = []
    for i in range(len(energy)):
        row = []
        for t in range(len(energy[i])):
            if is_action[i][t]:
                row.append(1 + beta / (1 + math.exp(-(energy[i][t] - mean) / std)))
            elif is_reasoning[i][t]:
                row.append(alpha)
            else:
                row.append(0.0)
        weights.append(row)
    return weights


def policy_loss(logp, old_logp, advantages, weights, clip_low, clip_high):
    """The weighted clipped surrogate over all tokens of all rows. Eq. (6)."""
    total, total_weight = 0.0, 0.0
    for i in range(len(logp)):
        for t in range(len(logp[i])):
            if weights[i][t] == 0:
                continue
            ratio = math.exp(logp[i][t] - old_logp[i][t])
            clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
            total += weights[i][t] * min(ratio * advantages[i][t], clipped * advantages[i][t])
            total_weight += weights[i][t]
    return -total / total_weight if total_weight else 0.0


def group_advantages(returns, group_size, eps):
    """GRPO's (R - mean) / (std + ε) inside every group. Eqs. (3) and (13)."""
    advantages = []
    for first in range(0, len(returns), group_size):
        group = returns[first : first + group_size]
        mean = sum(group) / group_size
        for value in group:
            if min(group) == max(group):
                advantages.append(0.0)
            else:
                variance = sum((other - mean) ** 2 for other in group) / (group_size - 1)
                advantages.append((value - mean) / (math.sqrt(variance) + eps))
    return advantages


def gae(rewards, values, is_response, gamma, lam):
    """A_t = Σ_l (γλ)^l δ_{t+l} over the response tokens of one row, everything else cut out first. GAE, Eq. (12)."""
    positions = [t for t in range(len(values)) if is_response[t]]
    advantages = [0.0] * len(values)
    for k in range(len(positions)):
        for distance in range(len(positions) - k):
            t = positions[k + distance]
            is_last = k + distance == len(positions) - 1
            next_value = 0.0 if is_last else values[positions[k + distance + 1]]
            delta = rewards[t] + gamma * next_value - values[t]
            advantages[positions[k]] += (gamma * lam) ** distance * delta
    return advantages


def gae_with_discounts(rewards, values, is_response, gammas, lam):
    """The same with γ_i after token i: A_t = Σ_l (Π_{i<l} γ_{t+i} λ) δ_{t+l} over the response tokens of one row."""
    positions = [t for t in range(len(values)) if is_response[t]]
    advantages = [0.0] * len(values)
    for k in range(len(positions)):
        factor = 1.0
        for t, following in zip(positions[k:], [*positions[k + 1 :], None], strict=True):
            next_value = 0.0 if following is None else values[following]
            advantages[positions[k]] += factor * (rewards[t] + gammas[t] * next_value - values[t])
            factor *= gammas[t] * lam
    return advantages


def whiten(values, eps):
    """(x - mean) / sqrt(variance + ε) of one list."""
    mean = sum(values) / len(values)
    variance = sum((x - mean) ** 2 for x in values) / len(values)
    return [(x - mean) / math.sqrt(variance + eps) for x in values]


def varied_groups(returns, group_size, num_groups):
    """Rows of the first groups with two different returns, then of the first others, all in order. DAPO."""
    varied, equal = [], []
    for first in range(0, len(returns), group_size):
        group = returns[first : first + group_size]
        (equal if min(group) == max(group) else varied).append(first)
    rows = []
    for first in sorted([*varied, *equal][:num_groups]):
        for i in range(group_size):
            rows.append(first + i)
    return rows


def overlong_penalty(length, max_length, buffer):
    """0 up to L_max - L_buf, from there in a straight line to -1 at L_max. DAPO Eq. (13)."""
    if length <= max_length - buffer:
        return 0.0
    return ((max_length - buffer) - length) / buffer


def empg_advantages(advantages, entropies, kappa, kappa_bonus, zeta):
    """The advantage of every step of every row; a row has as many steps as entropies. EMPG Eqs. (7) to (12)."""
    every = [entropy for row in entropies for entropy in row]
    low, high = min(every), max(every)

    def relative(entropy):
        return (entropy - low) / (high - low + 1e-8)

    mean_confidence = sum(math.exp(-kappa * relative(entropy)) for entropy in every) / len(every)
    modulated = []
    for i in range(len(entropies)):
        row = []
        for k in range(len(entropies[i])):
            g = math.exp(-kappa * relative(entropies[i][k])) / mean_confidence
            is_last = k == len(entropies[i]) - 1
            f = 0.0 if is_last else math.exp(-kappa_bonus * relative(entropies[i][k + 1]))
            row.append(advantages[i] * g + zeta * f)
        modulated.append(row)
    mean = sum(sum(row) for row in modulated) / len(every)
    return [[value - mean for value in row] for row in modulated]


def poad_gae(actions, rewards, gamma, lam):
    """A of every token of every action of one row; `actions[k][j]` is V before token j of action k. POAD."""
    advantages = [[0.0] * len(action) for action in actions]
    gae = 0.0
    for k in reversed(range(len(actions))):
        n, done = len(actions[k]), k == len(actions) - 1
        for j in reversed(range(n)):
            if j == n - 1:
                next_value = 0.0 if done else actions[k + 1][0]
                gae = rewards[k] + gamma * next_value - actions[k][j] + gamma * lam * (0.0 if done else gae)
            else:
                gae = actions[k][j + 1] - actions[k][j] + lam * gae
            advantages[k][j] = gae
    return advantages


def ntpo_gae(actions, rewards, gamma, lam):
    """The same with γ after every token. NTPO."""
    advantages = [[0.0] * len(action) for action in actions]
    next_value = gae = 0.0
    for k in reversed(range(len(actions))):
        for j in reversed(range(len(actions[k]))):
            reward = rewards[k] if j == len(actions[k]) - 1 else 0.0
            gae = reward + gamma * next_value - actions[k][j] + gamma * lam * gae
            next_value = actions[k][j]
            advantages[k][j] = gae
    return advantages


def value_loss(value, old_value, target, clip):
    """½ of the squared error of one token's value, or of the value kept near its old one if that is worse."""
    squared = (value - target) ** 2
    if clip:
        near = min(max(value, old_value - clip), old_value + clip)
        squared = max(squared, (near - target) ** 2)
    return squared / 2


def criticality(actions, num_states):
    """H(s) / n(s) of every state; an action is its source state and its tokens' log π. CARL."""
    scores = []
    for state in range(num_states):
        surprises = []
        for source, logps in actions:
            if source == state:
                surprises.append(-sum(logps) / len(logps))
        n = len(surprises)
        scores.append(sum(surprises) / n / n if n else -math.inf)
    return scores


def tree_values(parent, leaf_values):
    """V of every state: R at a leaf, else the mean over its children, each of which is asked in turn. CARL."""

    def value(state):
        children = [child for child in range(len(parent)) if parent[child] == state]
        if not children:
            return leaf_values[state]
        return sum(value(child) for child in children) / len(children)

    return [value(state) for state in range(len(parent))]


def edge_advantages(parent, values):
    """V(child) - V(parent), 0 at a root. CARL."""
    return [0.0 if u < 0 else values[v] - values[u] for v, u in enumerate(parent)]


def update_set(parent):
    """Whether a state has a sibling: its parent stands more than once in the list of parents. CARL."""
    return [u >= 0 and parent.count(u) > 1 for u in parent]


def ranks(values):
    """A rank is 1 + how many are smaller + half of the others that are equal."""
    return [1 + sum(b < a for b in values) + (sum(b == a for b in values) - 1) / 2 for a in values]


def spearman(first, second):
    """Pearson's correlation of the ranks."""
    return pearson(ranks(first), ranks(second))


def pearson(first, second):
    """Covariance over the product of spreads."""
    means = sum(first) / len(first), sum(second) / len(second)
    covariance = sum((a - means[0]) * (b - means[1]) for a, b in zip(first, second, strict=True))
    return covariance / math.sqrt(sum((a - means[0]) ** 2 for a in first) * sum((b - means[1]) ** 2 for b in second))


def partial_spearman(first, second, given):
    """Pearson's correlation of what a least-squares line in the third's ranks leaves of the ranks of the others."""
    given = ranks(given)
    mean, left = sum(given) / len(given), []
    for values in (ranks(first), ranks(second)):
        slope = sum((g - mean) * v for g, v in zip(given, values, strict=True)) / sum((g - mean) ** 2 for g in given)
        left.append([v - slope * (g - mean) for g, v in zip(given, values, strict=True)])
    return pearson(*left)
