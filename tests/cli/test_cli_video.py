"""`flowaccel generate` on a video pipeline, and what takes none."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tiny
from commands import run
from flowaccel.cli import generate as generate_command
from tiers import Process

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved") / "wan"
    tiny.wan_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def webp_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, and as if the extra were missing: WebP keeps every pixel."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "imageio", None)  # type: ignore[arg-type]


def pixels(path: str) -> Any:
    """(frames, height, width, 3) int16."""
    with Image.open(path) as video:
        return np.stack([_frame(video, index) for index in range(video.n_frames)]).astype(np.int16)


def _frame(video: Any, index: int) -> Any:
    video.seek(index)
    return np.asarray(video.convert("RGB"))


def test_videos_depend_on_prompt_seed_and_number_alone(saved: str) -> None:
    prompts = ["--prompt", "a cat", "--prompt", "a dog", "--num-images", "3"]
    found = json.loads(run("generate", saved, *prompts, *SMALL, "--fps", "8", "--out", "one", "--json").stdout)
    assert found["files"] == [str(Path("one") / f"0000{index}.webp") for index in range(3)]
    run("generate", saved, *prompts, *SMALL, "--batch-size", "3", "--out", "three")
    one, three = ([pixels(f"{out}/0000{index}.webp") for index in range(3)] for out in ("one", "three"))
    assert all(video.shape == (5, 32, 48, 3) for video in one)
    for mine, theirs in zip(one, three, strict=True):
        assert np.abs(mine - theirs).max() <= 1
    assert np.abs(one[0] - one[1]).max() > 10
    assert np.abs(one[0] - one[2]).max() > 10  # the same prompt, another number
    with Image.open("one/00000.webp") as video:
        video.load()  # reads the durations
        assert video.info["duration"] == 125


def test_the_missing_extra_is_named(saved: str) -> None:
    said = " ".join(run("generate", saved, "--prompt", "x", *SMALL).stderr.split())
    assert "animated WebP, because mp4 needs: pip install 'flowaccel[video]'" in said
    assert "wrote 1 videos to" in said


@pytest.mark.parametrize(
    ("arguments", "option"),
    [(["--num-frames", "5"], "--num-frames"), (["--height", "8"], "--height"), (["--fps", "8"], "--fps")],
)
def test_an_image_pipeline_that_takes_no_such_thing(arguments: list[str], option: str, tmp_path: Path) -> None:
    pipe = tiny.save_sit_pipeline(tmp_path / "sit", num_layers=1)
    said = " ".join(run("generate", str(pipe), "--device", "cpu", "--out", "out", *arguments, code=2).stderr.split())
    assert f"SiTPipeline does not take {option}; its arguments are class_labels, " in said
    assert not Path("out").exists()


def test_the_frame_rate_goes_to_a_pipeline_that_is_asked_for_one() -> None:
    class Talking:
        def __call__(self, prompt: str, num_frames: int = 9, frame_rate: int = 25) -> None: ...

    class Silent:
        def __call__(self, prompt: str, num_frames: int = 9) -> None: ...

    assert generate_command.call_arguments(Talking(), "folder", None, fps=8)["frame_rate"] == 8
    assert generate_command.frame_rate(Talking()) == 25
    assert "frame_rate" not in generate_command.call_arguments(Silent(), "folder", None, fps=8)
    assert generate_command.frame_rate(Silent()) == generate_command.FPS


def test_evaluate_says_that_it_compares_no_videos(saved: str) -> None:
    networks = ["--features", "zoo:digits-features", "--reference", "zoo:digits", "--metrics", "kid", "--device", "cpu"]
    Path("prompts.txt").write_text("a cat\n")
    said = " ".join(
        run("evaluate", saved, "--prompts", "prompts.txt", *networks, "--out", "run", code=2).stderr.split()
    )
    assert "evaluate needs a pipeline that makes images, and WanPipeline does not" in said
    assert not Path("run").exists()


def test_a_pipeline_whose_output_has_no_images() -> None:
    from flowaccel.evaluation import Classes, Protocol, runner

    class Odd:
        def __call__(self, **_: Any) -> Any:
            return SimpleNamespace(frames=[])

    with pytest.raises(ValueError, match="makes images, and Odd does not"):
        runner.call(Odd(), Protocol(conditions=Classes((0,)), steps=1), [0], 1)


@pytest.mark.slow
def test_two_processes_write_what_one_does(saved: str, process: Process) -> None:
    environment = os.environ | {"PYTHONPATH": str(blocked())}
    command = ["-m", "flowaccel", "generate", saved, "--prompt", "a cat", "--num-images", "3", *SMALL]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for out, start in (("one", []), ("two", torchrun)):
        world = ["--expect-world", "2" if start else "1"]
        done = process(*start, *command, "--out", out, *world, env=environment)
        assert done.stderr.count("wrote 3 videos") == 1
    names = [path.name for path in sorted(Path("one").iterdir())]
    assert len(names) == 3
    assert {name: Path("one", name).read_bytes() for name in names} == {
        path.name: path.read_bytes() for path in Path("two").iterdir()
    }


def blocked() -> Path:
    """A folder for PYTHONPATH whose `imageio` cannot be imported."""
    folder = Path("blocked").resolve()
    folder.mkdir(exist_ok=True)
    (folder / "imageio.py").write_text("raise ModuleNotFoundError('blocked', name='imageio')\n")
    return folder


def test_the_example(tmp_path: Path, process: Process) -> None:
    done = process(ROOT / "examples" / "generate_video.py", env=os.environ | {"PYTHONPATH": str(blocked())})
    assert "noise" in done.stdout
    videos = sorted(tmp_path.glob("*.webp"))
    assert [path.name for path in videos] == ["video.webp"]
    assert len(pixels(str(videos[0]))) == 9
