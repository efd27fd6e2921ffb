"""What moves between diffusers' versions (0.42 to 0.43) and is not a public interface, in one place."""

from __future__ import annotations

from diffusers.pipelines import pipeline_loading_utils


def register_components(library: str) -> None:
    """Let `model_index.json` name components as `["flowaccel", "ClassName"]`, as diffusers does for its own.

    diffusers keeps the loadable base classes of every library in a module-level dictionary. Without an entry a
    component of another library is recorded by its full module path, which a fresh process can only load after
    importing exactly that module.
    """
    pipeline_loading_utils.LOADABLE_CLASSES.setdefault(
        library,
        {
            "ModelMixin": ["save_pretrained", "from_pretrained"],
            "SchedulerMixin": ["save_pretrained", "from_pretrained"],
            "DiffusionPipeline": ["save_pretrained", "from_pretrained"],
        },
    )
