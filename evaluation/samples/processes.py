"""Several processes that make the samples of one run: who makes what, and one run in a folder at a time.

Nothing is sent between them but barriers: samples go to files, and seeds depend on the sample's id alone.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

LOCK = ".lock"
_PATIENCE = datetime.timedelta(days=7)  # the first process measures alone for as long as it takes


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    group: Any = None
    """The process group of the barriers, None for a single process."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes what is written once."""
        return self.rank == 0

    def share(self, ids: Sequence[int]) -> list[int]:
        """This process's part of `ids`, every `size`-th; together the parts are `ids`, and none is in two."""
        return list(ids[self.rank :: self.size])

    def wait(self) -> None:
        """Return when every process has come here.

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
    """The processes of the initialised `torch.distributed`, or this one alone; all of them must enter.

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
    """Keep other runs out of `folder` until all processes of this one have left or ended, however they end.

    The lock is the operating system's (POSIX, one byte of the file `.lock` for every process), so a killed run leaves
    none behind. Not noticed are another run on Windows, one on a network file system without locks (a warning says so),
    and one in the same process.

    Raises:
        ValueError: another run is at work in the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    file = _lock_as_first(path) if world.first else None
    world.wait()
    if file is None:
        file = path.open("r+")
        _lock(file, world.rank, 1)
    try:
        yield
    finally:
        if world.first:
            path.unlink(missing_ok=True)
        file.close()


def _lock_as_first(path: Path) -> IO[str]:
    """The open lock file with its first byte locked, after a look at all bytes: nobody holds any of them."""
    while True:
        file = path.open("a+")
        try:
            _lock(file, 0, 0)
            _lock(file, 1, 0, free=True)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            owner = file.read().strip()
            file.close()
            raise ValueError(
                f"{path.parent} is in use by another run{f' ({owner})' if owner else ''}; "
                "wait for its end or choose another --out"
            ) from error
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            return file
        file.close()  # its holder deleted it while this process opened it


def _lock(file: IO[str], start: int, length: int, *, free: bool = False) -> None:
    """Lock or free `length` bytes from `start` on (0: all of them) without waiting."""
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_UN if free else fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        warnings.warn(f"this file system has no locks; see to it that no other run uses {file.name}", stacklevel=2)
