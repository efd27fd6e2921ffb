"""Pipelines, and how to load one."""

from flowaccel.pipelines.accelerated import AcceleratedPipeline
from flowaccel.pipelines.loading import load_pipeline
from flowaccel.pipelines.sit import SiTPipeline
from flowaccel.pipelines.sit_image import SiTImg2ImgPipeline, SiTInpaintPipeline

__all__ = ["AcceleratedPipeline", "SiTImg2ImgPipeline", "SiTInpaintPipeline", "SiTPipeline", "load_pipeline"]
