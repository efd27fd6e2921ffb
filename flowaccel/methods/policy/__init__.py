"""Learned policies: RAPID3 (arXiv 2509.22323) and TPDM (arXiv 2412.01243)."""

from flowaccel.recipe.registry import Method, Preset

METHOD = Method(
    accelerators={"learned_policy": "flowaccel.methods.policy.accelerator:LearnedPolicy"},
    presets={
        "learned_policy": Preset(
            summary="The heads that lie beside the pipeline's components, in `policy`, decide per image and step.",
            source="RAPID3 (arXiv 2509.22323), TPDM (arXiv 2412.01243)",
            make="flowaccel.methods.policy.accelerator:LearnedPolicy",
        )
    },
    networks={"AccelerationPolicy": "flowaccel.methods.policy.network:AccelerationPolicy"},
    train={"policy": "flowaccel.methods.policy.train_command:policy"},
)
