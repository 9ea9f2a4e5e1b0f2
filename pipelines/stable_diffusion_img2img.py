"""Image to image with SD1.x and SD2.x and any adapter file, as a custom pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/stable_diffusion_img2img.py", trust_remote_code=True
    )

The same class by import: ``from lycoris_diff import StableDiffusionImg2ImgLycorisPipeline``.
"""

from lycoris_diff.diffusion.pipelines import StableDiffusionImg2ImgLycorisPipeline

__all__ = ["StableDiffusionImg2ImgLycorisPipeline"]
