"""LoRA (arXiv:2106.09685): what is trained is a low-rank addition to every linear layer, through the package peft.

    W x  →  W x + 2 · B A x        A (rank, in), B (out, rank), B = 0 at the start

W is frozen, so π_ref is the policy without the addition and needs no second copy, gradients and Adam's state are those
of A and B alone. Every checkpoint is saved merged, W + 2 B A, as an ordinary model folder; A and B lie beside it.

    pip install peft && python train.py --lora_rank 16 --learning_rate 1e-3
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

SCALE = 2  # of B A; ours


class AdapterOff:
    """π_ref with LoRA: the policy's own weights, with A and B switched off while it is called."""

    def __init__(self, policy: PreTrainedModel):
        self.policy = policy

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.policy.device

    @torch.no_grad()
    def base_model(self, **inputs):
        """The body's forward pass."""
        layers = _adapted(self.policy).values()
        try:
            for layer in layers:
                layer.enable_adapters(False)
            return self.policy.base_model(**inputs)
        finally:
            for layer in layers:
                layer.enable_adapters(True)

    def get_output_embeddings(self) -> nn.Module:
        """The head, which has no adapter."""
        return self.policy.get_output_embeddings()


def add_lora(model: PreTrainedModel, rank: int, seed: int) -> None:
    """Freeze every weight of the model, and add A and B to its linear layers but the head."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError(f"--lora_rank {rank}: needs a package: pip install peft") from None
    torch.manual_seed(seed)  # A is drawn from torch's own generator
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules="all-linear"), model)


def merged_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state dict of the model without adapters that computes the same."""
    weights = {name.replace(".base_layer.", "."): weight for name, weight in model.state_dict().items()
               if ".lora_" not in name}
    for name, layer in _adapted(model).items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + layer.get_delta_weight("default")
    return weights


def _adapted(model: nn.Module) -> dict[str, nn.Module]:
    from peft.tuners.lora import LoraLayer

    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
