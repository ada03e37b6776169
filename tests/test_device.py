"""--device: the loop runs on a device that is not the CPU, as far as that shows without one (see far.py)."""

import json
from dataclasses import asdict

import pytest
import torch
from far import DEVICE, Elsewhere, Far
from tiny import config, flags, lines

import checkpoint
import startup
import train
import warmstart
from policy import load_model, load_tokenizer, pick_device
from rollout import Batch

pytest_plugins = ["tiny"]

SHORT = {"max_response_tokens": 8, "max_turns": 2, "num_prompts": 1, "mini_batch_size": 2}


@pytest.fixture
def far(monkeypatch):
    """Models go to the second device, whatever --device says."""
    monkeypatch.setattr(startup, "pick_device", lambda name: DEVICE)
    torch.__future__.set_swap_module_params_on_conversion(True)  # tied weights stay tied, as they do on a GPU
    with Elsewhere():
        yield
    torch.__future__.set_swap_module_params_on_conversion(False)


def moments(optimizer):
    return [value for values in optimizer.state.values() for value in values.values() if value.dim()]


def test_the_second_device_refuses_tensors_of_the_first():
    with Elsewhere():
        there, here = torch.ones(2, device=DEVICE), torch.ones(2)
        assert isinstance(there + 1, Far) and (there + 1).device == DEVICE and (there * 2).cpu().tolist() == [2, 2]
        for mix in (lambda: there + here, lambda: torch.cat([here, there]), lambda: here.add_(there)):
            with pytest.raises(RuntimeError, match="tensors on two devices"):
                mix()


@pytest.mark.parametrize("options", [
    {}, {"algo": "ppo", "gradient_checkpointing": True}, {"kl_coef": 0.1}, {"lora_rank": 2, "algo": "poad"},
])
def test_an_iteration_elsewhere_gives_the_numbers_of_the_cpu(tiny, monkeypatch, far, options):
    if "lora_rank" in options:
        pytest.importorskip("peft")
    settings = config(tiny, **SHORT | options)
    state = startup.build_state(settings)
    models = [state.policy, *([state.critic] if state.critic else [])]
    assert {weight.device for model in models for weight in model.parameters()} == {DEVICE}
    there, batch = train.iteration(settings, state, 0)
    assert {moment.device for moment in moments(state.optimizer)} == {DEVICE}
    assert batch.tokens.device.type == batch.energy.device.type == "cpu"
    monkeypatch.setattr(startup, "pick_device", lambda name: torch.device("cpu"))
    here, _ = train.iteration(settings, startup.build_state(settings), 0)
    same = [name for name in here if not name.startswith(("seconds", "logp_gap", "loss"))]
    assert [there[name] for name in same] == pytest.approx([here[name] for name in same], abs=1e-3, rel=1e-3)


def test_a_batch_left_on_the_cpu_would_be_noticed(tiny, monkeypatch, far):
    take = Batch.take
    monkeypatch.setattr(Batch, "take", lambda batch, rows, device="cpu": take(batch, rows))
    settings = config(tiny, **SHORT)
    with pytest.raises(RuntimeError, match="tensors on two devices"):
        train.iteration(settings, startup.build_state(settings), 0)


@pytest.mark.filterwarnings("ignore:.*which is a no-op")  # what the warning says of meta tensors
def test_a_run_of_the_cpu_resumes_elsewhere(tiny, tmp_path, far, monkeypatch):
    settings = config(tiny, **SHORT, algo="ppo", output_dir=str(tmp_path / "run"))
    monkeypatch.setattr(startup, "pick_device", lambda name: torch.device("cpu"))
    here = startup.build_state(settings)
    train.iteration(settings, here, 0)
    run = checkpoint.new_run(asdict(settings))
    checkpoint.save(here, run)
    monkeypatch.setattr(startup, "pick_device", lambda name: DEVICE)
    there = train.prepare(settings, checkpoint.find_checkpoint(run))
    for one, other in ((here.policy, there.policy), (here.critic, there.critic)):
        pairs = zip(one.parameters(), other.parameters(), strict=True)
        assert all(b.device == DEVICE and torch.equal(a, b.cpu()) for a, b in pairs)
    assert {moment.device for moment in moments(there.optimizer)} == {DEVICE}
    train.iteration(settings, there, 1)


def test_a_warm_start_runs_elsewhere(tiny, far):
    model, tokenizer = load_model(str(tiny), DEVICE), load_tokenizer(str(tiny))
    before = model.model.norm.weight.cpu().clone()
    warmstart.train(model, tokenizer, [{"frozenlake": 0.4}], 1e-4, 0, {"frozenlake": 1})
    assert model.device == DEVICE and not torch.equal(before, model.model.norm.weight.cpu())


def test_auto_is_a_gpu_where_there_is_one_else_the_cpu(monkeypatch):
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *size, device: chosen.append(device) or torch.ones(1))
    assert pick_device("auto").type == "cuda" and chosen == [torch.device("cuda")]


@pytest.mark.parametrize("name", ["cuda:99", "gpu", "meta", ""])
def test_a_device_that_is_not_there_is_one_line_and_code_2(tiny, tmp_path, capsys, name):
    assert train.main(flags(model=tiny, output_dir=tmp_path / "run", device=name)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --device {name}: torch cannot compute there") and not (tmp_path / "run").exists()


def test_a_run_says_where_it_was_and_on_how_many_threads_and_may_resume_with_others(tiny, tmp_path):
    folder, before = tmp_path / "run", torch.get_num_threads()
    try:
        assert train.main(flags(model=tiny, output_dir=folder, max_steps=1, num_threads=2)) == 0
        assert torch.get_num_threads() == 2
        about = json.loads((folder / "config.json").read_text())
        assert (about["device"], about["threads"], about["config"]["device"]) == ("cpu", 2, "auto")
        more = ["--max_steps", "2", "--device", "cpu", "--num_threads", "1", "--gradient_checkpointing"]
        assert train.main(["--resume_from_checkpoint", str(folder), *more, "--micro_batch_tokens", "500"]) == 0
        assert torch.get_num_threads() == 1 and [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2]
    finally:
        torch.set_num_threads(before)
