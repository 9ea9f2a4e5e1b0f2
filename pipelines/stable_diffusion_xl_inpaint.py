"""Inpainting with SDXL and any adapter file, as a custom pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/stable_diffusion_xl_inpaint.py", trust_remote_code=True
    )

The same class by import: ``from lycoris_diff import StableDiffusionXLInpaintLycorisPipeline``.
"""

from lycoris_diff.diffusion.pipelines import StableDiffusionXLInpaintLycorisPipeline

__all__ = ["StableDiffusionXLInpaintLycorisPipeline"]
