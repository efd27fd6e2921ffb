"""Searched step grids: BOSS (arXiv 2312.16414) and OSS (arXiv 2503.21774). A grid is an option of the samplers."""

from flowaccel.recipe.registry import Method

METHOD = Method(fit=dict.fromkeys(("boss", "oss"), "flowaccel.methods.grids.fit:calibrate_grid"))
