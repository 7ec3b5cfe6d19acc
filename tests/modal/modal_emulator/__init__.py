"""A local stand-in for Modal's server; README.md says what is real and what is not."""

from .definitions import gpu_choices
from .emulator import Emulator
from .options import Options

__all__ = ["Emulator", "Options", "gpu_choices"]
