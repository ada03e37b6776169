"""The numbers of docs/worked-example.md, read from there and computed again, so that the two cannot part."""

import re
from pathlib import Path

import pytest
import torch
from torch import tensor

from actfocus import policy_loss, token_weights
from energy import token_energy

TEXT = (Path(__file__).parents[1] / "docs" / "worked-example.md").read_text(encoding="utf-8")
ROWS = {name: cells for name, *cells in re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", TEXT, re.M)}


def row(name):
    """(1, 3): a line of the tables."""
    return tensor([[float(cell) for cell in ROWS[name]]])


def said(pattern):
    """The one number that the text has at # of the pattern."""
    (number,) = re.findall(pattern.replace("#", r"(-?\d+(?:\.\d+)?)\b"), TEXT)
    return float(number)


def near(number):
    """Equal when rounded to three digits."""
    return pytest.approx(number, abs=5.1e-4)


def energies_and_weights():
    logits = tensor([[[float(e) for e in cell.split(",")] for cell in ROWS["exp f_ref"]]]).log()  # (1, 3, 3)
    is_action = tensor([[kind == "action" for kind in ROWS["class"]]])
    energy = token_energy(logits)
    return energy, is_action, token_weights(energy, is_action, ~is_action, said("α = #"), said("β = #"))


def test_eq4_energies_are_those_on_paper():
    energy, *_ = energies_and_weights()
    assert energy[0].tolist() == near(row("E")[0].tolist())


def test_eq5_weights_are_those_on_paper():
    energy, is_action, weights = energies_and_weights()
    assert energy[is_action].mean().item() == near(said(r"μ_E = .*= #\n"))
    assert energy[is_action].std(correction=0).item() == near(said(r"σ_E = .*= #\n"))
    assert torch.tensor([-1.0, 1.0]).sigmoid().tolist() == near([said(r"sigmoid\(-1\) = #"), said(r"sigmoid\(1\) = #")])
    assert weights[0].tolist() == near(row("w")[0].tolist())
    assert weights.sum().item() == near(said(r"sum is #\."))
    assert (weights[is_action].sum() / weights.sum()).item() == near(said("hold # of the weight"))
    assert is_action.float().mean().item() == near(said(r"would hold #\."))


def test_eq6_loss_is_the_one_on_paper():
    *_, weights = energies_and_weights()
    low, high, ratio, advantages = said("ε_low = #"), said("ε_high = #"), row("ρ"), row("A")
    terms = torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)
    assert torch.equal(terms, row("min(ρA, clip(ρ)A)"))
    old_logp = torch.full_like(ratio, -1.0)
    logp = (old_logp + ratio.log()).requires_grad_()
    loss = policy_loss(logp, old_logp, advantages, weights, low, high)
    assert loss.item() == near(said(r"L = .*= #\n"))
    loss.backward()
    assert (logp.grad == 0).tolist() == [[False, True, False]]  # "Up" is clipped
    uniform = policy_loss(logp, old_logp, advantages, torch.ones_like(ratio), low, high)
    assert uniform.item() == near(said(r"plain mean, .*= #\."))
