"""Several processes: who makes what, one run at a time in a folder, and the same bytes however many they are."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tiny
from flowaccel.cli import app
from flowaccel.evaluation.samples import processes
from flowaccel.evaluation.samples.processes import World, claimed

pytestmark = pytest.mark.usefixtures("process")

SAMPLES, STEPS, ROWS = 11, 3, ("baseline", "baseline@2", "euler@2")

# The command line, on a network whose images do not depend on the batch, with a log of every sample written; in the
# process of the given rank the machine loses power after so many of them.
WORKER = """
import os
import sys

import torch

from flowaccel.cli import main
from flowaccel.evaluation import runner
from flowaccel.evaluation.samples.store import SampleStore

log, victim, allowed = sys.argv.pop(1), sys.argv.pop(1), int(sys.argv.pop(1))
call, write, written = runner.call, SampleStore.write, []


def singly(pipe, protocol, ids, steps):
    return torch.cat([call(pipe, protocol, [sample_id], steps) for sample_id in ids])


def counted(store, sample_id, image):
    if os.environ.get("RANK", "0") == victim and len(written) == allowed:
        os._exit(9)
    write(store, sample_id, image)
    written.append(sample_id)
    with open(log, "a") as file:
        file.write(f"{store.folder.name}/{sample_id} {os.environ.get('RANK', '0')}\\n")


runner.call, SampleStore.write = singly, counted
sys.argv[0] = "flowaccel"
main()
"""


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_sit_pipeline(tmp_path_factory.mktemp("saved") / "pipe", num_layers=1)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = tmp_path_factory.mktemp("worker") / "worker.py"
    script.write_text(WORKER)
    return script


def evaluation(pipe: Path, out: Path, batch: int, *more: str) -> list[str]:
    small = f"--num-samples {SAMPLES} --steps {STEPS} --baseline-steps 2 --recipe euler@2 --rounds 2 --latency-batch 1"
    networks = "--metrics kid,rel_l2 --features zoo:digits-features --reference zoo:digits --device cpu"
    command = ["evaluate", str(pipe), *small.split(), *networks.split(), "--batch-size", str(batch), "--out", str(out)]
    return [*command, *more]


def start(command: list[str], world: int, *script: str) -> subprocess.CompletedProcess[str]:
    """Run a script or module in `world` processes that torchrun starts, or in one without it."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, *script, *command], capture_output=True, text=True, timeout=600, check=False
    )


def files(out: Path) -> dict[str, bytes]:
    rows = out / "rows"
    return {str(path.relative_to(rows)): path.read_bytes() for path in sorted(rows.rglob("*")) if path.is_file()}


def made(log: Path) -> list[str]:
    return [line.split()[0] for line in log.read_text().splitlines()]


ALL = sorted(f"{row}/{sample_id}" for row in ROWS for sample_id in range(SAMPLES))


@pytest.fixture(scope="module")
def single(pipe: Path, worker: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("single") / "run"
    log = out.parent / "log"
    ended = start([str(log), "-", "0", *evaluation(pipe, out, 4)], 1, str(worker))
    assert ended.returncode == 0, ended.stderr
    assert sorted(made(log)) == ALL
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "allowed"),
    [
        ("1", 2),
        ("0", 7),
        *(pytest.param(*case, marks=pytest.mark.soak) for case in itertools.product("01", (1, 3, 4, 5, 6, 8, 9, 10))),
    ],
)
def test_two_processes_killed_and_resumed_by_one(
    victim: str, allowed: int, pipe: Path, worker: Path, single: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    killed = start([str(log), victim, str(allowed), *evaluation(pipe, out, 3)], 2, str(worker))
    assert killed.returncode != 0
    assert not (out / "results.json").exists()
    before = made(log)
    assert sum(line.endswith(victim) for line in log.read_text().splitlines()) == allowed
    assert len(before) < len(ALL)
    resumed = start([str(log), "-", "0", *evaluation(pipe, out, 5)], 1, str(worker))
    assert resumed.returncode == 0, resumed.stderr
    assert sorted(made(log)) == ALL  # each once, over both runs
    assert {name: content for name, content in files(out).items() if not name.endswith(".tmp")} == files(single)
    assert not (out / ".lock").exists()


@pytest.mark.slow
def test_two_processes_share_the_samples_and_agree_with_one(
    pipe: Path, worker: Path, single: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    more = ["--expect-world", "2", "--json"]
    ended = start([str(log), "-", "0", *evaluation(pipe, out, 2, *more)], 2, str(worker))
    assert ended.returncode == 0, ended.stderr
    assert "SIGABRT" not in ended.stderr
    assert ended.stderr.count("processes: 2") == 1
    assert sorted(made(log)) == ALL
    by_rank = [line.split() for line in log.read_text().splitlines()]
    assert {int(name.split("/")[1]) % 2 for name, rank in by_rank if rank == "0"} == {0}
    assert {int(name.split("/")[1]) % 2 for name, rank in by_rank if rank == "1"} == {1}
    assert files(out) == files(single)
    assert not (out / ".lock").exists()
    found, alone = json.loads(ended.stdout), json.loads((single / "results.json").read_text())
    assert found == json.loads((out / "results.json").read_text())
    assert (found["environment"]["world_size"], alone["environment"]["world_size"]) == (2, 1)
    assert [row["metrics"] for row in found["rows"]] == [row["metrics"] for row in alone["rows"]]


@pytest.mark.slow
def test_a_failure_of_one_process_ends_the_others(pipe: Path, tmp_path: Path) -> None:
    """The second process finds another seed's samples, so it raises while the first one waits for it."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\nfrom flowaccel.cli import main\n"
        "sys.argv += ['--seed', os.environ['RANK']]\nsys.argv[0] = 'flowaccel'\nmain()\n"
    )
    ended = start(evaluation(pipe, tmp_path / "run", 4), 2, str(script))
    assert ended.returncode != 0
    assert "holds samples made differently (seed: there 0, now 1)" in ended.stderr
    assert not list((tmp_path / "run").rglob("*.png"))


def test_another_number_of_processes_is_refused(pipe: Path, tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, evaluation(pipe, tmp_path / "run", 4, "--expect-world", "2"))
    assert (ended.exit_code, ended.stdout) == (2, "")
    message = " ".join(ended.stderr.split())
    assert "--expect-world 2, but the number of processes is 1" in message
    assert "torchrun --nproc-per-node 2 -m flowaccel" in message
    assert "with --cpu it starts a single process" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_are_a_partition(size: int) -> None:
    ids = [3, 5, 6, 8, 11]
    shares = [World(rank, size).share(ids) for rank in range(size)]
    assert sorted(sample_id for share in shares for sample_id in share) == ids
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_single_process_waits_for_nobody() -> None:
    with processes.processes() as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        world.wait()


# Takes the lock as another run would, and holds it until its input ends.
HOLDER = """
import sys, pathlib
from filelock import FileLock
folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
lock = FileLock(folder / name)
lock.acquire(blocking=False)
(folder / ".lock").write_text("process 7 on elsewhere")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("name", [".lock", ".lock-3"])
def test_a_second_run_in_the_folder_is_refused_while_any_process_of_the_first_lives(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        refused = pytest.raises(ValueError, match=r"is in use by another run \(process 7 on elsewhere\); wait")
        with refused, claimed(tmp_path, World()):
            pytest.fail("two runs at once")
        assert (tmp_path / name).exists()
        holder.kill()
    with claimed(tmp_path, World()):  # a killed run leaves a file, but no lock
        assert (tmp_path / ".lock").read_text().startswith("process ")
        assert "elsewhere" not in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_in_nobodys_way(tmp_path: Path) -> None:
    for name in (".lock", ".lock-1", ".lock-2"):
        (tmp_path / name).touch()
    with claimed(tmp_path, World(0, 2)), claimed(tmp_path, World(1, 2)):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".lock-1"}
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_in_this_process_is_refused(tmp_path: Path) -> None:
    with claimed(tmp_path, World()):
        with pytest.raises(ValueError, match="is in use by another run"), claimed(tmp_path, World()):
            pytest.fail("two runs at once")
        assert (tmp_path / ".lock").exists()


def test_the_lock_goes_with_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), claimed(tmp_path, World()):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
