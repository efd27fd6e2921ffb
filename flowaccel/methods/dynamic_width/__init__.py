"""Dynamic width and tokens: DyDiT (arXiv 2410.03456) and DyDiT++ (arXiv 2504.06803)."""

from flowaccel.recipe.registry import Method, Preset

_NETWORKS = (
    "DynamicDiTTransformer2DModel",
    "DynamicFluxTransformer2DModel",
    "DynamicLatteTransformer3DModel",
    "DynamicSD3Transformer2DModel",
    "DynamicSiTTransformer2DModel",
)

METHOD = Method(
    accelerators={"dynamic_width": "flowaccel.methods.dynamic_width.accelerator:DynamicWidth"},
    presets={
        "dynamic_width": Preset(
            summary="The network with dynamic width that lies beside the pipeline's components, in `width`.",
            source="DyDiT (arXiv 2410.03456), DyDiT++ (arXiv 2504.06803)",
            make="flowaccel.methods.dynamic_width.accelerator:DynamicWidth",
        )
    },
    networks={
        **{name: f"flowaccel.methods.dynamic_width.networks:{name}" for name in _NETWORKS},
        "WidthAdapter": "flowaccel.methods.dynamic_width.adapter:WidthAdapter",
    },
    train={"width": "flowaccel.methods.dynamic_width.train_command:width"},
    commands={"plan": "flowaccel.methods.dynamic_width.plan_command:plan"},
)
