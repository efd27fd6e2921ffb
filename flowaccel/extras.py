"""Optional dependencies: imported where they are needed, with an error that names the extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType

from flowaccel.errors import MissingExtraError

# importable module -> extra
EXTRAS = {
    "xformers": "xformers",
    "cleanfid": "clean-fid",
    "torchvision": "clean-fid",
    "cache_dit": "cache-dit",
    "imageio": "video",
    "imageio_ffmpeg": "video",
}


def require(module: str) -> ModuleType:
    """Import an optional module: one of `EXTRAS` or one below these.

    Raises:
        MissingExtraError: it is not installed, or installed and broken; the message says what to install.
    """
    extra = EXTRAS[module.partition(".")[0]]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"{error.name} is not installed; it comes with: pip install 'flowaccel[{extra}]'"
        ) from error
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        hint = (
            " A torchvision built for another torch breaks transformers and diffusers too: pip uninstall torchvision."
        )
        raise MissingExtraError(
            f"{module} is installed but cannot be imported ({reason}); it does not fit this torch. Reinstall it with: "
            f"pip install 'flowaccel[{extra}]'.{hint if 'torchvision' in reason or module == 'torchvision' else ''}"
        ) from error
