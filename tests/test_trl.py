"""ActFocus in TRL: GRPOTrainer where all weights are 1, Eq. (6) where they are not, on one process and on two."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("trl", reason="needs pip install trl accelerate")

from conftest import ROOT
from trl import GRPOTrainer

from actfocus import policy_loss, token_weights
from checkpoint import read_lines
from config import Config
from contrib.trl_example import Player, build
from policy import load_model, score_tokens
from rollout import Batch
from train import score_batch

CONFIG = Config(num_prompts=2, num_generations=4, mini_batch_size=8, max_steps=3, entropy_coef=0.0, seed=10)
MICRO = {"per_device_train_batch_size": 2, "steps_per_generation": 4}
ONE_MINI_BATCH = MICRO | {"gradient_accumulation_steps": 4}
TWO_MINI_BATCHES = MICRO | {"gradient_accumulation_steps": 2}

SCRIPT = """
import gc
import sys
from dataclasses import replace
import torch
from contrib.trl_example import Player, build, finish
from test_trl import CONFIG, ONE_MINI_BATCH, parameters

class Shared(Player):
    def play(self, levels, trainer):  # everyone plays all levels with the same luck and keeps a share
        self.generator = torch.Generator().manual_seed(0)
        count, first = len(levels), trainer.accelerator.process_index * len(levels)
        rows = super().play([level for level in trainer.train_dataset["prompt"] for _ in range(4)], trainer)
        assert trainer.accelerator.num_processes == int(sys.argv[2])
        assert [str(row.episode.seed) for row in rows[first : first + count]] == levels
        return rows[first : first + count]

trainer = build(replace(CONFIG, max_steps=1), **ONE_MINI_BATCH | {
    "per_device_train_batch_size": 2 // int(sys.argv[2]), "output_dir": sys.argv[1]})
trainer.rollout_func = Shared(CONFIG)
trainer.train()
if trainer.accelerator.is_main_process:
    torch.save(parameters(trainer), sys.argv[1] + "/" + sys.argv[2])
finish(trainer)
wrappers = [one for one in gc.get_objects() if isinstance(one, torch.nn.parallel.DistributedDataParallel)]
assert not wrappers and not torch.distributed.is_initialized()
"""


def parameters(trainer):
    """All weights as one vector."""
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def first_generation(folder, config=CONFIG, **options):
    """A trainer with its first generation batch, cut into micro-batches, and that batch as this project has it."""
    trainer = build(config, output_dir=str(folder), **options)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    levels = [level for level in trainer.train_dataset["prompt"][:2] for _ in range(4)]
    batch = Batch.of(Player(config).play(levels, trainer))  # the same luck as the trainer's own
    batch.energy = score_batch(load_model(config.model), batch, config).energy
    batch.weights = token_weights(batch.energy, batch.is_action, batch.is_reasoning, config.alpha, config.beta)
    groups = batch.returns.view(-1, 4)
    batch.advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)
    trainer._prepare_inputs([{"prompt": level} for level in levels])
    return trainer, batch


def move(model, distance=0.1):
    """Another policy, far enough for ratios beyond both clips."""
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight += distance * weight.std() * torch.randn_like(weight)


def rows_of(parts, batch):
    """The batch's rows that lie in some micro-batches; equal rows are as good as each other."""
    number = {tuple(ids[:n].tolist()): i for i, (ids, n) in enumerate(zip(batch.tokens, batch.lengths, strict=True))}
    pairs = [(part, i) for part in parts for i in range(len(part["prompt_ids"]))]
    return [number[tuple(id for side in ("prompt", "completion")
                         for id in part[f"{side}_ids"][i][part[f"{side}_mask"][i].bool()].tolist())]
            for part, i in pairs]


@pytest.mark.parametrize("options", [ONE_MINI_BATCH, TWO_MINI_BATCHES])
def test_loss_and_gradient_of_every_mini_batch_are_eq_6(tmp_path, options):
    trainer, batch = first_generation(tmp_path, **options)
    weights, size = list(trainer.model.parameters()), options["gradient_accumulation_steps"]
    totals, several = [], size < 4
    if several:  # Careful: with one mini-batch TRL takes the ratio to be 1
        move(trainer.model)
    for start in range(0, 4, size):
        parts = trainer._buffered_inputs[start : start + size]
        loss = sum(trainer.compute_loss(trainer.model, part) for part in parts)
        mini = batch.take(rows_of(parts, batch))
        logp = score_tokens(trainer.model, mini.tokens, mini.is_response).logp
        expected = policy_loss(logp, mini.old_logp, mini.advantages, mini.weights)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6) and abs(expected.item()) > 1e-3
        gradients = (torch.autograd.grad(value, weights) for value in (expected, loss))
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
        ratio = (logp - mini.old_logp)[mini.is_response].exp()
        assert not several or (ratio.min() < 0.8 and ratio.max() > 1.28)
        totals.append(mini.weights.sum().item())
    assert len(set(totals)) == len(totals)  # dividing by the mean of Σ w would not have passed


def test_only_responses_have_weight_and_actions_have_most(tmp_path):
    trainer, batch = first_generation(tmp_path, **TWO_MINI_BATCHES)
    observed = [(part["completion_mask"] > part["tool_mask"]).sum() for part in trainer._buffered_inputs]
    assert sum(observed) > 0  # the environment's words are among the tokens
    for part in trainer._buffered_inputs:
        is_response = (part["completion_mask"] * part["tool_mask"]).bool()
        assert (part["weights"] > 0).equal(is_response) and (part["advantages"][~is_response] == 0).all()
    given = torch.cat([part["weights"][part["weights"] > 0] for part in trainer._buffered_inputs])
    torch.testing.assert_close(given.sort().values, batch.weights[batch.is_response].sort().values, rtol=0, atol=1e-5)


def test_alpha_one_beta_zero_is_bit_for_bit_grpo_trainer(tmp_path):
    ones = replace(CONFIG, alpha=1.0, beta=0.0)
    trainers = [build(replace(ones, weights=weights), max_steps=3, output_dir=str(tmp_path), **ONE_MINI_BATCH)
                for weights in ("uniform", "actfocus")]
    assert [type(trainer).__name__ for trainer in trainers] == ["GRPOTrainer", "ActFocusTrainer"]
    before = parameters(trainers[0])
    for trainer in trainers:
        torch.manual_seed(0)
        trainer.train()
        assert trainer.state.global_step == 3
    plain, ours = map(parameters, trainers)
    assert torch.equal(plain, ours) and not torch.equal(plain, before)


def test_energies_are_those_of_trl_s_reference_model_where_it_has_one(tmp_path):
    alone, _ = first_generation(tmp_path, **ONE_MINI_BATCH)
    with_kl, _ = first_generation(tmp_path, replace(CONFIG, kl_coef=0.01), **ONE_MINI_BATCH)
    assert alone.ref_model is None and with_kl.reference is with_kl.ref_model
    assert not any(weight.requires_grad for weight in alone.reference.parameters())
    for one, other in zip(alone._buffered_inputs, with_kl._buffered_inputs, strict=True):
        assert torch.equal(one["weights"], other["weights"])


def test_the_frozen_copy_stays_when_the_policy_moves(tmp_path):
    trainer, batch = first_generation(tmp_path, **ONE_MINI_BATCH)
    before = trainer.reference(batch.tokens).logits
    move(trainer.model)
    assert torch.equal(trainer.reference(batch.tokens).logits, before)
    assert not torch.allclose(trainer.model(batch.tokens).logits, before, atol=0.1)


@pytest.mark.parametrize("wrong", [{"loss_type": "grpo"}, {"importance_sampling_level": "sequence"},
                                   {"steps_per_generation": 4, "gradient_accumulation_steps": 8}])
def test_settings_that_cannot_be_eq_6_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="whole mini-batches"):
        build(CONFIG, output_dir=str(tmp_path), **MICRO | wrong)


def test_a_sharded_model_needs_trl_s_own_reference(tmp_path, monkeypatch):
    start = GRPOTrainer.__init__

    def sharded(trainer, *args, **kwargs):
        start(trainer, *args, **kwargs)
        trainer.is_fsdp_enabled = True

    monkeypatch.setattr(GRPOTrainer, "__init__", sharded)
    with pytest.raises(ValueError, match="beta above 0"):
        build(CONFIG, output_dir=str(tmp_path), **ONE_MINI_BATCH)


def test_two_processes_take_the_step_of_one(tmp_path):
    script, launch = tmp_path / "step.py", [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script.write_text(SCRIPT)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    for processes in ("1", "2"):
        subprocess.run([*launch, "--nproc_per_node", processes, script, tmp_path, processes], check=True, timeout=300,
                       env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, cwd=ROOT)
    one, two = (torch.load(tmp_path / name) for name in ("1", "2"))
    start = torch.cat([weight.detach().flatten() for weight in load_model(CONFIG.model).parameters()])
    assert (one - start).abs().max() > 1e-5
    assert (two - one).norm() < 0.01 * (one - start).norm()  # Adam makes much of the rounding of the smallest gradients


def test_the_example_logs_a_line_an_iteration(tmp_path):
    config = replace(CONFIG, max_steps=2)
    trainer = build(config, tmp_path / "log.jsonl", output_dir=str(tmp_path), **ONE_MINI_BATCH)
    trainer.train()
    rows = read_lines(tmp_path / "log.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(0 <= row["success"] <= 1 and row["seconds"] > 0 and row["loss"] is not None for row in rows)
