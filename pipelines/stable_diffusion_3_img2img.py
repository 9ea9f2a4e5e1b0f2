"""Image to image with SD3 and SD3.5 and any adapter file, as a custom pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/stable_diffusion_3_img2img.py", trust_remote_code=True
    )

The same class by import: ``from lycoris_diff import StableDiffusion3Img2ImgLycorisPipeline``.
"""

from lycoris_diff.diffusion.pipelines import StableDiffusion3Img2ImgLycorisPipeline

__all__ = ["StableDiffusion3Img2ImgLycorisPipeline"]
