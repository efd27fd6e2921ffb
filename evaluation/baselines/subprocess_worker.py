"""Parent side of a row that is made and timed in its own process, because its library patches classes.

The other side is `cache_dit_process`. Both speak JSON, one object a line: this side says what to do, the other answers
with any number of `{"progress": n}` and then with `{"result": ...}` or `{"error": [kind, message]}`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Self

import torch

from flowaccel.errors import MissingExtraError, UnsupportedModelError
from flowaccel.evaluation.baselines.baselines import Baseline
from flowaccel.evaluation.timing.attention import chosen_attention
from flowaccel.evaluation.timing.cost import Cost, denoiser
from flowaccel.evaluation.timing.latency import Timing
from flowaccel.hooks import Pipeline

LOG = "process.log"
REMARK = (
    "Made and timed in a process of its own, interleaved with the untouched pipeline there. The speed-up is the ratio "
    "of each round there; ms/image is the untouched pipeline's time here divided by that ratio, round by round."
)
_MODULE = "flowaccel.evaluation.baselines.cache_dit_process"
_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # the new process belongs to nobody's group
_ERRORS: dict[str, type[Exception]] = {
    "UnsupportedModelError": UnsupportedModelError,
    "MissingExtraError": MissingExtraError,
    "OSError": OSError,
    "FloatingPointError": FloatingPointError,
}


class OwnProcess:
    """Process of one row, from the start of a run to its end; a context manager.

    Args:
        pipe: the pipeline of the run, which the process loads anew from where this one was loaded.
        baseline: baseline to enable in the process.
        protocol: the `Protocol` of the run; its conditions are saved in `out`.
        out: the run folder.
        folder: the row's own folder.
    """

    def __init__(self, pipe: Pipeline, baseline: Baseline, protocol: Any, out: Path, folder: Path) -> None:
        self._name, self._log = baseline.name, folder / LOG
        self._job = {
            "baseline": baseline.name,
            "pipeline": str(loaded_from(pipe, baseline)),
            "dtype": str(denoiser(pipe).dtype).removeprefix("torch."),
            "device": str(pipe.device),
            "attention": chosen_attention(pipe),
            "threads": torch.get_num_threads(),
            "protocol": {f.name: getattr(protocol, f.name) for f in fields(protocol) if f.name != "conditions"},
            "conditions": protocol.conditions.describe(),
            "out": str(out),
        }

    def __enter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS}
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _MODULE],  # without the working directory on sys.path
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={"CACHE_DIT_LOG_LEVEL": "WARNING"} | environment,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is not None:
            self._process.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # what a process that has ended was not told
                    stream.close()
        self._process.wait()

    def check(self, manifest: dict[str, Any]) -> None:
        """Raise unless the process has the same pipeline and the baseline works with it.

        Raises:
            ValueError: it loaded something else than what is evaluated here.
            UnsupportedModelError: the library does not support the pipeline.
            MissingExtraError: the library cannot be imported.
        """
        self._result(do="start", **self._job)
        self._result(do="check", manifest=manifest)

    def samples(self, batches: Sequence[list[int]]) -> Iterator[int]:
        """Generate these samples in the process; yields the number of samples of each batch."""
        for message in self._answers(do="samples", batches=list(batches)):
            if "progress" in message:
                yield message["progress"]

    def cost(self) -> Cost:
        """Return the cost of a call in the process."""
        return Cost(**self._result(do="cost"))

    def time(self) -> tuple[Timing, Timing]:
        """Return timings of the untouched pipeline and of the row, interleaved in the process."""
        found = self._result(do="time")
        untouched, row = ({**found[name], "seconds": tuple(found[name]["seconds"])} for name in ("untouched", "row"))
        return Timing(**untouched), Timing(**row)

    def _result(self, **request: Any) -> Any:
        *_, last = self._answers(**request)
        return last["result"]

    def _answers(self, **request: Any) -> Iterator[dict[str, Any]]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and the reading below says how
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        while True:
            line = self._process.stdout.readline()
            if not line:
                raise OSError(
                    f"the process of row {self._name} ended with code {self._process.wait()} "
                    f"({_last_line(self._log)}); {self._log} has the rest"
                )
            message = json.loads(line)
            if "error" in message:
                kind, text = message["error"]
                raise _ERRORS.get(kind, ValueError)(text)
            yield message
            if "result" in message:
                return


def loaded_from(pipe: Pipeline, baseline: Baseline) -> str:
    """Return the path or id from which the pipeline was loaded.

    Raises:
        ValueError: it was put together in memory.
    """
    source = getattr(pipe, "name_or_path", None)
    if not source:
        raise ValueError(
            f"baseline {baseline.name} runs in a process of its own, which has to load the pipeline, and this one was "
            "put together in memory: save it with pipe.save_pretrained(folder) and evaluate load_pipeline(folder)"
        )
    return str(source)


def carried_over(untouched: Timing, there: Timing, row: Timing) -> Timing:
    """Return `row`, timed beside `there` in another process, as if it were timed beside `untouched`.

    Each round is the time of `untouched` times the ratio of `row` to `there`.

    `untouched.ratio_to(...)` of it is then exactly `there.ratio_to(row)`.
    """
    seconds = zip(untouched.seconds, there.seconds, row.seconds, strict=True)
    return Timing(seconds=tuple(here * b / a for here, a, b in seconds), first_call_s=row.first_call_s)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
