"""LDM names of a UNet (``input_blocks``, ``middle_block``, ``output_blocks``), read off the model's own structure.

The original UNet numbers its blocks through: every resnet is a block, with its attention in the same block, and every
downsampler is one more; an upsampler sits in the block of the resnet before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from .index import Site
from .rows import SUBTREE, Block

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = Block(
    "",
    "",
    {
        "input_blocks.0.0": "conv_in",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
    },
)


def ldm_blocks(sites: Mapping[str, Site]) -> Iterator[Block]:
    """Rows of the LDM scheme for a diffusers UNet with any number of blocks, layers and attentions.

    Args:
        sites: modules of the UNet by path.

    Yields:
        Blocks of rows for `lycoris_diff.naming.rows.expand`.
    """
    yield _OUTSIDE
    counts = _children(sites)
    number = 1
    for block in range(counts.get("down_blocks", 0)):
        path = f"down_blocks.{block}"
        for layer in range(counts.get(f"{path}.resnets", 0)):
            yield Block(f"input_blocks.{number}.0", f"{path}.resnets.{layer}", _RESNET)
            yield Block(f"input_blocks.{number}.1", f"{path}.attentions.{layer}", SUBTREE)
            number += 1
        if f"{path}.downsamplers" in counts:
            yield Block(f"input_blocks.{number}.0", f"{path}.downsamplers.0", {"op": "conv"})
            number += 1
    for layer in range(counts.get("mid_block.resnets", 0)):
        yield Block(f"middle_block.{2 * layer}", f"mid_block.resnets.{layer}", _RESNET)
        yield Block(f"middle_block.{2 * layer + 1}", f"mid_block.attentions.{layer}", SUBTREE)
    number = 0
    for block in range(counts.get("up_blocks", 0)):
        path = f"up_blocks.{block}"
        for layer in range(counts.get(f"{path}.resnets", 0)):
            yield Block(f"output_blocks.{number}.0", f"{path}.resnets.{layer}", _RESNET)
            yield Block(f"output_blocks.{number}.1", f"{path}.attentions.{layer}", SUBTREE)
            number += 1
        position = 2 if f"{path}.attentions" in counts else 1
        yield Block(f"output_blocks.{number - 1}.{position}", f"{path}.upsamplers.0", {"conv": "conv"})


def _children(sites: Mapping[str, Site]) -> dict[str, int]:
    """Numbered lists of modules -> how many there are: ``{"down_blocks": 4, "down_blocks.0.resnets": 2 ...}``."""
    counts: dict[str, int] = {}
    for path in sites:
        for found in re.finditer(r"\.(\d+)\.", path):
            name = path[: found.start()]
            counts[name] = max(counts.get(name, 0), int(found[1]) + 1)
    return counts
