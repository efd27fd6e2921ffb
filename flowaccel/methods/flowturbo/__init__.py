"""FlowTurbo (arXiv 2409.18128): pseudo-corrector steps, and a small refiner that stands in for the network."""

from flowaccel.recipe.registry import Method, Preset

METHOD = Method(
    accelerators={"velocity_refiner": "flowaccel.methods.flowturbo.accelerator:VelocityRefiner"},
    presets={
        "flowturbo-BLOCKS": Preset(
            summary="FlowTurbo with BLOCKS such as H2P4R2; append -consistent or -single for other refiner steps.",
            source="FlowTurbo (arXiv 2409.18128)",
            make="flowaccel.methods.flowturbo.accelerator:flowturbo",
            pattern=r"flowturbo-(?P<blocks>[^-:]+)(?:-(?P<refiner_mode>released|consistent|single))?",
            options=False,
        )
    },
    train={"refiner": "flowaccel.methods.flowturbo.train_command:refiner"},
)
