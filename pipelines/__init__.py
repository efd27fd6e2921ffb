"""Pipelines, and how to load one."""

from flowaccel.pipelines.accelerated import AcceleratedPipeline as AcceleratedPipeline
from flowaccel.pipelines.loading import load_pipeline as load_pipeline
from flowaccel.pipelines.sit import SiTPipeline as SiTPipeline

__all__ = ["AcceleratedPipeline", "SiTPipeline", "load_pipeline"]
