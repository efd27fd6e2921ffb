"""Pipelines."""

from flowaccel.pipelines.sit import SiTPipeline as SiTPipeline

__all__ = ["SiTPipeline"]
