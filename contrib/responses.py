"""Classes of the tokens that an engine hands over as ids and a mask of what the policy wrote; for the adapters here.

(arXiv:2605.14558v1: 𝓣_reason and 𝓣_act of Eq. (5).)
"""

from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from actfocus import classify_tokens
from rollout import token_pieces


def response_classes(tokenizer: PreTrainedTokenizerBase, tokens: Tensor, is_response: Tensor) -> tuple[Tensor, Tensor]:
    """𝓣_reason and 𝓣_act of whole rows; a run of tokens that the policy wrote is one response.

    Args:
        tokens: (B, T) ids.   is_response: (B, T) bool; observations, tools' answers and padding are False.
    Returns:
        is_reasoning, is_action: (B, T) bool, disjoint, together `is_response`.
    """
    is_action = torch.zeros_like(is_response)
    for row, (ids, written) in enumerate(zip(tokens.tolist(), is_response.tolist(), strict=True)):
        end = 0
        for own, run in groupby(written):
            start, end = end, end + len(list(run))
            if own:
                is_action[row, start:end] = classify_tokens(token_pieces(tokenizer, ids[start:end]))[1]
    return is_response & ~is_action, is_action
