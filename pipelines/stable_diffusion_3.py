"""Text to image with SD3 and SD3.5 and any adapter file, as a custom pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/stable_diffusion_3.py", trust_remote_code=True
    )

The same class by import: ``from lycoris_diff import StableDiffusion3LycorisPipeline``.
"""

from lycoris_diff.diffusion.pipelines import StableDiffusion3LycorisPipeline

__all__ = ["StableDiffusion3LycorisPipeline"]
