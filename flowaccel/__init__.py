"""flowaccel makes any diffusers flow or diffusion pipeline faster, and proves it."""

import sys

# `python -m flowaccel` puts the working directory before all else, and what lies there would be imported in the place
# of a library. (While `-m` looks for its module, argv[0] is "-m".)
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    del sys.path[0]

import lazy_loader

__version__ = "0.1.0"

# Nothing is imported before it is used; type checkers read the names in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
