"""Sparse attention without the query-key blocks of least attention (after RAPID3's sparse head, arXiv 2509.22323)."""

from flowaccel.recipe.registry import Method, Preset

METHOD = Method(
    accelerators={"sparse_attention": "flowaccel.methods.sparse_attention.accelerator:SparseAttention"},
    presets={
        "sparse_attention": Preset(
            summary="Attention of SD3, FLUX and SiT without the blocks of least attention, at high resolution.",
            source="after RAPID3 (arXiv 2509.22323)",
            make="flowaccel.methods.sparse_attention.accelerator:SparseAttention",
        )
    },
)
