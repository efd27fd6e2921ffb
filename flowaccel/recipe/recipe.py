"""Recipes: ordered accelerators, and their JSON form."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from torch import nn

from flowaccel.checks import is_whole
from flowaccel.errors import RecipeConflictError, UnsupportedModelError
from flowaccel.hooks import Identity, Pipeline, denoiser
from flowaccel.recipe import compatibility, registry, serialization, storage
from flowaccel.recipe.accelerator import Accelerator
from flowaccel.recipe.serialization import Part

SCHEMA = 1
MOST_STEPS = 10_000
_KEYS = ["schema", "name", "num_inference_steps", "base", "accelerators"]


@dataclass(frozen=True)
class Base:
    """The network that learned parts were trained for: its class, and a short hash of its configuration.

    The hash is that of `flowaccel.hooks.Identity`.
    """

    network: str
    config: str

    @classmethod
    def of(cls, pipe: Pipeline) -> Self:
        """Return the base of the network of `pipe`."""
        found = Identity.of(denoiser(pipe))
        return cls(found.kind, found.config)

    def __str__(self) -> str:
        """Return the class and the hash, for messages."""
        return f"{self.network} (configuration {self.config})"


@dataclass(frozen=True)
class Recipe:
    """An ordered list of accelerators, attached in this order.

    Args:
        accelerators: the accelerators; an empty list is the untouched pipeline.
        name: name in tables and plots.
        num_inference_steps: the number of steps to run it with, where it prescribes one; None leaves it to the caller.
        base: the network that its learned parts were made for, where that is known (`for_pipeline`).

    Raises:
        RecipeConflictError: two accelerators that exclude each other, or a step count that one of them contradicts.
        ValueError: a name that is not text, or a step count that is not a whole number in 1 .. 10,000.
    """

    accelerators: Sequence[Accelerator] = field(default_factory=tuple)
    name: str = "recipe"
    num_inference_steps: int | None = None
    base: Base | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "accelerators", tuple(self.accelerators))
        if not isinstance(self.name, str):
            raise ValueError(f"name must be text, got {self.name!r}")
        steps = self.num_inference_steps
        if steps is not None and not is_whole(steps, 1):
            raise ValueError(f"num_inference_steps must be a whole number of at least 1, or None, got {steps!r}")
        compatibility.check(self.accelerators, self.name)
        agreed = self._agreed_steps()
        if agreed is not None and agreed > MOST_STEPS:
            raise ValueError(f"recipe {self.name!r} asks for {agreed} steps; at most {MOST_STEPS} are run")
        object.__setattr__(self, "num_inference_steps", agreed)

    def _agreed_steps(self) -> int | None:
        wishes = [("the recipe", self.num_inference_steps)]
        wishes += [(repr(accelerator.name), accelerator.num_inference_steps) for accelerator in self.accelerators]
        asked = {who: steps for who, steps in wishes if steps is not None}
        if len(set(asked.values())) > 1:
            listed = ", ".join(f"{who} for {steps}" for who, steps in asked.items())
            raise RecipeConflictError(
                f"recipe {self.name!r} asks for different numbers of steps: {sorted(set(asked.values()))} ({listed})"
            )
        return next(iter(asked.values()), None)

    def loaded(self, pipe: Pipeline) -> Recipe:
        """Return this recipe with all learned parts in memory, so that attaching it reads nothing from disk."""
        return replace(self, accelerators=[a.loaded(pipe) for a in self.accelerators]).for_pipeline(pipe)

    def for_pipeline(self, pipe: Pipeline) -> Recipe:
        """Return this recipe with the network of `pipe` as its base, if anything in it was fitted to a network.

        Raises:
            UnsupportedModelError: it was made for another class of network.
            RecipeConflictError: it was made for a network of another configuration.
        """
        if not any(accelerator.fitted for accelerator in self.accelerators):
            return self
        found = Base.of(pipe)
        if self.base is not None and self.base != found:
            kind = RecipeConflictError if self.base.network == found.network else UnsupportedModelError
            raise kind(
                f"recipe {self.name!r} carries parts that were made for a {self.base}, but the {type(pipe).__name__} "
                f"has a {found}; use it on the pipeline that it was made for, or train its parts for this one"
            )
        return replace(self, base=found)

    @property
    def networks(self) -> dict[str, nn.Module]:
        """Networks that the accelerators call besides the pipeline's own, by name; complete once `loaded`."""
        return {name: network for a in self.accelerators for name, network in a.networks.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON-serialisable data, without learned parts."""
        return self._encoded({})

    def _encoded(self, parts: dict[str, Part]) -> dict[str, Any]:
        base = {} if self.base is None else {"base": {"class": self.base.network, "config": self.base.config}}
        return {
            "schema": SCHEMA,
            "name": self.name,
            "num_inference_steps": self.num_inference_steps,
            **base,
            "accelerators": [
                serialization.encode_component(accelerator, parts, f"accelerators[{index}]")
                for index, accelerator in enumerate(self.accelerators)
            ],
        }

    def save_pretrained(
        self, folder: str | Path, push_to_hub: bool = False, *, repo_id: str | None = None, **kwargs: Any
    ) -> None:
        """Write `flowaccel.json` and the learned parts to `folder`; on failure nothing is written.

        Parts that were given as folders are copied, so that the result is complete and can be moved and shared.

        Args:
            folder: made if absent; other files in it stay.
            push_to_hub: upload the recipe afterwards.
            repo_id: repository to upload to; None takes the name of the folder.
            kwargs: arguments of `push_to_hub`.

        Raises:
            TypeError, ValueError: it holds a value that a recipe file cannot; the message states where.
            WeightsNotFoundError, CheckpointError: a part was given as a folder that cannot be read.
        """
        if kwargs and not push_to_hub:
            raise TypeError(f"save_pretrained takes {', '.join(sorted(kwargs))} only with push_to_hub=True")
        self.save_beside(Path(folder), ())
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).resolve().name, **kwargs)

    def save_beside(self, folder: Path, taken: Iterable[str]) -> None:
        """Write the recipe as `save_pretrained` does, to a folder in which the sub-folders `taken` are in use."""
        parts: dict[str, Part] = dict.fromkeys(taken, Part("", _unused))
        others = set(parts)
        data = self._encoded(parts)
        own = {name: part for name, part in parts.items() if name not in others}
        storage.write(folder, data, own, verify=Recipe.from_pretrained)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload a flowaccel recipe",
        create_pr: bool = False,
    ) -> str:
        """Upload the recipe and its learned parts to the Hub; returns the URL of the commit.

        Args:
            repo_id: OWNER/NAME, or NAME in your own space; made if absent. Other files in it stay.
            private: whether a repository that is made is private.
            token: access token; None takes the stored one.
            commit_message: message of the commit.
            create_pr: open a pull request instead of committing.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return storage.upload(
                Path(folder), repo_id, private=private, token=token, message=commit_message, create_pr=create_pr
            )

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> Recipe:
        """Read a recipe from a folder written by `save_pretrained`, from a JSON file, or from the Hub.

        Learned parts are found now and read when the recipe is used. A folder or a repository can only refer to parts
        within it; a file that you name yourself can also refer to other places.

        Args:
            path_or_id: the folder, the file, or OWNER/NAME on the Hub.
            revision: branch, tag or commit on the Hub.
            cache_dir: where downloads are kept.
            local_files_only: do not ask the Hub.
            token: for private repositories.

        Raises:
            FileNotFoundError: no such file (`WeightsNotFoundError`: a part is missing, or the Hub did not give it).
            ValueError: not a recipe, of a newer schema, with unknown keys or values that an accelerator refuses; the
                message says where.
        """
        file, source = storage.locate(
            path_or_id, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token
        )
        data = storage.read_json(file)
        try:
            return cls._decoded(data, Path(path_or_id).name if source.fetch else file.parent.name, source)
        except (FileNotFoundError, TypeError, ValueError) as error:
            raise type(error)(f"{file}: {error}") from error

    @classmethod
    def _decoded(cls, data: dict[str, Any], default_name: str, source: serialization.Source) -> Recipe:
        _check_schema(data)
        serialization.check_keys(data, _KEYS)
        entries = data.get("accelerators")
        if not isinstance(entries, list):
            raise ValueError(f"accelerators: must be a list, got {entries!r}")
        return cls(
            [_decoded_accelerator(entry, f"accelerators[{i}]", source) for i, entry in enumerate(entries)],
            data.get("name", default_name),
            data.get("num_inference_steps"),
            _base(data.get("base")),
        )


def _decoded_accelerator(entry: Any, path: str, source: serialization.Source) -> Accelerator:
    former = registry.entries("former")
    if isinstance(entry, dict) and isinstance(entry.get("name"), str) and entry["name"] in former:
        entry = registry.load(former[entry["name"]])(entry)
    accelerator: Accelerator = serialization.decode(registry.ACCELERATORS, entry, path, source)
    return accelerator


def _check_schema(data: dict[str, Any]) -> None:
    schema = data.get("schema")
    if not is_whole(schema, 1):
        raise ValueError(f"not a recipe: schema must be {SCHEMA}, got {schema!r}")
    if schema > SCHEMA:
        raise ValueError(
            f"written by a newer flowaccel (recipe schema {schema}; this one reads up to {SCHEMA}); upgrade flowaccel, "
            "or save the recipe again with this version"
        )


def _base(data: Any) -> Base | None:
    if data is None:
        return None
    if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
        raise ValueError(f'base: must look like {{"class": ..., "config": ...}}, got {data!r}')
    serialization.check_keys(data, ["class", "config"], "base")
    if len(data) < 2:
        raise ValueError(f'base: must hold "class" and "config", got {data!r}')
    return Base(data["class"], data["config"])


def _unused(folder: Path) -> nn.Module:
    raise AssertionError(f"{folder} belongs to the pipeline")
