"""Hooks into diffusers: with `flowaccel.compat` the only package that depends on its internals."""

from flowaccel.hooks.blocks import ATTENTION, FEED_FORWARD, Block, attention_input, is_present, time_signal, time_source
from flowaccel.hooks.calls import COMPUTED, COND, EXTRA, REUSED, UNCOND, Call, CallRecord, CallStats, Run, in_rows
from flowaccel.hooks.families import (
    FAMILIES,
    BlockList,
    Family,
    TimeSignal,
    denoiser,
    family_of,
    networks,
    register_family,
)
from flowaccel.hooks.identity import Identity
from flowaccel.hooks.macs import is_compiled, macs_by_module, shapes_of
from flowaccel.hooks.outputs import packer, require_rows, tensors_of
from flowaccel.hooks.pipeline import Pipeline
from flowaccel.hooks.session import CallInterceptor, Session, close_session, open_session, require_idle, session_of
from flowaccel.hooks.swap import swap
from flowaccel.hooks.wrap import Wrapped, lend, swapped, wrap

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
    "Pipeline",
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
