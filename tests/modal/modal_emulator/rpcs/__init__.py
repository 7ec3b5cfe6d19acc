"""The handlers of Modal's RPCs, grouped by what they are about."""

from .apps import AppRpcs
from .calls import CallRpcs
from .container import ContainerRpcs
from .functions import FunctionRpcs
from .objects import ObjectRpcs
from .volumes import VolumeRpcs

CLIENT_RPCS = (AppRpcs, ObjectRpcs, VolumeRpcs, FunctionRpcs, CallRpcs)

__all__ = ["CLIENT_RPCS", "ContainerRpcs"]
