"""Environment of a measurement: versions and hardware, without host names, user names or paths."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch

_PACKAGES = ("flowaccel", "torch", "diffusers", "transformers")


def environment(device: torch.device | str | None = None) -> dict[str, str | int | bool]:
    """Describe the machine and the software for the result file.

    Args:
        device: the device that was measured; None means CUDA where there is one, else the CPU.

    Returns:
        Versions by package name, "python", "platform" (system and architecture only), "device", "cpu", "threads"
        (those torch uses), "cuda" on a CUDA device, and "git" and "dirty" when this file is tracked in a git checkout.
        What cannot be found out is absent.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    found: dict[str, str | int | bool] = {name: version for name in _PACKAGES if (version := _version(name))}
    found |= _git_state(Path(__file__).resolve())
    found |= {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
    }
    found["device"] = device.type if device.type != "cuda" else torch.cuda.get_device_name(device)
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state(file: Path) -> dict[str, str | bool]:
    """Return the commit of the checkout that tracks `file`, and whether tracked files differ from it.

    A package installed inside *somebody else's* repository is not tracked there; its commit would be a wrong answer.
    """
    if _git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        return {}
    commit = _git(file.parent, "rev-parse", "HEAD")
    changes = _git(file.parent, "status", "--porcelain", "--untracked-files=no")
    if commit is None or changes is None:
        return {}
    return {"git": commit, "dirty": bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Return the output of a git command. None when there is no git, no repository, or no answer in five seconds."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    """Return the name of the processor, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
