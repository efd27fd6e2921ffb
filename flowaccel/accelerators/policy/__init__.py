"""How learned policies run."""

from flowaccel.accelerators.policy.runtime import PolicyRuntime as PolicyRuntime
from flowaccel.accelerators.policy.sources import HeadSource as HeadSource
from flowaccel.accelerators.policy.sources import ScriptSource as ScriptSource
from flowaccel.accelerators.policy.sources import Sight as Sight
from flowaccel.accelerators.policy.sources import Source as Source

__all__ = ["HeadSource", "PolicyRuntime", "ScriptSource", "Sight", "Source"]
