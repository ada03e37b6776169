"""The page of tokens: whole, escaped, readable, on its own, and with the numbers that a training step computes."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from tiny import SMOKE, flags, llama

import evaluate
import methods
import train
import viewer
import warmstart
from actfocus import group_advantages, token_weights, whiten
from baselines import overlong_penalty
from config import Config
from rollout import token_pieces

pytest_plugins = ["tiny"]

VOID = {"meta", "link", "br"}
SHORT = [part for name in ("max_response_tokens", "max_context", "num_prompts", "num_generations", "mini_batch_size")
         for part in (f"--{name}", str(SMOKE[name]))]
NASTY = "a <b>\"bold\"</b> & 'sly' <script>alert(1)</script></pre> \0\x1b\x9f é 漢 😀 \N{RIGHT-TO-LEFT OVERRIDE} \ud800"
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | dict.fromkeys(range(127, 160), "�")


class Page(HTMLParser):
    """The page's elements; an error where tags do not balance."""

    def __init__(self, page):
        super().__init__()
        self.open, self.responses, self.tokens, self.texts, self.addresses = [], [], [], {}, []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        assert tag not in ("style", "script", "title") or not self.open[2:], f"{tag} in {self.open}"
        self.addresses += [value for name, value in attributes.items() if name in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)
        if attributes.get("class") == "response":
            self.responses.append([])
        if tag == "span" and "data-n" in attributes:
            self.tokens.append([attributes["class"], attributes["data-n"].split(), ""])
            self.responses[-1].append(self.tokens[-1])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else "", []).append(data)
        if self.open and self.open[-1] == "span" and "article" in self.open:
            self.tokens[-1][2] += data


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """What is written without a folder goes here."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory):
    """A short run of GRPO and one of PPO, which saves its critic."""
    folders = {algo: tmp_path_factory.mktemp("runs") / algo for algo in ("grpo", "ppo")}
    for algo, folder in folders.items():
        assert train.main(flags(model=tiny, output_dir=folder, algo=algo, max_steps=2, eval_prompts=1)) == 0
    return folders


def settings(folder, **options):
    config, folder = evaluate.settings_of(folder, {})
    return replace(config, **{name: SMOKE[name] for name in SMOKE} | options), folder


@pytest.fixture(scope="module")
def scene(runs):
    return viewer.stage(*settings(runs["grpo"]))


@pytest.fixture(scope="module")
def page(scene):
    return viewer.build_page([scene]).decode()


def shown(scene):
    """The rows on a scene's page."""
    groups = scene.batch.returns.view(-1, scene.config.num_generations)
    order = groups[groups.std(1).argmax()].sort(descending=True, stable=True).indices
    first = int(groups.std(1).argmax()) * scene.config.num_generations
    return [first + int(order[0]), first + int(order[-1])]


def test_the_page_is_well_formed_small_and_needs_nothing_else(page):
    assert Page(page).addresses == ["data:,"]
    assert "default-src 'none'" in page and not any(word in page for word in ("url(", "@import", "://", "fetch("))
    assert page.startswith("<!DOCTYPE html>") and '<html lang="en">' in page and 'name="viewport"' in page
    assert len(page.encode()) < 1e6


def test_every_response_token_stands_on_the_page_once_and_together_they_are_the_response(scene, page):
    responses = Page(page).responses
    spans = [(scene.rows[b], *span) for b in shown(scene) for span in scene.rows[b].spans]
    assert len(spans) == len(responses) > 0
    for (row, start, end), tokens in zip(spans, responses, strict=True):
        pieces = token_pieces(scene.tokenizer, row.tokens[start:end])
        assert [text for *_, text in tokens] == [piece.translate(PICTURES) for piece in pieces]
        assert scene.tokenizer.decode(row.tokens[start:end]).rstrip("�") == "".join(pieces)


def test_the_numbers_on_the_page_are_those_of_a_training_step(scene, page):
    config, batch, tokens = scene.config, scene.batch, iter(Page(page).tokens)
    reference = train.score_batch(viewer.load_model(config.model), batch, config)
    weights = token_weights(reference.energy, batch.is_action, batch.is_reasoning, config.alpha, config.beta)
    advantages = group_advantages(batch.returns, config.num_generations)
    for b in shown(scene):
        for t in batch.is_response[b].nonzero()[:, 0].tolist():
            kind, numbers, _ = next(tokens)
            assert kind[0] == ("a" if batch.is_action[b, t] else "r")
            wanted = [batch.old_logp[b, t], batch.entropy[b, t], reference.energy[b, t], weights[b, t], advantages[b]]
            assert [float(x) for x in numbers] == pytest.approx([x.item() for x in wanted], abs=1e-3)
    assert not list(tokens)


def test_the_page_takes_the_level_whose_returns_vary_most_and_its_best_and_worst_rollout(scene):
    returns = torch.tensor([0.5, 0.5, 0.0, 0.5, 0.0, 1.0, 0.5, 0.0])  # two levels, four rollouts each
    changed = scene._replace(batch=replace(scene.batch, returns=returns))
    page = viewer.build_page([changed]).decode()
    wanted = [f"{scene.rows[b].logp[t]:.3f}" for b in (5, 7) for t in scene.batch.is_response[b].nonzero()[:, 0]]
    assert [numbers[0] for _, numbers, _ in Page(page).tokens] == wanted
    assert ", level 1: " in page and "Best of 4" in page and "Worst of 4" in page
    assert "<dt>returns</dt><dd>1 × 1.00, 1 × 0.50, 2 × 0.00</dd>" in page
    alike = scene._replace(batch=replace(scene.batch, returns=torch.zeros(8)))
    page = viewer.build_page([alike]).decode()
    assert page.count("One of 4") == 2 and "Best" not in page and "Worst" not in page


def test_the_policy_is_the_runs_and_the_energies_are_of_the_model_it_started_from(scene, tiny):
    policy = viewer.load_model(str(scene.folder))
    assert scene.folder.name == "checkpoint-2" and scene.config.model == str(tiny)
    scores = train.score_batch(policy, scene.batch, scene.config)
    response = scene.batch.is_response
    assert torch.allclose(scores.logp[response], scene.batch.old_logp[response], atol=1e-4)
    assert not torch.allclose(scores.energy[response], scene.batch.energy[response], atol=1e-3)


def test_a_method_with_a_critic_uses_the_saved_one(runs):
    config, folder = settings(runs["ppo"])
    scene = viewer.stage(config, folder)
    state = train.build_state(config)
    train.checkpoint.restore(state, folder)
    values = methods.critic_values(config, state, scene.batch)
    response = scene.batch.is_response
    assert torch.equal(values, scene.batch.values) and values[response].std() > 0
    rest = scene.batch.returns[:, None] - values  # γ = λ = 1: what is still to come, less what was expected
    assert torch.allclose(whiten(rest, response), scene.batch.advantages, atol=1e-4)


def test_without_a_saved_critic_the_page_says_why_there_are_no_advantages(tiny):
    scene = viewer.stage(*settings(tiny, algo="ppo"))
    page = viewer.build_page([scene]).decode()
    assert f"not shown: ppo computes them from a critic, and {tiny} has none saved" in page
    assert {numbers[-1] for _, numbers, _ in Page(page).tokens} == {"none"}


def test_dapo_counts_its_penalty_and_carl_grows_trees_and_marks_what_it_does_not_train(tiny):
    scene = viewer.stage(*settings(tiny, algo="dapo"))
    _, lengths = methods.per_turn(scene.batch.entropy, scene.batch)
    penalty = overlong_penalty(lengths, SMOKE["max_response_tokens"], 0.2 * SMOKE["max_response_tokens"]).sum(1)
    assert torch.equal(scene.batch.advantages.abs().amax(1) > 0,
                       group_advantages(scene.batch.returns + penalty, SMOKE["num_generations"]) != 0)
    scene = viewer.stage(*settings(tiny, algo="carl"))
    assert len(scene.rows) == 8 and any(row.first_turn > 0 for row in scene.rows)
    tokens = Page(viewer.build_page([scene]).decode()).tokens
    assert {kind for kind, *_ in tokens} >= {"r", "r0"}
    assert all(float(numbers[3]) == float(numbers[4]) == 0 for kind, numbers, _ in tokens if kind in ("a", "r"))


def test_uniform_weights_have_full_intensity_and_actfocus_shades_by_weight(tiny, page):
    kinds = {kind for kind, *_ in Page(page).tokens}
    assert "r0" in kinds and not kinds & {"r1", "r4", "a", "r"} and len(kinds & {f"a{i}" for i in range(5)}) > 1
    uniform = viewer.build_page([viewer.stage(*settings(tiny, weights="uniform"))]).decode()
    assert {kind for kind, *_ in Page(uniform).tokens} == {"r4", "a4"}
    assert [viewer.intensity(True, weight, 0.5) for weight in (1, 1.09, 1.11, 1.41, 1.5)] == [0, 0, 1, 4, 4]
    assert [viewer.intensity(False, weight, 0.5) for weight in (0, 0.1, 0.5, 1)] == [0, 0, 2, 4]


def test_whatever_an_observation_holds_is_shown_as_text(scene):
    b = shown(scene)[0]
    episode = scene.rows[b].episode
    before, episode.observation = episode.observation, NASTY
    page = viewer.build_page([scene]).decode()
    episode.observation = before
    text = "".join(Page(page).texts["pre"])
    assert NASTY.translate(PICTURES).replace("\ud800", "?") in text
    assert "<b>" not in page and "alert(1)</script>" not in page and "\0" not in page and "\x1b" not in page


def test_markup_that_the_model_read_or_wrote_stays_text(scene, monkeypatch):
    monkeypatch.setattr(viewer, "token_pieces", lambda tokenizer, ids: ['</span>"<i>&amp;'] * len(ids))
    monkeypatch.setattr(scene.tokenizer, "decode", lambda ids: NASTY)
    page = viewer.build_page([scene]).decode()
    assert {text for *_, text in Page(page).tokens} == {'</span>"<i>&amp;'}
    assert NASTY.translate(PICTURES).replace("\ud800", "?") in Page(page).texts["pre"] and "<b>" not in page


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    """WCAG 2: (brighter + 0.05) / (darker + 0.05)."""
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", viewer.SCHEMES)
def test_text_stands_out_from_every_background_and_shades_deepen(scheme, page):
    assert [round(contrast(grey, "#ffffff"), 2) for grey in ("#000000", "#777777")] == [21, 4.48]
    colours = viewer.palette(scheme)
    declared = dict(re.findall(r"--(\w+): (#\w{6});", page.split("@media")[scheme == "dark"]))
    assert declared == colours and len(colours) == 12
    ground = colours.pop("page")
    text = colours.pop("text")
    assert min(contrast(text, colour) for colour in (ground, *colours.values())) >= 4.5
    for name in "ra":
        steps = [contrast(ground, colours[f"{name}{i}"]) for i in range(viewer.LEVELS)]
        assert steps == sorted(steps) and steps[0] > 1.1


def test_the_classes_differ_in_more_than_hue(page):
    assert '[class^="a"], code { font-weight: bold }' in page and '[class^="a"] { box-shadow: inset 0 -1px }' in page
    widths = [float(x) for x in re.findall(r"\.a\d \{ background: [^}]*inset 0 -([\d.]+)px", page)]
    assert widths == [1, 1.5, 2, 2.5, 3]


def test_two_models_stand_beside_each_other_on_one_level(runs, tiny, tmp_path, capsys):
    out = tmp_path / "page.html"
    arguments = [str(runs["grpo"]), "--html", str(out), "--beside", str(tiny), *SHORT]
    assert evaluate.main(arguments) == 0
    page = out.read_text(encoding="utf-8")
    assert f"page {out} ({len(page.encode()) / 1000:.0f} kB)" in capsys.readouterr().out
    texts = Page(page).texts
    assert page.count("<article>") == 4 and len({t for t in texts["pre"] if "Turn 1:" in t}) == 1
    assert texts["h1"][0].endswith(f": {runs['grpo']}/checkpoint-2 beside {tiny}")
    assert [name for name in texts["p"] if name in (str(tiny), f"{runs['grpo']}/checkpoint-2")] == [
        f"{runs['grpo']}/checkpoint-2", str(tiny)] * 2


def test_a_page_names_the_level_by_its_seed(tiny):
    small = dict(eval_first=7, num_prompts=1, num_generations=2, mini_batch_size=2, max_turns=1)
    scene = viewer.stage(Config(**small, model=str(tiny)), tiny)
    assert f"<h1>frozenlake, level {scene.rows[0].episode.seed}: " in viewer.build_page([scene]).decode()
    assert scene.rows[0].episode.seed == 7


def test_the_terminal_lists_the_same_numbers(runs, tiny, capsys):
    assert evaluate.main([str(runs["grpo"]), "--show_tokens", *SHORT]) == 0
    rows = re.findall(r"^ +(\d) +(-\d+\.\d\d) +(1\.\d\d) +([+-]\d\.\d\d)  (\S+)$", capsys.readouterr().out, re.M)
    scene = viewer.stage(*settings(runs["grpo"]))
    wanted = [f"{scene.batch.energy[b, t]:.2f}" for b in (0, 4) for t in range(len(scene.rows[b].tokens))
              if scene.rows[b].is_action[t]]
    assert [energy for _, energy, *_ in rows] == wanted != []
    assert evaluate.main([str(tiny), "--show_tokens", "--algo", "ppo", *SHORT]) == 0
    out = capsys.readouterr().out
    assert f"advantages not shown: ppo computes them from a critic, and {tiny} has none saved" in out


OTHER_LEVELS = {"OTHER": {"success_rate": 0.5}, "ELSEWHERE": {"eval_first": 1000}}


@pytest.mark.parametrize("arguments, part", [
    (["MODEL", "--html", "nowhere/page.html"], "--html nowhere/page.html: must be a file that ends in .html"),
    (["MODEL", "--html", "MODEL"], "must be a file"),
    (["MODEL", "--html", "notes.md"], "--html notes.md: must be a file that ends in .html"),
    (["MODEL", "--html"], "--html"),
    (["MODEL", "--beside", "MODEL"], "--beside: needs --html"),
    (["RUN", "--html", "page.html", "--beside", "OTHER"], "its levels are not the same"),
    (["RUN", "--html", "page.html", "--beside", "ELSEWHERE"], "its levels are not the same"),
    (["MODEL", "--html", "page.html", "--beside", "models/nope"], "models/nope"),
    (["MODEL", "--html", "page.html", "--model", "STRANGER"], "whose tokenizer is another"),
])
def test_a_mistake_is_one_line_and_code_2_and_writes_nothing(runs, tiny, tmp_path, capsys, arguments, part):
    other, stranger = tmp_path / "other", tmp_path / "stranger"
    if changed := OTHER_LEVELS.get(arguments[-1]):
        shutil.copytree(runs["grpo"], other)
        about = json.loads((other / "config.json").read_text())
        about["config"] |= changed
        (other / "config.json").write_text(json.dumps(about))
    if "STRANGER" in arguments:
        tokenizer = warmstart.build_tokenizer(["another text altogether"], vocab_size=300)
        tokenizer.save_pretrained(stranger)
        llama(len(tokenizer)).save_pretrained(stranger)
    words = {"MODEL": tiny, "RUN": runs["grpo"], "STRANGER": stranger, **dict.fromkeys(OTHER_LEVELS, other)}
    capsys.readouterr()
    short = SHORT if "RUN" not in arguments else []
    assert evaluate.main([str(words.get(word, word)) for word in arguments] + short) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1 and part in error[0]
    assert not list(tmp_path.glob("*.html")) and not (tmp_path / "notes.md").exists()


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_a_browser_shows_a_tokens_numbers_and_complains_of_nothing(page, tmp_path):
    """The page's own script in a browser: focus the second token of the first response and read the panel."""
    probe = "<script>document.querySelectorAll('.response span')[1].focus(); document.title = 'ready'</script></body>"
    (tmp_path / "page.html").write_text(page.replace("</body>", probe), encoding="utf-8")
    offline = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync",
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    done = subprocess.run(["chromium", *offline, str(tmp_path / "page.html")], capture_output=True, text=True,
                          timeout=120)
    assert "CONSOLE" not in done.stderr and "<title>ready</title>" in done.stdout
    _, numbers, text = Page(page).tokens[1]
    cells = re.findall(r"<dd>(.*?)</dd>", done.stdout.split('id="panel"')[1])
    assert cells == ["reasoning", *numbers] and json.dumps(text) in done.stdout.replace("&quot;", '"')
