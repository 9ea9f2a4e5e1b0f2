"""Image to image with Flux.1 and any adapter file, as a custom pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/flux_img2img.py", trust_remote_code=True
    )

The same class by import: ``from lycoris_diff import FluxImg2ImgLycorisPipeline``.
"""

from lycoris_diff.diffusion.pipelines import FluxImg2ImgLycorisPipeline

__all__ = ["FluxImg2ImgLycorisPipeline"]
