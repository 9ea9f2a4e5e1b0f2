"""Ready pipeline classes: diffusers' own, with `LycorisLoaderMixin` in front.

They are used like diffusers' classes, and made from a pipeline there is with ``from_pipe``. What they save loads in diffusers
under the stock class's name.
"""

from __future__ import annotations

from diffusers import (
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)

from .mixin import LycorisLoaderMixin


class StableDiffusionLycorisPipeline(LycorisLoaderMixin, StableDiffusionPipeline):
    """Text to image with SD1.x and SD2.x."""


class StableDiffusionImg2ImgLycorisPipeline(LycorisLoaderMixin, StableDiffusionImg2ImgPipeline):
    """Image to image with SD1.x and SD2.x."""


class StableDiffusionInpaintLycorisPipeline(LycorisLoaderMixin, StableDiffusionInpaintPipeline):
    """Inpainting with SD1.x and SD2.x."""


class StableDiffusionXLLycorisPipeline(LycorisLoaderMixin, StableDiffusionXLPipeline):
    """Text to image with SDXL."""


class StableDiffusionXLImg2ImgLycorisPipeline(LycorisLoaderMixin, StableDiffusionXLImg2ImgPipeline):
    """Image to image with SDXL."""


class StableDiffusionXLInpaintLycorisPipeline(LycorisLoaderMixin, StableDiffusionXLInpaintPipeline):
    """Inpainting with SDXL."""


class StableDiffusion3LycorisPipeline(LycorisLoaderMixin, StableDiffusion3Pipeline):
    """Text to image with SD3 and SD3.5."""


class StableDiffusion3Img2ImgLycorisPipeline(LycorisLoaderMixin, StableDiffusion3Img2ImgPipeline):
    """Image to image with SD3 and SD3.5."""


class StableDiffusion3InpaintLycorisPipeline(LycorisLoaderMixin, StableDiffusion3InpaintPipeline):
    """Inpainting with SD3 and SD3.5."""


class FluxLycorisPipeline(LycorisLoaderMixin, FluxPipeline):
    """Text to image with Flux.1."""


class FluxImg2ImgLycorisPipeline(LycorisLoaderMixin, FluxImg2ImgPipeline):
    """Image to image with Flux.1."""


class FluxInpaintLycorisPipeline(LycorisLoaderMixin, FluxInpaintPipeline):
    """Inpainting with Flux.1."""
