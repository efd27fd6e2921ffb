"""Promise 4 over all families: what was saved while accelerated gives the same image in a fresh process."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from families import CASES
from flowaccel import accelerate, report
from tiers import Process

HERE = Path(__file__).parent.parent
FLOW = {"sit", "sd3", "flux", "flux_img2img", "wan21", "wan22", "auraflow"}
"""Families whose stock scheduler a sampler of ours can stand in for."""

LOADED = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from safetensors.torch import save_file
from families import CASES
from flowaccel import report
from flowaccel.pipelines import AcceleratedPipeline

folder, made = Path({folder!r}), {{}}
for name, case in CASES.items():
    untouched = case.make(seed=5)
    absent = {{part: None for part, value in untouched.components.items() if value is None}}
    pipe = AcceleratedPipeline.from_pretrained(folder / name, **absent)
    assert type(pipe) is type(untouched), type(pipe)
    pipe.set_progress_bar_config(disable=True)
    made[name] = case(pipe, batch=2).float().contiguous()
    print(name, len(report(pipe).steps))
save_file(made, folder / "made.safetensors")
"""


def test_same_image_in_a_fresh_process(tmp_path: Path, process: Process) -> None:
    expected, evaluations = {}, {}
    for name, case in CASES.items():
        pipe = case.make()
        before = case(pipe, batch=2)
        accelerate(pipe, "ab2" if name in FLOW else [])
        expected[name] = case(pipe, batch=2).float()
        assert torch.equal(before, expected[name]) == (name not in FLOW)
        evaluations[name] = len(report(pipe).steps)
        pipe.save_pretrained(tmp_path / name)
    script = LOADED.format(tests=str(HERE), folder=str(tmp_path))
    done = process("-c", script)
    counted = dict(line.split() for line in done.stdout.splitlines() if line.count(" ") == 1)
    assert {name: int(number) for name, number in counted.items()} == evaluations
    made = load_file(tmp_path / "made.safetensors")
    assert {name for name in made if not torch.equal(made[name], expected[name])} == set()
