"""Graded hints: 1 asks the right question, 2 names the trap, 3 lists the steps.

    python exercises/hints.py gae 1
"""

import sys

HINTS = {
    "token_energy": (
        "Which of the dimensions does Σᵥ run over? Try three logits 0 on paper: the energy is -log 3.",
        "exp(500) is infinite in float32 and exp(-2000) is 0. With m the largest logit: log Σ exp f = m + log Σ "
        "exp(f - m).",
        "One line: torch has this sum-and-log under a name that says so. Mind the dimension and the sign.",
    ),
    "group_advantages": (
        "Give the returns the shape (P, G): then every group is a row, and all statistics run along it.",
        "Two kinds of groups need care: a group of one, whose std is NaN, and equal returns, whose computed mean can"
        " be off by one bit. Do not ask whether the std is 0; ask whether the returns are equal.",
        "View as (P, G); subtract the row means (keepdim); divide by row std + ε (torch.std divides by G - 1); where"
        " all returns of the row equal its first, put 0 with torch.where, which also gets rid of the NaN; view as "
        "(B,).",
    ),
    "token_weights": (
        "How many numbers does μ_E average over? Not B · T, and not one row's either. Pick them out with the mask "
        "first.",
        "torch.std and torch.var divide by N - 1 unless told otherwise (correction). Elsewhere energies may be NaN, "
        "so sums with a mask multiplied in go wrong; indexing with the mask does not.",
        "Start with α where is_reasoning and 0 elsewhere. Take the detached energies of the action tokens, (N,). If "
        "there are any: standardise them with √(variance + ε), and write 1 + β · sigmoid of that back at the same "
        "places.",
    ),
    "policy_loss": (
        "Work through four tokens on paper: ρ above and below 1, A above and below 0. In which two does the clip "
        "decide?",
        "NaN · 0 is NaN, in the value and in the gradient: tokens of weight 0 must leave before the exp. A huge ρ "
        "times an A of 0 is NaN too once exp overflows: float32 does beyond e⁸⁸.",
        "Spread (B,) advantages over the row. Where the weight is not above 0 put 0 for log ρ and for A "
        "(torch.where). ρ = exp of log ρ, capped far beyond the clip range; torch.min of the two products; weigh, "
        "sum, negate; divide by total_weight, or else by the sum of the weights, or by 1 if that is 0. Detach all "
        "but logp.",
    ),
    "classify_tokens": (
        "Classes go by characters. Where in the joined text does token t begin, and where does it end?",
        "A token can reach across an edge, as in `>Up` or ` Right</`: look at the part of it that lies inside. A "
        "piece can be empty: then the character that begins at its place decides.",
        "Join the pieces and ask answer_span (None: nothing is action). Walk along with a running position; cut the "
        "text from max(position, start) to min(position + length, end), where an empty piece counts as length 1; the"
        " token is an action token if something is left after strip(). Tensors of bool, one the opposite of the "
        "other.",
    ),
    "gae": (
        "A row is response, observation, response. Which V follows the last token of the first response?",
        "Carry V_next and A_next from right to left, one number a row. At a token that is no response they stay as "
        "they are: neither 0 nor multiplied by γ. NaN can stand there, so choose with torch.where instead of "
        "multiplying.",
        "Zeros (B, T) for the result, zeros (B,) for both things carried. For t from T - 1 down to 0: δ, then A; "
        "write A where is_response, else 0; update what is carried where is_response, else keep it. Target = A + V "
        "at responses.",
    ),
}


def main(argv: list[str]) -> int:
    """Print one hint; exit code 2 for a name or a level that does not exist."""
    if len(argv) != 2 or argv[0] not in HINTS or argv[1] not in ("1", "2", "3"):
        print(f"usage: python exercises/hints.py {{{','.join(HINTS)}}} {{1,2,3}}", file=sys.stderr)
        return 2
    print(HINTS[argv[0]][int(argv[1]) - 1])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
