"""Shows what a training step sees of every token, as one HTML page that needs no other file and no network.

The numbers are those of `train.iteration` (arXiv:2605.14558v1, Eqs. (3)-(5) and (12)), made by the same functions from
P levels of the evaluation, G rollouts each; the page shows the best and the worst rollout of one of these levels.
B = P·G rows, T tokens.

    python evaluate.py runs/NAME --html tokens.html
    python evaluate.py runs/NAME --html tokens.html --beside models/tiny      # two models, the same level

Differs from training: evaluation levels; no filter of groups (StarPO-S, DAPO); no whitening (POAD) and no
weights (--weight_stats) of mini-batches.
"""

import html
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from ablation import tag_mask, weight_signal
from checkpoint import STATE, State
from config import CRITIC, Config
from methods import METHODS, env_options
from policy import load_model, pick_device, shared_tokenizer
from rollout import Batch, Trajectory, load_policy, token_pieces
from startup import build_critic
from train import score_batch, weigh

LEVELS, COLUMNS = 5, ("class", "log-prob", "entropy", "energy", "weight", "advantage")  # of intensity; of the panel
SCHEMES = {  # page, text, reasoning, action: blues and oranges that colour-blind readers tell apart (Okabe and Ito)
    "light": ("#ffffff", "#16191d", "#56b4e9", "#e69f00"),
    "dark": ("#15181c", "#f4f4f4", "#005b8f", "#a64a00"),
}


class Scene(NamedTuple):
    """A model's rollouts on the first P evaluation levels, scored and weighed as a training step does."""

    config: Config
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    rows: list[Trajectory]
    batch: Batch
    missing: str  # why there are no advantages; "" where there are


def stage(config: Config, folder: Path) -> Scene:
    """`train.iteration` up to the update, for the model in `folder`."""
    state = load_state(config, folder)
    method = METHODS[config.algo]
    rows = method.play(config, state, range(config.eval_first, config.eval_first + config.num_prompts))
    batch, missing = Batch.of(rows), ""
    reference = score_batch(state.reference, batch, config)
    batch.energy, batch.signal = reference.energy, weight_signal(config.signal, reference, batch.old_logp)
    batch.is_tag = tag_mask(config.tag_weight, rows, state.tokenizer)
    if config.algo in CRITIC and not state.critic:
        missing = f"{config.algo} computes them from a critic, and {folder} has none saved"
    else:
        batch.advantages = method.advantages(config, state, batch, rows)
    batch.weights = weigh(config, batch)
    return Scene(config, folder, state.tokenizer, rows, batch, missing)


def load_state(config: Config, folder: Path) -> State:
    """The policy in `folder`, the reference it was trained from and, where one was saved, its critic."""
    tokenizer, critic = shared_tokenizer(str(folder), config.model), None
    if config.algo in CRITIC and (folder / STATE).is_file():
        saved = torch.load(folder / STATE, weights_only=True, mmap=True, map_location="cpu")
        if "critic" in saved:  # not where --algo was changed
            critic = build_critic(config, pick_device(config.device))
            critic.load_state_dict(saved["critic"])
    device = pick_device(config.device)
    policy, reference = load_policy(str(folder), device), load_model(config.model, device)
    return State(policy, reference, tokenizer, None, torch.Generator().manual_seed(config.seed), critic)


def intensity(is_action: bool, weight: float, beta: float) -> int:
    """0 to 4: where wₜ lies in [0, 1] for reasoning, in [1, 1 + β] for actions."""
    share = weight if not is_action else (weight - 1) / beta if beta else 1.0
    return min(LEVELS - 1, max(0, int(LEVELS * share)))


def write_page(path: Path, sides: Sequence[tuple[Config, Path]]) -> int:
    """Write the page of one model or of several beside each other; returns its size in bytes."""
    if path.suffix != ".html" or path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"--html {path}: must be a file that ends in .html, in a folder that exists")
    games = [f"{config.env} {env_options(config)} from {config.eval_first}" for config, _ in sides]
    if games[0] != games[-1]:
        raise ValueError(f"--beside {sides[-1][1]}: its levels are not the same ({games[-1]} and {games[0]})")
    return path.write_bytes(build_page([stage(config, folder) for config, folder in sides]))


def build_page(scenes: Sequence[Scene]) -> bytes:
    """The page as UTF-8: of the level whose returns vary most, each scene's best rollout, then each one's worst."""
    returns = [scene.batch.returns.view(-1, scene.config.num_generations) for scene in scenes]  # (P, G) each
    common = min(map(len, returns))
    level = int(sum(groups[:common].std(1, correction=0) for groups in returns).argmax())
    heads, episodes = "", ""
    for end in (0, -1)[: max(groups.shape[1] for groups in returns)]:
        for scene, groups in zip(scenes, returns, strict=True):
            order, size = groups[level].sort(descending=True, stable=True), groups.shape[1]
            name = ("Best", "Worst")[end] if order.values[0] > order.values[-1] else "One"
            episodes += _episode(scene, level * size + int(order.indices[end]), f"{name} of {size}")
            heads += _head(scene, order.values.tolist()) if end == 0 else ""
    panel = "".join(f"<div><dt>{name}</dt><dd>–</dd></div>" for name in COLUMNS)
    config, folders = scenes[0].config, " beside ".join(str(scene.folder) for scene in scenes)
    title = _text(f"{config.env}, level {config.eval_first + level}: {folders}")
    parts = dict(title=title, style=_style(), heads=heads, episodes=episodes, panel=panel, script=SCRIPT)
    return PAGE.substitute(parts).encode("utf-8", errors="replace")


def _head(scene: Scene, returns: Sequence[float]) -> str:
    """Which model, which settings, and the returns of the level's rollouts."""
    config, (alpha, beta) = scene.config, scene.config.alpha_beta
    counts = Counter(f"{value:.2f}" for value in returns)  # in their order
    numbers = "" if config.weights == "class_mean" else f", α {alpha:g}, β {beta:g}"
    facts = {"model": scene.folder, "reference": config.model, "weights": config.weights + numbers,
             "advantages": f"not shown: {scene.missing}" if scene.missing else config.algo,
             "batch": f"P = {config.num_prompts}, G = {config.num_generations}, temperature {config.temperature:g}",
             "returns": ", ".join(f"{number} × {value}" for value, number in counts.items())}
    items = "".join(f"<div><dt>{name}</dt><dd>{_text(str(value))}</dd></div>" for name, value in facts.items())
    return f'<dl class="facts">{items}</dl>'


def _episode(scene: Scene, b: int, name: str) -> str:
    """One rollout, turn by turn, and what it ended with."""
    episode = scene.rows[b].episode
    result = f"return {episode.return_:.2f}, {'solved' if episode.success else 'not solved'}"
    turns = "".join(_turn(scene, b, k) for k in range(len(scene.rows[b].spans)))
    return (f'<article><h2>{name}: {result}</h2><p class="model">{_text(str(scene.folder))}</p>{turns}'
            f"<section><h3>At the end</h3><pre>{_text(episode.observation)}</pre></section></article>\n")


def _turn(scene: Scene, b: int, k: int) -> str:
    """What the model read beside what it wrote."""
    row, (start, end) = scene.rows[b], scene.rows[b].spans[k]
    read = scene.tokenizer.decode(row.tokens[row.spans[k - 1][1] if k else 0 : start]).strip("\n")
    pieces = token_pieces(scene.tokenizer, row.tokens[start:end])
    tokens = "".join(_token(scene, b, t, piece) for t, piece in enumerate(pieces, start))
    return (f'<section><h3>Turn {k + 1}, reward {row.episode.rewards[k]:.2f}</h3>\n<div class="turn"><pre>{_text(read)}'
            f'</pre><div class="response" role="group" aria-label="Response of turn {k + 1}">{tokens}</div></div>'
            "</section>\n")


def _token(scene: Scene, b: int, t: int, piece: str) -> str:
    """Its class is a or r and its intensity, or a or r alone where the method does not train it."""
    row, batch = scene.rows[b], scene.batch
    weight, shade = batch.weights[b, t].item(), "a" if row.is_action[t] else "r"
    if batch.is_response[b, t]:
        shade += str(intensity(row.is_action[t], weight, scene.config.alpha_beta[1]))
    numbers = (row.logp[t], row.entropy[t], batch.energy[b, t].item(), weight)
    advantage = "none" if scene.missing else f"{batch.advantages[b, t].item():+.3f}"
    return f'<span class="{shade}" data-n="{" ".join(f"{x:.3f}" for x in numbers)} {advantage}">{_text(piece)}</span>'


def _text(text: str) -> str:
    """Escaped; control characters, which HTML drops or forbids, as the pictures Unicode has of them."""
    pictured = re.sub(r"[\0-\x08\x0b-\x1f]", lambda match: chr(0x2400 + ord(match[0])), text)
    return html.escape(re.sub(r"[\x7f-\x9f]", "\N{REPLACEMENT CHARACTER}", pictured))


def _style() -> str:
    """The colours of both schemes, a variable each, and the five intensities of both classes."""
    light, dark = (" ".join(f"--{name}: {colour};" for name, colour in palette(scheme).items()) for scheme in SCHEMES)
    shades = "".join(f".r{i} {{ background: var(--r{i}) }} .a{i} {{ background: var(--a{i}); "
                     f"box-shadow: inset 0 -{1 + i / 2}px }}\n" for i in range(LEVELS))
    return (f":root {{ color-scheme: light dark; {light} }}\n"
            f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n{STYLE}{shades}")


def palette(scheme: str) -> dict[str, str]:
    """page, text, and r0 … r4, a0 … a4: from a fifth of the class's colour over the page's to all of it."""
    page, text, *classes = SCHEMES[scheme]
    colours = {"page": page, "text": text}
    for name, full in zip("ra", classes, strict=True):
        for i in range(LEVELS):
            share = 0.2 + 0.8 * i / (LEVELS - 1)
            parts = ((int(page[j : j + 2], 16), int(full[j : j + 2], 16)) for j in (1, 3, 5))
            colours[f"{name}{i}"] = "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in parts)
    return colours


STYLE = """* { box-sizing: border-box; overflow-wrap: anywhere } html { scroll-padding-bottom: 9rem }
body { margin: 0 auto; max-width: 110rem; background: var(--page); color: var(--text); font: 1rem/1.5 sans-serif }
header, main { padding: 0 1rem 1rem } h1, h2, h3 { line-height: 1.25 }
h1 { font-size: 1.4rem } h2 { font-size: 1.15rem } h3 { font-size: 1rem; margin: 1rem 0 .25rem }
h2, dl, dd, .model, pre, #panel p { margin: 0 } details { margin: 1rem 0 }
.sides { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)) }
.facts div, .turn { display: flex; gap: .5rem 1rem } .facts dt { flex: 0 0 6rem }
article { border: 1px solid; border-radius: .5rem; padding: .75rem; min-width: 0 }
.turn { flex-wrap: wrap } .turn pre { flex: 1 1 15rem } .response { flex: 2 1 17rem }
pre, code, .response { min-width: 0; white-space: pre-wrap; font: .9rem/1.45 monospace }
.response { line-height: 1.9 } .response span { cursor: pointer } .response span:empty::before { content: "·" }
.response span, .key span { padding: .15em 0 .25em; border-left: 1px solid var(--page) }
[class^="a"], code { font-weight: bold } [class^="a"] { box-shadow: inset 0 -1px } .shown { outline: 2px solid }
#panel { position: sticky; bottom: 0; padding: .5rem 1rem; border-top: 2px solid; background: var(--page) }
#panel dl { display: grid; gap: 0 1rem; grid-template-columns: repeat(auto-fit, minmax(6rem, 1fr)) }
"""

SCRIPT = """
const tokens = document.querySelectorAll(".response span"), panel = document.getElementById("panel");
for (const token of tokens) token.tabIndex = token.previousSibling ? -1 : 0;  /* Tab: next response */
function show(event) {
  const token = event.target;
  if (!token.matches(".response span")) return;
  document.querySelector(".shown")?.classList.remove("shown");
  const [letter, trained] = token.className, kind = letter == "a" ? "action" : "reasoning";
  const values = [trained ? kind : kind + ", not trained", ...token.dataset.n.split(" ")];
  panel.querySelectorAll("dd").forEach((cell, i) => { cell.textContent = values[i]; });
  panel.querySelector("code").textContent = JSON.stringify(token.textContent);
  token.classList.add("shown");
}
for (const kind of ["mouseover", "click", "focusin"]) document.addEventListener(kind, show);
document.addEventListener("keydown", event => {
  const name = { ArrowRight: "nextSibling", ArrowLeft: "previousSibling" }[event.key];
  if (name && event.target.matches(".response span")) { event.preventDefault(); event.target[name]?.focus(); }
});
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>$title</title>
<style>$style</style></head>
<body><header><h1>$title</h1>
<p>Point at a token, tap it, or reach it with Tab and the arrow keys: its numbers stand at the bottom.</p>
<p class="key"><span class="r0">Reasoning</span> <span class="r4">tokens</span>: from weight 0 to 1.
<span class="a0">Action</span> <span class="a4">tokens</span>: bold, underlined, from weight 1 to 1 + β. Unshaded: not
trained.</p>
<details><summary>What the numbers are</summary>
<p>The batch: G rollouts on each of P levels. Log-prob: of the token under the policy that wrote it, at the temperature
of sampling, in nats. Entropy: of that distribution. Energy: E = -log Σ exp f over the reference's logits f before the
token, Eq. (4). Weight: α for reasoning, 1 + β · sigmoid((E - mean) / std) for actions, mean and std over the batch's
action tokens, Eq. (5). Advantage: the method's, before any filter of groups or whitening of mini-batches.</p></details>
<div class="sides">$heads</div></header>
<main class="sides">$episodes</main>
<footer id="panel" role="status"><p>Token: <code>none yet</code></p><dl>$panel</dl></footer>
<script>$script</script></body></html>
""")
