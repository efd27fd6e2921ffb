"""Processes that make the samples of one run: their shares, and one run in a folder at a time.

Nothing is sent between them but barriers: samples go to files, and seeds depend on the sample's id alone.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock, Timeout

LOCK = ".lock"
_PATIENCE = datetime.timedelta(days=7)  # the first process measures alone for as long as it takes


@dataclass(frozen=True)
class World:
    """Processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """The process group of the barriers, None for a single process."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def share(self, ids: Sequence[int]) -> list[int]:
        """Return this process's part of `ids`, every `size`-th; together the parts are `ids`, and none is in two."""
        return list(ids[self.rank :: self.size])

    def wait(self) -> None:
        """Wait until every process has reached this point.

        Raises:
            ConnectionError: another process has ended before.
        """
        if self.group is None:
            return
        try:
            dist.barrier(group=self.group)
        except RuntimeError as error:
            raise ConnectionError(
                f"process {self.rank} of 0 .. {self.size - 1} stops because another one has ended; "
                "the message of that one says why"
            ) from error


@contextlib.contextmanager
def processes() -> Iterator[World]:
    """Yield the processes of the initialised `torch.distributed`, or this one alone; all of them must enter.

    The barriers are gloo's whatever the backend of the default group: waiting costs no GPU and has no short time limit.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield World()
        return
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    try:
        yield World(dist.get_rank(), dist.get_world_size(), group)
    finally:
        dist.destroy_process_group(group)


@contextlib.contextmanager
def claimed(folder: Path, world: World) -> Iterator[None]:
    """Lock `folder` against other runs until all processes of this one have left or ended, however they end.

    Every process holds a lock of the operating system on a file of its own, so a killed run leaves none behind. A file
    system without locks is used all the same, with a warning.

    Raises:
        ValueError: another run is at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        if world.first:
            _hold(folder / LOCK, held)
            with (
                contextlib.ExitStack() as found
            ):  # of processes that a killed run left, or that go on without their first
                for path in folder.glob(f"{LOCK}-*"):
                    _hold(path, found)
            (folder / LOCK).write_text(f"process {os.getpid()} on {platform.node()}")
        world.wait()
        if not world.first:
            _hold(folder / f"{LOCK}-{world.rank}", held)
        yield


def _hold(path: Path, held: contextlib.ExitStack) -> None:
    """Lock a file without waiting; `held` deletes and frees it."""
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        owner = path.with_name(LOCK).read_text().strip() if path.with_name(LOCK).exists() else ""
        raise ValueError(
            f"{path.parent} is in use by another run{f' ({owner})' if owner else ''}; "
            "wait for its end or choose another --out"
        ) from error
    except NotImplementedError:
        warnings.warn(f"this file system has no locks; see to it that no other run uses {path.parent}", stacklevel=2)
        return
    held.callback(_free, lock, path)


def _free(lock: FileLock, path: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows deletes no file that is open
        path.unlink(missing_ok=True)  # first, so that nobody else's is deleted
    lock.release()
