"""ActFocus inside verl: its synchronous trainer, with the weights of Eq. (5) under the denominator of Eq. (6).

arXiv:2605.14558v1. verl's "token-mean" sums over a mini-batch (one optimiser step: its micro-batches, all ranks) and
divides by N, the mini-batch's response tokens. Advantages are (B, T), so as in TRL
    Aₜ ← wₜ · Aₜ · N / Σ w        makes it Eq. (6), as min and clip let a factor ≥ 0 pass
B trajectories of a batch, T tokens of the longest response. verl's batch has the reference's log-probs, from which no
energy can be had: log softmax is what is left of the logits without their log-sum-exp. So verl's FSDP engine makes way
for one whose reference pass returns Eq. (4) too, of the logits it has at hand. `docs/scale.md` has the command.

Run, with verl 0.9.1 on a CPU (tests/test_verl.py): both classes, their registration, verl's advantage, engine and loss
on a small batch. Only read: the workers around them, and any training at all, which takes GPUs.
"""

import torch
import transfer_queue as tq
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from verl.trainer.ppo.v1 import PPOTrainerSync, register_trainer
from verl.utils import tensordict_utils as tu
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead
from verl.workers.utils.padding import response_from_nested, response_to_nested

from actfocus import token_weights
from contrib.responses import response_classes
from energy import token_energy

FSDP = ["fsdp", "fsdp2"]
NEEDED = {"actor.strategy": FSDP, "actor.policy_loss.loss_mode": ("vanilla",), "actor.shuffle": (False,),
          "actor.loss_agg_mode": ("token-mean",), "actor.clip_ratio_c": (1e9,),  # far above e²⁰: verl clips twice
          "actor.use_kl_loss": (True,),  # or there is no reference; kl_loss_coef may be 0
          "model.use_remove_padding": (True,), "model.use_fused_kernels": (False,)}


@EngineRegistry.register(model_type="language_model", backend=FSDP, device="cuda", vendor=["nvidia", "amd"])
class EnergyEngine(FSDPEngineWithLMHead):
    """verl's own engine; as it looks for the vendor's first, it takes this one for the policy and the reference."""

    def prepare_model_outputs(self, output, output_args, micro_batch, logits_processor_func):
        """Log-probs as ever, and "energy" where it is asked for; entry t belongs to token t + 1."""
        result = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if tu.get_non_tensor_data(micro_batch, "calculate_energy", False):
            parts = output.logits.squeeze(0).split(2048)  # tokens whose logits exist in float32 at one time
            energy = torch.cat([token_energy(part.float()) for part in parts])
            energy = self._gather_and_unpad_packed(energy, output_args["pad_size"])
            result["energy"] = torch.nested.nested_tensor_from_jagged(energy, micro_batch["input_ids"].offsets())
        return result


@register_trainer("actfocus")
class ActFocusTrainer(PPOTrainerSync):
    """The trainer "sync" with α and β of Eq. (5) from `trainer.v1.actfocus.alpha` and `.beta`."""

    def __init__(self, config: DictConfig):
        got = {name: OmegaConf.select(config.actor_rollout_ref, name) for name in NEEDED}
        if wrong := [f"{name} is {got[name]}, not {allowed}" for name, allowed in NEEDED.items()
                     if got[name] not in allowed]:
            raise ValueError("actor_rollout_ref: " + "; ".join(wrong))
        super().__init__(config)

    def _build_replay_buffer(self):
        self.trainer_mode = "sync"  # Careful: under another name verl takes the buffer of its asynchronous trainers
        return super()._build_replay_buffer()

    def _compute_ref_log_prob(self, batch: tq.KVBatchMeta, metrics: dict) -> tq.KVBatchMeta:
        batch.extra_info["calculate_energy"] = True
        batch = super()._compute_ref_log_prob(batch, metrics)
        del batch.extra_info["calculate_energy"]  # the policy's passes do without
        return batch

    def _compute_advantage(self, batch: tq.KVBatchMeta, metrics: dict) -> tq.KVBatchMeta:
        batch = super()._compute_advantage(batch, metrics)
        fields = ["responses", "response_mask", "loss_mask", "advantages", "energy"]
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        nested = data["response_mask"]
        data["energy"] = response_from_nested(data["energy"], nested)
        scaled = self._scale(data.to_padded_tensor(), metrics)
        fields = TensorDict({"advantages": response_to_nested(scaled, nested)}, batch_size=len(batch))
        return tq.kv_batch_put(keys=batch.keys, partition_id=batch.partition_id, fields=fields)

    def _scale(self, data: TensorDict, metrics: dict) -> torch.Tensor:
        is_reasoning, is_action = response_classes(self.tokenizer, data["responses"], data["response_mask"].bool())
        options = self.config.trainer.v1.get("actfocus", {})
        weights = token_weights(data["energy"].float(), is_action, is_reasoning, options.get("alpha", 0.1),
                                options.get("beta", 0.5))
        metrics["actfocus/weight_share_action"] = (weights[is_action].sum() / weights.sum()).item()
        actor, rollout = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.rollout
        minis = len(weights) // (actor.ppo_mini_batch_size * rollout.n)
        ranks = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1  # a rank's rows are adjacent, and cut in order
        rows = torch.arange(len(weights)).view(ranks, minis, -1).transpose(0, 1).flatten(1)  # (minis, trajectories)
        counts, totals = (mask.sum(1)[rows].sum(1) for mask in (data["loss_mask"], weights))  # N, Σ w
        scale = torch.empty(len(weights))
        scale[rows] = (counts / totals.where(totals > 0, 1))[:, None].expand(rows.shape)
        return data["advantages"] * weights * scale[:, None]
