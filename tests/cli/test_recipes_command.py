"""`flowaccel recipes`: saved recipes and the rules."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from flowaccel import Recipe, Sampler, VelocityRefiner
from flowaccel.cli.app import app
from flowaccel.recipe.compatibility import RULES


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["recipes", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.output


def test_a_saved_recipe(tmp_path: Path) -> None:
    recipe = Recipe([Sampler("flowturbo", {"blocks": "H1R1"}), VelocityRefiner()], name="mine")
    recipe.save_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "flowaccel.json"):
        assert json.loads(run(str(path))) == json.loads(run(str(path), "--json")) == recipe.to_dict()


def test_rules() -> None:
    assert json.loads(run("--rules", "--json")) == {str(rule): rule.reason for rule in RULES}
    assert "sampler comes before refiner" in run("--rules")
    assert "give a recipe or --rules, not both; got 'heun'" in run("heun", "--rules", code=2)


def test_an_error_says_where(tmp_path: Path) -> None:
    file = tmp_path / "r.json"
    file.write_text(json.dumps({"schema": 1, "accelerators": [{"name": "sampler", "smpler": "heun"}]}))
    assert "accelerators[0].smpler: unknown; did you mean 'sampler'? allowed: name" in run(str(file), code=2)
