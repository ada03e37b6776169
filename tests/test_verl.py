"""ActFocus in verl: loaded by name, energies from its engine, Eq. (6) from its own loss on several ranks."""

import copy
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("verl", reason="needs verl 0.9.1 and TransferQueue (docs/scale.md)")

import transfer_queue as tq
from conftest import ROOT
from hydra import compose, initialize_config_module
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
from verl.utils import tensordict_utils as tu
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.utils.losses import ppo_loss

from actfocus import group_advantages, policy_loss, token_weights
from config import Config
from contrib.verl_actfocus import ActFocusTrainer, EnergyEngine
from methods import make_episodes, rollout_settings
from policy import load_model, load_tokenizer, score_tokens
from rollout import Batch, rollout

RANKS, MINI, SIZE = 2, 2, 4  # a mini-batch: 2 prompts' worth of 4 rollouts
NEEDED = ["trainer.v1.trainer_mode=actfocus", "actor_rollout_ref.actor.use_kl_loss=True",
          "actor_rollout_ref.actor.kl_loss_coef=0", "actor_rollout_ref.actor.clip_ratio_c=1e9",
          "actor_rollout_ref.actor.clip_ratio_high=0.28"]
OTHERS = ["algorithm.adv_estimator=grpo", f"actor_rollout_ref.rollout.n={SIZE}",
          f"actor_rollout_ref.actor.ppo_mini_batch_size={MINI}",
          "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=1"]
LOADED = """
import verl  # loads the plug-in
from verl.trainer.ppo.v1 import get_trainer_cls
from verl.workers.engine import EngineRegistry
print(get_trainer_cls("actfocus").__name__,
      *(EngineRegistry.get_engine_cls(model, "fsdp2").__name__ for model in ("language_model", "value_model")))
"""


def settings(*overrides):
    """verl's configuration as its command line makes it."""
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[*NEEDED, *OTHERS, *overrides])


def nested(rows):
    """Rows of unequal length as verl stores them."""
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


@pytest.fixture(scope="module")
def played():
    """Four prompts, four rollouts each, as this project has them, scored by the reference; the same as verl's fields.

    Rows are shuffled, as verl's are when it balances its ranks.
    """
    config = Config(num_prompts=4, num_generations=SIZE, mini_batch_size=MINI * SIZE)
    model, tokenizer = load_model(config.model), load_tokenizer(config.model)
    rows = rollout(model, tokenizer, make_episodes(config, range(4), SIZE), torch.Generator().manual_seed(0),
                   *rollout_settings(config))
    batch = Batch.of(rows)
    with torch.no_grad():
        batch.energy = score_tokens(model, batch.tokens, batch.is_response).energy
    batch.advantages = group_advantages(batch.returns, SIZE)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1)).tolist()
    rows, starts = [rows[i] for i in order], [rows[i].spans[0][0] for i in order]
    masks = [torch.tensor(row.is_response[start:]).long() for row, start in zip(rows, starts, strict=True)]
    scores = [torch.zeros(len(mask)).index_fill(0, mask.nonzero()[-1], row.episode.return_)
              for row, mask in zip(rows, masks, strict=True)]
    fields = {
        "prompts": nested([row.tokens[:start] for row, start in zip(rows, starts, strict=True)]),
        "responses": nested([row.tokens[start:] for row, start in zip(rows, starts, strict=True)]),
        "input_ids": nested([row.tokens for row in rows]),
        "position_ids": nested([range(len(row.tokens)) for row in rows]),
        "response_mask": nested(masks), "loss_mask": nested(masks), "rm_scores": nested(scores),
        "old_log_probs": nested([row.logp[start:] for row, start in zip(rows, starts, strict=True)]),
    }
    keys = [f"prompt{i // SIZE}_{i % SIZE}_0" for i in order]
    return model, batch.take(order), fields | {"uid": [key.split("_")[0] for key in keys]}, keys, starts


class Workers:
    """The worker groups: one process plays all ranks with the plug-in's engine."""

    def __init__(self, model, store):
        self.store, self.asked, self._dispatch_info = store, [], {"actor": list(range(RANKS))}
        self.engine = object.__new__(EnergyEngine)
        vars(self.engine).update(module=model, pad_to_length=False, use_ulysses_sp=False)

    def compute_ref_log_prob(self, batch):
        """What verl's worker does once it has the data."""
        self.asked.append(dict(batch.extra_info))
        data = tu.get_tensordict({name: self.store[name] for name in ("input_ids", "position_ids")}, batch.extra_info)
        inputs, arguments = self.engine.prepare_model_inputs(data)
        with torch.no_grad():
            output = self.engine.module(**inputs, use_cache=False)
            self.store |= self.engine.prepare_model_outputs(output, arguments, data, None)
        return batch


def prepared(monkeypatch, played, *overrides):
    """A trainer after its reference pass and its advantage, the store that its workers share, and its metrics."""
    model, _, fields, keys, _ = played
    store, metrics = dict(fields), {}

    def get(keys, partition_id, select_fields):
        chosen = {name: store[name] for name in select_fields if name in store and name != "uid"}
        return tu.get_tensordict(chosen | {"uid": store["uid"]} if "uid" in select_fields else chosen)

    def put(keys, partition_id, fields):
        store.update(fields.items())
        return tq.KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id=partition_id)

    monkeypatch.setattr(tq, "kv_batch_get", get)
    monkeypatch.setattr(tq, "kv_batch_put", put)
    trainer = ActFocusTrainer(settings(*overrides))
    trainer.tokenizer, trainer.ref_in_actor = load_tokenizer(Config.model), False
    trainer.actor_rollout_wg = trainer.ref_policy_wg = Workers(copy.deepcopy(model), store)
    batch = tq.KVBatchMeta(keys=keys, tags=[{}] * len(keys), partition_id="train")
    batch = trainer._compute_ref_log_prob(batch, metrics)
    assert trainer.ref_policy_wg.asked[0]["calculate_energy"] and "calculate_energy" not in batch.extra_info
    return trainer, trainer._compute_advantage(batch, metrics), store, metrics


def test_the_environment_variable_registers_the_trainer_and_the_engine():
    variables = {"VERL_USE_EXTERNAL_MODULES": "contrib.verl_actfocus", "PYTHONPATH": str(ROOT),
                 "VERL_ENGINE_DEVICE": "cuda", "VERL_ENGINE_VENDOR": "nvidia"}
    done = subprocess.run([sys.executable, "-c", LOADED], env=os.environ | variables, capture_output=True, text=True)
    assert done.stdout.split() == ["ActFocusTrainer", "EnergyEngine", "FSDPEngineWithValueHead"], done.stderr


def test_the_buffer_is_the_synchronous_trainer_s():
    assert type(ActFocusTrainer(settings()).replay_buffer) is ReplayBuffer


def test_the_engine_s_energies_and_log_probs_are_ours(monkeypatch, played):
    _, batch, _, _, starts = played
    _, _, store, _ = prepared(monkeypatch, played)
    with torch.no_grad():
        ours = score_tokens(played[0], batch.tokens, batch.is_response)
    for i, start in enumerate(starts):
        own = batch.is_response[i].nonzero().squeeze(1)
        for name, expected in (("energy", ours.energy), ("log_probs", ours.logp)):
            torch.testing.assert_close(store[name][i][own - 1], expected[i][own], rtol=0, atol=1e-5)
        torch.testing.assert_close(store["ref_log_prob"][i], store["log_probs"][i][start - 1 : -1])


@pytest.mark.parametrize("alpha, beta", [(0.1, 0.5), (1.0, 0.0), (0.0, 2.0)])
def test_verl_s_loss_of_every_mini_batch_is_eq_6(monkeypatch, played, alpha, beta):
    batch = played[1]
    options = [f"+trainer.v1.actfocus.{name}={value}" for name, value in (("alpha", alpha), ("beta", beta))]
    trainer, meta, store, metrics = prepared(monkeypatch, played, *options)
    weights = token_weights(batch.energy, batch.is_action, batch.is_reasoning, alpha, beta)
    share = (weights[batch.is_action].sum() / weights.sum()).item()
    assert metrics["actfocus/weight_share_action"] == pytest.approx(share, abs=1e-6)
    config = omega_conf_to_dataclass(trainer.config.actor_rollout_ref.actor)
    torch.manual_seed(2)
    logp = (batch.old_logp + 0.8 * torch.randn_like(batch.old_logp)).requires_grad_()
    ratio = (logp - batch.old_logp).exp()
    assert ((batch.advantages[:, None] < 0) & (ratio > 3))[batch.is_response].any()  # where verl would clip again
    numbers = {key: i for i, key in enumerate(meta.keys)}
    parts = [torch.tensor([numbers[key] for key in part.keys]) for part in meta.chunk(RANKS)]
    order = {"mini_batch_size": MINI * SIZE // RANKS, "epochs": 1, "dataloader_kwargs": {"shuffle": config.shuffle}}
    ranks = [tu.make_iterator(tu.get_tensordict({"row": part}), **order) for part in parts]
    totals = []
    for mini in zip(*ranks, strict=True):
        rows = [row for part in mini for row in part["row"].tolist()]
        tokens = sum(int(store["loss_mask"][i].sum()) for i in rows)
        losses = [verl_loss(config, store, logp, i, tokens) for i in rows]  # micro-batches of one
        loss = sum(losses) / RANKS  # FSDP's mean over ranks
        expected = policy_loss(logp[rows], batch.old_logp[rows], batch.advantages[rows], weights[rows])
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and abs(expected.item()) > 1e-3
        ours, theirs = (torch.autograd.grad(value, logp, retain_graph=True)[0] for value in (expected, loss))
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-6)
        totals.append(weights[rows].sum().item() / tokens)
    assert len(totals) == 2  # and one denominator for both would not have passed
    assert alpha == 1 or abs(totals[0] - totals[1]) > 1e-4


def verl_loss(config, store, logp, row, tokens):
    """verl's actor loss of a micro-batch of one row, as its engine calls it on one of the ranks."""
    names = ("prompts", "responses", "response_mask", "old_log_probs", "advantages", "ref_log_prob")
    data = tu.get_tensordict({name: nested([store[name][row]]) for name in names},
                             {"dp_size": RANKS, "batch_num_tokens": tokens, "global_batch_size": MINI * SIZE})
    output = logp[row, : len(store["input_ids"][row])].roll(-1)  # entry t belongs to token t + 1
    return ppo_loss(config, {"log_probs": torch.nested.as_nested_tensor([output], layout=torch.jagged)}, data)[0]


def test_alpha_one_beta_zero_leaves_verl_s_advantages_and_the_critic_s_returns(monkeypatch, played):
    _, _, plain, _ = prepared(monkeypatch, played, "+trainer.v1.actfocus.alpha=1", "+trainer.v1.actfocus.beta=0")
    _, _, store, _ = prepared(monkeypatch, played)
    assert torch.equal(plain["advantages"].values(), plain["returns"].values())  # with GRPO verl has them equal
    assert torch.equal(store["returns"].values(), plain["returns"].values())
    assert not torch.equal(store["advantages"].values(), plain["advantages"].values())


@pytest.mark.parametrize("wrong", [
    "actor.strategy=megatron", "actor.shuffle=True", "actor.loss_agg_mode=seq-mean-token-mean",
    "actor.clip_ratio_c=3.0", "actor.use_kl_loss=False", "model.use_fused_kernels=True"])
def test_settings_that_cannot_be_eq_6_are_refused(wrong):
    with pytest.raises(ValueError, match=wrong.split("=")[0]):
        ActFocusTrainer(settings(f"actor_rollout_ref.{wrong}"))
