"""Recipes: ordered accelerators, as objects, JSON and text; and the verbs that put them on a pipeline."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
