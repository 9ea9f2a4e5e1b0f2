"""Image to image with SDXL and any adapter file, as a custom pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/stable_diffusion_xl_img2img.py", trust_remote_code=True
    )

The same class by import: ``from lycoris_diff import StableDiffusionXLImg2ImgLycorisPipeline``.
"""

from lycoris_diff.diffusion.pipelines import StableDiffusionXLImg2ImgLycorisPipeline

__all__ = ["StableDiffusionXLImg2ImgLycorisPipeline"]
