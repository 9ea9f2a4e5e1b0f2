#!/usr/bin/env python3
r"""DreamBooth with any adapter of lycoris_diff on Stable Diffusion XL; other models are refused.

    python scripts/train_dreambooth_sdxl.py --model stabilityai/stable-diffusion-xl-base-1.0 --instance_data_dir pictures \
        --instance_prompt "a photo of sks dog" --output_dir out --adapter lokr \
        --resolution 1024 --dtype float16 --mixed_precision fp16

The same as train_dreambooth.py, which it calls; docs/training.md says what is particular to this family.
"""

from __future__ import annotations

import sys
from pathlib import Path

from train_dreambooth import families, main

if __name__ == "__main__":
    sys.exit(main(family=families.StableDiffusionXL, name=Path(__file__).name))
