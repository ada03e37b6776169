"""ActFocus inside TRL: a GRPOTrainer whose tokens have the weights of Eq. (5) under the denominator of Eq. (6).

arXiv:2605.14558v1. TRL's "dapo" loss sums over a mini-batch (one optimiser step: its micro-batches, all processes) and
divides by N̄, the response tokens of a generation batch over its mini-batches. It takes advantages of (B, T):
    Aₜ ← wₜ · Aₜ · N̄ / Σ w        makes it Eq. (6), as min and clip let a factor ≥ 0 pass
B rows of one process, T tokens of the longest completion. A response is a run of tokens that `env_mask` keeps. Energies
are those of TRL's reference model (its `beta` > 0), else of a frozen copy of the model as it came.
Differs from train.py: TRL adds 1e-4 to a group's std, not 1e-6; its KL and entropy terms stay as they are.
"""

import copy

import torch
from trl import GRPOTrainer

from actfocus import token_weights
from contrib.responses import response_classes
from energy import token_energy


class ActFocusTrainer(GRPOTrainer):
    """GRPOTrainer with α (`alpha`) and β (`reach`) of Eq. (5); its own `beta` is the coefficient of the KL."""

    def __init__(self, *args, alpha: float = 0.1, reach: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.alpha, self.reach = alpha, reach
        self.minis, rest = divmod(self.args.steps_per_generation, self.args.gradient_accumulation_steps)
        got = (self.loss_type, self.importance_sampling_level, self.args.sync_ref_model, rest)
        if got != ("dapo", "token", False, 0):
            raise ValueError(f"needs loss dapo, level token, a fixed reference and whole mini-batches, got {got}")
        if self.ref_model is None and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            raise ValueError("a model split over processes needs TRL's own reference: set beta above 0")
        self.reference = self.ref_model or copy.deepcopy(self.model).requires_grad_(False).eval()
        for module in self.reference.modules() if self.ref_model is None else ():
            vars(module).pop("forward", None)  # Careful: TRL's patched forward runs the model it was made for

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict]) -> dict:
        out = super()._generate_and_score_completions(inputs)
        weights = self._weights(out, (out["completion_mask"] * out.get("tool_mask", 1)).bool())
        with torch.random.fork_rng(devices=[]):  # Careful: TRL draws this order next, and cuts mini-batches by it
            rows = torch.randperm(len(weights)).view(self.minis if self.model.training else 1, -1).to(weights.device)
        totals = self.accelerator.reduce(weights.sum(1)[rows].sum(1), "sum")  # Σ w of each mini-batch
        scale = torch.zeros_like(weights[:, :1])
        scale[rows] = (out["num_items_in_batch"] / len(rows) / totals.where(totals > 0, 1))[:, None, None]
        return out | {"weights": weights, "advantages": out["advantages"][:, None] * weights * scale}

    def _weights(self, out: dict, is_response: torch.Tensor) -> torch.Tensor:
        rows, width = is_response.shape
        is_action = response_classes(self._tokenizer, out["completion_ids"], is_response)[1]
        kind = is_response.int() + is_action.int()  # 0 neither, 1 reasoning, 2 action
        ids, mask = (torch.cat([out["prompt_" + name], out["completion_" + name]], 1) for name in ("ids", "mask"))
        energy = torch.zeros(is_response.shape, device=ids.device)
        for part in torch.arange(rows).split(self.args.per_device_train_batch_size):
            logits = self.reference(ids[part], mask[part], logits_to_keep=width + 1, use_cache=False).logits
            energy[part] = token_energy(logits[:, -width - 1 : -1].float())  # the last one predicts nothing
        energy, kind = self.accelerator.gather(self.accelerator.pad_across_processes((energy, kind), dim=1))
        weights = token_weights(energy, kind == 2, kind == 1, self.alpha, self.reach)  # μ_E and σ_E of all processes
        return weights[self.accelerator.process_index * rows :][:rows, :width]
