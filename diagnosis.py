"""Where does uncertainty tell how much the returns of a prompt vary? Figures 1 and 2 of arXiv:2605.14558v1, in numbers.

P groups of G = 16 rollouts under the policy on the first P evaluation levels (256, or all that WebShop has); a group's
mean signal over one class of tokens against the spread σ_g of its returns, by Spearman's ρ, for the four signals and
three classes; for models/committed a fourth, the reasoning tokens that name the moves. Beside it the mean success, and
the partial correlation given the group's own success m and m (1 - m): a signal of the level's difficulty alone would go
with σ_g too. B = P·G rows, T tokens. With `--csv TABLE` every group goes to TABLE-groups.csv.

    python evaluate.py models/tiny --bottleneck --csv results/diagnosis.csv
    for c in runs/NAME/checkpoint-*; do python evaluate.py $c --bottleneck --csv results/diagnosis.csv; done

Differs from the paper: several signals; tiny models; rollouts on levels that training does not use.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import checkpoint
import plots
from ablation import weight_signal
from actfocus import answer_span, token_weights
from config import Config
from energy import SIGNALS, action_bottleneck, group_means, group_spread, partial_spearman, spearman
from methods import count_levels, make_episodes, rollout_settings
from policy import load_model, load_tokenizer, pad, pick_device, precision, shared_tokenizer
from rollout import Batch, Trajectory, load_policy, rollout, token_pieces
from tables import append_rows
from train import score_batch
from warmstart import COMMITTED

PROMPTS, ROLLOUTS = 256, 16  # P, G
MOVE = r"(?:Up|Down|Left|Right|\d at \d,\d)"  # in a thought; a musing may end with "I go over the cells", too
CLASSES = ("action", "reasoning", "response", "commitment")  # the last are those reasoning tokens that name the moves


def scored_rollouts(config: Config, folder: Path, prompts: int) -> tuple[list[Trajectory], Batch, dict[str, Tensor]]:
    """Rollouts of the model in `folder` on evaluation levels, and (B, T) of every signal.

    The policy's log-probs are computed as the reference's are, so that a policy that is the reference has a shift of
    exactly 0; those of the rollout differ in the last bits, and ranks would take that for a signal.
    """
    device, tokenizer, chunk = pick_device(config.device), shared_tokenizer(str(folder), config.model), 16
    policy, reference = load_policy(str(folder), device), load_model(config.model, device)
    generator, rows = torch.Generator().manual_seed(config.seed), []
    for first in range(0, prompts, chunk):
        levels = range(config.eval_first + first, config.eval_first + min(first + chunk, prompts))
        episodes = make_episodes(config, levels, ROLLOUTS)
        with precision(config.dtype, device):
            rows += rollout(policy, tokenizer, episodes, generator, *rollout_settings(config))
    batch = Batch.of(rows)
    scores, old_logp = score_batch(reference, batch, config), score_batch(policy, batch, config).logp
    return rows, batch, {name: weight_signal(name, scores, old_logp) for name in SIGNALS}


def commitments(rows: Sequence[Trajectory], tokenizer: PreTrainedTokenizerBase, game: str) -> tuple[Tensor, float]:
    """(B, T) bool: the tokens that name moves at a thought's end, as `warmstart.committed` writes them.

    Also the share of those thoughts whose moves are the answer's; NaN where no thought names any.
    """
    masks, kept = [], []
    for row in rows:
        masks.append(torch.zeros(len(row.tokens), dtype=torch.bool))
        for start, end in row.spans:
            pieces = token_pieces(tokenizer, row.tokens[start:end])
            text = "".join(pieces)
            named = re.search(rf" {COMMITTED.get(game, '<none>')} ({MOVE}(?: and {MOVE})*)\.</think>", text)
            if named and (span := answer_span(text)):
                last = torch.tensor([len(piece) for piece in pieces]).cumsum(0)
                first = torch.cat([last[:1] * 0, last[:-1]])
                masks[-1][start:end] = (first < named.end(1)) & (last > named.start(1))
                moves = re.sub(r"(\d) at (\d,\d)", r"\2,\1", named[1]).split(" and ")  # a digit of Sudoku
                kept.append(moves == text[slice(*span)].split(" || "))
    return pad(masks, torch.bool), sum(kept) / len(kept) if kept else float("nan")


def correlations(
    signals: dict[str, Tensor], masks: Sequence[Tensor], returns: Tensor, success: Tensor, group_size: int
) -> list[dict]:
    """A row for every signal and class of tokens: ρ and p, and both given the group's success m and m (1 - m).

    Args:
        signals: (B, T) each, a group's rows adjacent.   masks: (B, T) bool of each class in CLASSES.
        returns, success: (B,) R(τ), and 1 where the episode was solved.   group_size: G.
    """
    is_action, is_reasoning, _, named = masks
    return_std = group_spread(returns, group_size)
    solved, rows = success.double().view(-1, group_size).mean(1).numpy(), []
    given = solved, (solved * (1 - solved)).round(9)
    for signal, values in signals.items():
        found = action_bottleneck(values, is_action, is_reasoning, returns, group_size)
        found["rho_commitment"], found["p_commitment"] = spearman(group_means(values, named, group_size), return_std)
        for name, mask in zip(CLASSES, masks, strict=True):
            partial, p = partial_spearman(group_means(values, mask, group_size), return_std, *given)
            rows.append({"signal": signal, "tokens": name, "rho": found[f"rho_{name}"], "p": found[f"p_{name}"],
                         "partial_rho": partial, "partial_p": p})
    return rows


def count_prompts(config: Config, asked: int | None) -> int:
    """P: as many as asked for; by default PROMPTS, or all levels that there are."""
    levels = count_levels(config)
    if asked and asked > levels:
        raise ValueError(f"--groups {asked}: {config.env} has {levels} evaluation levels")
    return asked or min(PROMPTS, levels)


def diagnose(config: Config, folder: Path, table: Path | None, prompts: int | None = None) -> None:
    """Print the diagnosis of a model, draw it, and append its rows to `table`."""
    of_run, step = folder.name.startswith("checkpoint-"), checkpoint.step_of(folder)
    if of_run and step is None:
        raise ValueError(f"{folder}: expected a checkpoint-N, whose name says the step")
    rows, batch, signals = scored_rollouts(config, folder, count_prompts(config, prompts))
    success = torch.tensor([float(row.episode.success) for row in rows])
    named, kept = commitments(rows, load_tokenizer(str(folder)), config.env)
    masks = batch.is_action, batch.is_reasoning, batch.is_response, named
    found = correlations(signals, masks, batch.returns, success, ROLLOUTS)
    about = {
        "model": folder.parent.name if of_run else folder.name, "env": config.env,
        "step": step or 0, "seed": config.seed,
        "groups": len(rows) // ROLLOUTS, "group_size": ROLLOUTS, "temperature": config.temperature,
        "mean_success": success.mean().item(), "mean_return": batch.returns.mean().item(),
        "action_fraction": (batch.is_action.sum() / batch.is_response.sum().clamp(min=1)).item(),
        "commitments_kept": kept,
    }
    print(f"{config.env}, {folder}: {about['groups']} groups x {ROLLOUTS}, mean success {about['mean_success']:.3f}, "
          f"action tokens {100 * about['action_fraction']:.1f} % of the response")
    if named.any():
        print(f"{100 * kept:.1f} % of the answers are the moves that their thought commits to")
    else:
        found = [row for row in found if row["tokens"] != "commitment"]
    for row in found:
        print(f"{row['tokens']:>10}  {row['signal']:<14} ρ {row['rho']:+.3f} (p {row['p']:.1e})   "
              f"given the group's success ρ {row['partial_rho']:+.3f} (p {row['partial_p']:.1e})")
    groups = group_rows(signals["energy"], masks, batch.returns, success)
    out = folder.parent / "plots" if of_run else Path("runs") / "bottleneck"
    of_energy = {row["tokens"]: row for row in found if row["signal"] == "energy"}
    print(f"plot {plots.bottleneck(of_energy, groups, out / f'bottleneck-{config.env}-{folder.name}.png')}")
    if batch.is_action.any():
        weights = token_weights(signals["energy"], batch.is_action, batch.is_reasoning, *config.alpha_beta)
        pair = (values[batch.is_action].numpy() for values in (signals["energy"], weights))
        path = out / f"weights-{config.env}-{folder.name}.png"
        print(f"plot {plots.weight_of_energy(*pair, *config.alpha_beta, path)}")
    if table:
        made = checkpoint.provenance(folder)
        key = {name: about[name] for name in ("model", "env", "step", "seed")}
        append_rows(table, [{**about, **row, **made} for row in found])
        append_rows(groups_table(table), [{**key, "model_sha256": made["model_sha256"], **row} for row in groups])
        print(f"table {table}")


def groups_table(table: Path) -> Path:
    """Where the groups behind the rows of `table` are."""
    return table.with_name(f"{table.stem}-groups.csv")


def group_rows(energy: Tensor, masks: Sequence[Tensor], returns: Tensor, success: Tensor) -> list[dict]:
    """A row a group: success, σ_g, and the mean energy of each class of tokens, NaN for one without any."""
    columns = {"success": success.view(-1, ROLLOUTS).mean(1).numpy(),
               "return_std": group_spread(returns, ROLLOUTS),
               **{f"energy_{name}": group_means(energy, mask, ROLLOUTS).round(6)
                  for name, mask in zip(CLASSES, masks, strict=True)}}
    return [{"group": group, **dict(zip(columns, map(float, values), strict=True))}
            for group, values in enumerate(zip(*columns.values(), strict=True))]
