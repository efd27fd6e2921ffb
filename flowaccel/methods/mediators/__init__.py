"""Attention through few tokens: Attention Mediators (arXiv 2408.05710) and Agent Attention (arXiv 2312.08874)."""

from flowaccel.recipe.registry import Method, Preset

METHOD = Method(
    accelerators={
        "mediators": "flowaccel.methods.mediators.accelerator:Mediators",
        "agent_attention": "flowaccel.methods.mediators.agent_attention:AgentAttention",
    },
    presets={
        "mediators": Preset(
            summary="The network with mediators that lies beside the pipeline's components, in `mediators`.",
            source="Attention Mediators (arXiv 2408.05710)",
            make="flowaccel.methods.mediators.accelerator:mediators_with",
        ),
        "agent_attention": Preset(
            summary="Self-attention of UNets and DiT through pooled queries in the first steps, at high resolution.",
            source="Agent Attention (arXiv 2312.08874)",
            make="flowaccel.methods.mediators.agent_attention:AgentAttention",
        ),
    },
    networks={"MediatorSiTTransformer2DModel": "flowaccel.methods.mediators.networks:MediatorSiTTransformer2DModel"},
    train={"mediators": "flowaccel.methods.mediators.train_command:mediators"},
)
