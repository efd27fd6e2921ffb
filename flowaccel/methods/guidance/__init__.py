"""Skipping of guidance: in one part of the run, or where predictions agree (Adaptive Guidance, arXiv 2312.12487)."""

from flowaccel.recipe.registry import Method, Preset

METHOD = Method(
    accelerators={"guidance_skip": "flowaccel.methods.guidance.accelerator:GuidanceSkip"},
    presets={
        "guidance_skip": Preset(
            summary="Stop guiding an image once its conditional and unconditional predictions agree.",
            make="flowaccel.methods.guidance.accelerator:GuidanceSkip",
        ),
        "guidance_interval": Preset(
            summary="Guide in one part of the run only, by default its first half.",
            make="flowaccel.methods.guidance.accelerator:GuidanceSkip",
            arguments={"when": "interval"},
        ),
    },
)
