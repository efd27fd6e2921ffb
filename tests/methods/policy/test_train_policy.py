"""`flowaccel train policy` from outside: files, exit codes, messages."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from commands import fails, run
from flowaccel import LearnedPolicy, Recipe
from flowaccel.methods.policy.network import AccelerationPolicy

TRAIN = ["train", "policy", "zoo:sit-digits", "--device", "cpu", "--reward", "accuracy:zoo:digits-features"]
FAST = ["--updates", "2", "--groups", "2", "--group-size", "2", "--pool", "10", "--steps", "4", "--head-width", "8"]


@pytest.mark.slow
def test_train_resume_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = json.loads(run(*TRAIN, *FAST, "--out", "mine", "--save-every", "1", "--json").stdout)
    assert said["updates"] == 2 and 1 <= said["cost"] <= 4
    (part,) = Recipe.from_pretrained("mine").accelerators
    assert isinstance(part, LearnedPolicy)
    heads = part.resolve()
    assert heads.levels == ("step", "cache") and heads.config.costs["reuse"] >= 0
    run(*TRAIN, *FAST, "--out", "mine", "--updates", "3")  # the last --updates counts: goes on from 2
    longer = AccelerationPolicy.from_pretrained("mine/policy")
    assert any(not torch.equal(a, b) for a, b in zip(heads.parameters(), longer.parameters(), strict=True))
    assert "other settings" in fails(*TRAIN, *FAST, "--out", "mine", "--discount", "0.9")
    made = run("generate", "zoo:sit-digits", "--recipe", "mine", "--classes", "1,2", "--report", "--out", "digits")
    assert "image 1: " in made.stderr and "steps, " in made.stderr
    assert len(list(Path("digits").glob("*.png"))) == 2


@pytest.mark.slow
def test_one_shot(tmp_path: Path) -> None:
    out = str(tmp_path / "mine")
    one_shot = [*TRAIN, *FAST, "--out", out, "--levels", "count", "--save-every", "1"]
    said = json.loads(run(*one_shot, "--counts", "1,3", "--json").stdout)
    assert 1 <= said["cost"] <= 3
    heads = AccelerationPolicy.from_pretrained(f"{out}/policy")
    assert heads.levels == ("count",) and list(heads.config.counts) == [1, 3]
    assert "other settings" in fails(*one_shot, "--counts", "1,4")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--group-size", "1"], "group_size must be at least 2, got 1"),
        (["--levels", "width"], "levels must hold at least one of step, cache, sparse"),
        (["--levels", "step,count", "--counts", "2,4"], "levels must not hold both 'step' and 'count'"),
        (["--levels", "count"], "counts and the level 'count' come together"),
        (["--counts", "2,4"], "counts and the level 'count' come together"),
        (["--levels", "count", "--counts", "few"], "--counts must be whole numbers between commas"),
        (["--reward", "beauty"], "accuracy:zoo:digits-features"),
        (["--discriminator", "nobody"], "discriminator must be conv, zoo:NAME or clip:PATH"),
        (["--discount", "1.5"], "discount must lie in (0, 1), got 1.5"),
        (["--estimator", "ppo"], "estimator must be one of grpo, rloo, got 'ppo'"),
    ],
)
def test_bad_input(options: list[str], message: str, tmp_path: Path) -> None:
    assert message in fails(*TRAIN, *FAST, "--out", str(tmp_path / "out"), *options)
