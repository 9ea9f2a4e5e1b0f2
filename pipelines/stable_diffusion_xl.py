"""Text to image with SDXL and any adapter file, as a custom pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/stable_diffusion_xl.py", trust_remote_code=True
    )

The same class by import: ``from lycoris_diff import StableDiffusionXLLycorisPipeline``.
"""

from lycoris_diff.diffusion.pipelines import StableDiffusionXLLycorisPipeline

__all__ = ["StableDiffusionXLLycorisPipeline"]
