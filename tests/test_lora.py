"""--lora_rank and --gradient_checkpointing: small memory, the same algorithm."""

import builtins

import pytest
import torch
from tiny import assert_same_run, config, flags, lines, weights

import evaluate
import lora
import startup
import train
from checkpoint import find_checkpoint
from policy import load_model, recompute_layers, score_tokens, trainable

pytest_plugins = ["tiny"]


@pytest.fixture
def peft():
    """Only where the optional package is installed."""
    return pytest.importorskip("peft")


def batch():
    tokens = torch.randint(2, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    return tokens, (torch.arange(20) >= 4).expand(3, 20)


def adapted(tiny, rank=4):
    """A policy whose adapter is not 0 any more."""
    policy = load_model(str(tiny))
    lora.add_lora(policy, rank, seed=0)
    with torch.no_grad():
        for weight in trainable(policy):
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return policy


def test_without_peft_one_line_says_what_to_install(tiny, tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def refuse(name, *more):
        if name.split(".")[0] == "peft":
            raise ImportError(name)
        return original(name, *more)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert train.main(flags(model=tiny, output_dir=tmp_path / "run", lora_rank=4)) == 2
    assert capsys.readouterr().err.splitlines() == ["error: --lora_rank 4: needs a package: pip install peft"]
    assert not (tmp_path / "run").exists()


def test_lora_learns_two_small_matrices_a_layer_and_starts_as_the_model_itself(tiny, peft):
    plain, policy = load_model(str(tiny)), load_model(str(tiny))
    lora.add_lora(policy, rank=4, seed=0)
    # width 32, feed-forward 64: q, k, v, o have 32 + 32, gate, up, down 32 + 64 numbers a rank; two layers
    assert sum(weight.numel() for weight in trainable(policy)) == 2 * 4 * (4 * 64 + 3 * 96)
    for ours, theirs in zip(score_tokens(policy, *batch()), score_tokens(plain, *batch()), strict=True):
        assert torch.equal(ours, theirs)


def test_the_reference_is_the_policy_with_its_adapter_off_and_leaves_it_on(tiny, peft):
    plain, policy = load_model(str(tiny)), adapted(tiny)
    before = score_tokens(policy, *batch()).logp
    reference = score_tokens(lora.AdapterOff(policy), *batch())
    assert torch.equal(reference.logp, score_tokens(plain, *batch()).logp)
    assert torch.equal(reference.energy, score_tokens(plain, *batch()).energy) and not reference.logp.requires_grad
    assert torch.equal(before, score_tokens(policy, *batch()).logp) and not torch.equal(before, reference.logp)
    assert all(weight.requires_grad for name, weight in policy.named_parameters() if "lora" in name)


def test_merged_weights_compute_what_the_adapter_computes(tiny, peft):
    plain, policy = load_model(str(tiny)), adapted(tiny)
    plain.load_state_dict(lora.merged_weights(policy))
    gap = (score_tokens(plain, *batch()).logp - score_tokens(policy, *batch()).logp).abs().max()
    assert gap < 1e-5 and "model.layers.0.mlp.up_proj.base_layer.weight" in policy.state_dict()


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_a_run_with_lora_resumes_bit_for_bit_and_its_checkpoint_is_an_ordinary_model(
    tiny, tmp_path, peft, capsys, algo
):
    options = {"model": tiny, "lora_rank": 4, "learning_rate": 1e-2, "algo": algo}
    assert train.main(flags(output_dir=tmp_path / "whole", **options)) == 0
    assert train.main(flags(output_dir=tmp_path / "part", **options | {"max_steps": 2})) == 0
    assert train.main(["--resume_from_checkpoint", str(tmp_path / "part"), "--max_steps", "4"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "part")
    one, start = weights(find_checkpoint(tmp_path / "whole")), load_model(str(tiny)).state_dict()
    assert one.keys() == start.keys()
    moved = {name.split(".")[-2] for name in start if not torch.equal(start[name], one[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(row["logp_gap_max"] < 1e-4 for row in lines(tmp_path / "whole" / "metrics.jsonl"))
    capsys.readouterr()
    assert evaluate.main([str(tmp_path / "whole")]) == 0 and "policy: success" in capsys.readouterr().out
    assert evaluate.main([str(tmp_path / "whole"), "--html", str(tmp_path / "page.html")]) == 0


def test_layers_run_again_in_backward_give_the_same_gradients_and_keep_less(tiny):
    grads, kept = [], []
    for again in (False, True):
        model, sizes = load_model(str(tiny)), {}
        if again:
            recompute_layers(model)

        def pack(tensor, sizes=sizes):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            scores = score_tokens(model, *batch())
        kept.append(sum(size for size, _ in sizes.values()))
        (scores.logp.sum() + scores.entropy.sum()).backward()
        grads.append([weight.grad for weight in model.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True)) and kept[1] < 0.8 * kept[0]


def test_gradient_checkpointing_changes_no_number_of_a_run(tiny, tmp_path):
    for name, options in (("plain", {}), ("again", {"gradient_checkpointing": True})):
        assert train.main(flags(model=tiny, output_dir=tmp_path / name, algo="ppo", max_steps=2, **options)) == 0
    assert lines(tmp_path / "plain" / "metrics.jsonl") == lines(tmp_path / "again" / "metrics.jsonl")


def test_dropout_stays_off_where_layers_run_again(tiny):
    state = startup.build_state(config(tiny, gradient_checkpointing=True, algo="ppo"))
    assert not any(module.training for model in (state.policy, state.critic.body) for module in model.modules())
