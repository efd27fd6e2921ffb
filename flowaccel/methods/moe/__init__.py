"""Sparse mixtures of experts in the blocks: DiffMoE (arXiv 2503.14487) and its rivals."""

from flowaccel.recipe.registry import Method, Preset

_NETWORKS = (
    "MoEDiTTransformer2DModel",
    "MoEFluxTransformer2DModel",
    "MoESD3Transformer2DModel",
    "MoESiTTransformer2DModel",
)

METHOD = Method(
    accelerators={"mixture_of_experts": "flowaccel.methods.moe.accelerator:MixtureOfExperts"},
    presets={
        "mixture_of_experts": Preset(
            summary="The network with experts that lies beside the pipeline's components, in `moe`.",
            source="DiffMoE (arXiv 2503.14487)",
            make="flowaccel.methods.moe.accelerator:MixtureOfExperts",
        )
    },
    networks={name: f"flowaccel.methods.moe.networks:{name}" for name in _NETWORKS},
    train={"moe": "flowaccel.methods.moe.train_command:moe"},
)
