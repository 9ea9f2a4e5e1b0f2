"""Text to image with Flux.1 and any adapter file, as a custom pipeline of diffusers.

    pipe = DiffusionPipeline.from_pretrained(
        "path/or/repo", custom_pipeline="pipelines/flux.py", trust_remote_code=True
    )

The same class by import: ``from lycoris_diff import FluxLycorisPipeline``.
"""

from lycoris_diff.diffusion.pipelines import FluxLycorisPipeline

__all__ = ["FluxLycorisPipeline"]
