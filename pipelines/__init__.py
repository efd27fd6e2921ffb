"""Pipelines, and how to load one."""

from flowaccel.pipelines.accelerated import AcceleratedPipeline as AcceleratedPipeline
from flowaccel.pipelines.loading import load_pipeline as load_pipeline
from flowaccel.pipelines.sit import SiTPipeline as SiTPipeline
from flowaccel.pipelines.sit_image import SiTImg2ImgPipeline as SiTImg2ImgPipeline
from flowaccel.pipelines.sit_image import SiTInpaintPipeline as SiTInpaintPipeline

__all__ = ["AcceleratedPipeline", "SiTImg2ImgPipeline", "SiTInpaintPipeline", "SiTPipeline", "load_pipeline"]
