"""Hooks into diffusers: with `flowaccel.compat` the only package that depends on its internals."""

from flowaccel.hooks.blocks import ATTENTION as ATTENTION
from flowaccel.hooks.blocks import FEED_FORWARD as FEED_FORWARD
from flowaccel.hooks.blocks import Block as Block
from flowaccel.hooks.blocks import attention_input as attention_input
from flowaccel.hooks.blocks import is_present as is_present
from flowaccel.hooks.blocks import time_signal as time_signal
from flowaccel.hooks.blocks import time_source as time_source
from flowaccel.hooks.calls import COMPUTED as COMPUTED
from flowaccel.hooks.calls import COND as COND
from flowaccel.hooks.calls import EXTRA as EXTRA
from flowaccel.hooks.calls import REUSED as REUSED
from flowaccel.hooks.calls import UNCOND as UNCOND
from flowaccel.hooks.calls import Call as Call
from flowaccel.hooks.calls import CallRecord as CallRecord
from flowaccel.hooks.calls import CallStats as CallStats
from flowaccel.hooks.calls import Run as Run
from flowaccel.hooks.calls import in_rows as in_rows
from flowaccel.hooks.families import FAMILIES as FAMILIES
from flowaccel.hooks.families import BlockList as BlockList
from flowaccel.hooks.families import Family as Family
from flowaccel.hooks.families import TimeSignal as TimeSignal
from flowaccel.hooks.families import denoiser as denoiser
from flowaccel.hooks.families import family_of as family_of
from flowaccel.hooks.families import networks as networks
from flowaccel.hooks.families import register_family as register_family
from flowaccel.hooks.identity import Identity as Identity
from flowaccel.hooks.macs import is_compiled as is_compiled
from flowaccel.hooks.macs import macs_by_module as macs_by_module
from flowaccel.hooks.macs import shapes_of as shapes_of
from flowaccel.hooks.outputs import packer as packer
from flowaccel.hooks.outputs import require_rows as require_rows
from flowaccel.hooks.outputs import tensors_of as tensors_of
from flowaccel.hooks.session import CallInterceptor as CallInterceptor
from flowaccel.hooks.session import Session as Session
from flowaccel.hooks.session import close_session as close_session
from flowaccel.hooks.session import open_session as open_session
from flowaccel.hooks.session import require_idle as require_idle
from flowaccel.hooks.session import session_of as session_of
from flowaccel.hooks.swap import swap as swap
from flowaccel.hooks.wrap import Wrapped as Wrapped
from flowaccel.hooks.wrap import lend as lend
from flowaccel.hooks.wrap import swapped as swapped
from flowaccel.hooks.wrap import wrap as wrap

__all__ = [
    "ATTENTION",
    "COMPUTED",
    "COND",
    "EXTRA",
    "FAMILIES",
    "FEED_FORWARD",
    "REUSED",
    "UNCOND",
    "Block",
    "BlockList",
    "Call",
    "CallInterceptor",
    "CallRecord",
    "CallStats",
    "Family",
    "Identity",
    "Run",
    "Session",
    "TimeSignal",
    "Wrapped",
    "attention_input",
    "close_session",
    "denoiser",
    "family_of",
    "in_rows",
    "is_compiled",
    "is_present",
    "lend",
    "macs_by_module",
    "networks",
    "open_session",
    "packer",
    "register_family",
    "require_idle",
    "require_rows",
    "session_of",
    "shapes_of",
    "swap",
    "swapped",
    "tensors_of",
    "time_signal",
    "time_source",
    "wrap",
]
