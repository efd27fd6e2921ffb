"""Storage of recipes: a file, a folder or a Hub repository with `flowaccel.json` and a sub-folder per learned part.

Only JSON and safetensors are read, and from the Hub only these are downloaded.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from flowaccel.errors import WeightsNotFoundError
from flowaccel.recipe.serialization import Part, Source

FILE_NAME = "flowaccel.json"
HUB_OPTIONS = ("revision", "cache_dir", "local_files_only", "token")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str | Path) -> bool:
    """Return whether `text` has the form OWNER/NAME."""
    return isinstance(text, str) and _HUB_ID.fullmatch(text) is not None


def locate(path_or_id: str | Path, **hub: Any) -> tuple[Path, Source]:
    """Return the JSON file of a recipe, and the source of its learned parts.

    Args:
        path_or_id: a file, a folder or a Hub id.
        hub: `revision`, `cache_dir`, `local_files_only` and `token`, for the Hub.

    Raises:
        FileNotFoundError: no such file or folder.
        WeightsNotFoundError: the Hub did not give it, or it holds no recipe.
    """
    path = Path(path_or_id)
    if not path.exists() and is_hub_id(path_or_id):
        return _locate_on_hub(str(path_or_id), hub)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no recipe at {file}")
    return file, Source(file.parent, contained=path.is_dir())


def holds_recipe(path_or_id: str | Path, **hub: Any) -> bool:
    """Return whether a folder or a Hub repository contains a recipe.

    Raises:
        WeightsNotFoundError: the Hub cannot be asked.
    """
    folder = Path(path_or_id)
    if not folder.exists() and is_hub_id(path_or_id):
        folder = _download(str(path_or_id), [FILE_NAME], hub)
    return (folder / FILE_NAME).is_file()


def _locate_on_hub(repo_id: str, hub: Mapping[str, Any]) -> tuple[Path, Source]:
    folder = _download(repo_id, [FILE_NAME], hub)
    if not (folder / FILE_NAME).is_file():
        raise WeightsNotFoundError(f"{repo_id} on the Hub holds no recipe: it has no {FILE_NAME}")
    pinned = {**hub, "revision": folder.name}  # the commit, so that parts and JSON match

    def fetch(part: str) -> None:
        _download(repo_id, [f"{part}/*.json", f"{part}/*.safetensors"], pinned)

    return folder / FILE_NAME, Source(folder, fetch=fetch)


def _download(repo_id: str, patterns: list[str], hub: Mapping[str, Any]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=patterns, **hub))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise WeightsNotFoundError(
            f"the Hub did not give {' and '.join(patterns)} of {repo_id} ({type(error).__name__}: {reason})"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        ValueError: it holds something else.
    """
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ValueError(f"{file} is not a recipe: {type(error).__name__}: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{file} is not a recipe: it holds {str(data)[:40]!r}, not an object")
    return data


def write(folder: Path, data: Mapping[str, Any], parts: Mapping[str, Part], verify: Callable[[Path], Any]) -> None:
    """Write a recipe atomically: completely, or not at all.

    Args:
        folder: target folder, created if absent. Other files in it are kept.
        data: content of `flowaccel.json`.
        parts: learned parts by sub-folder; those on disk are loaded and saved again.
        verify: called with the finished copy before anything in `folder` is touched; raises if it is invalid.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    near = folder if folder.is_dir() else folder.parent  # on the same file system, so that a move is a rename
    with tempfile.TemporaryDirectory(prefix=".flowaccel-", dir=near) as temporary:
        staging, replaced = Path(temporary, "new"), Path(temporary, "old")
        staging.mkdir()
        replaced.mkdir()
        for name, part in parts.items():
            network: Any = part.network
            if not hasattr(network, "save_pretrained"):
                raise TypeError(
                    f"the learned part {name!r} is a {type(network).__name__}, which has no save_pretrained; make it a "
                    "diffusers ModelMixin, or give the folder that it was saved to"
                )
            network.save_pretrained(staging / name)
        (staging / FILE_NAME).write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        verify(staging)
        folder.mkdir(exist_ok=True)
        for name in parts:
            if (folder / name).exists():
                (folder / name).rename(replaced / name)
            (staging / name).rename(folder / name)
        os.replace(staging / FILE_NAME, folder / FILE_NAME)


def upload(
    folder: Path, repo_id: str, *, private: bool | None, token: str | bool | None, message: str, create_pr: bool
) -> str:
    """Upload a folder to a model repository, which is created if absent; returns the URL of the commit."""
    huggingface_hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
    commit = huggingface_hub.upload_folder(
        repo_id=repo_id, folder_path=folder, token=token, commit_message=message, create_pr=create_pr
    )
    return str(commit.commit_url)
