"""A pipeline whose components carry adapters in place saves the base weights under the base's names."""

from __future__ import annotations

import copy

import torch
from diffusers import StableDiffusionPipeline

from lycoris_diff import AdapterModel, LoKrConfig, LoraConfig, inject_adapter
from lycoris_diff.tiny import build_pipeline


def test_pipeline_saves_the_base(tmp_path):
    pipe = build_pipeline(seed=0)
    expected = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    text = {k: v.clone() for k, v in pipe.text_encoder.state_dict().items()}
    inject_adapter(pipe.unet, LoKrConfig(r=2, target_modules=["to_q", "conv1"], init_weights=False))
    inject_adapter(pipe.text_encoder, LoraConfig(r=2, target_modules=["q_proj"], init_weights=False))
    clone = copy.deepcopy(pipe.unet)
    pipe.save_pretrained(tmp_path / "pipe")
    clone.save_pretrained(tmp_path / "clone")
    assert any("adapters" in k for k in pipe.unet.state_dict()), "the live model keeps its adapters"
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "pipe")
    for module, tensors in ((again.unet, expected), (again.text_encoder, text)):
        assert all(torch.equal(v, tensors[k]) for k, v in module.state_dict().items())
    copied = type(again.unet).from_pretrained(tmp_path / "clone")
    assert all(torch.equal(v, expected[k]) for k, v in copied.state_dict().items())
    AdapterModel(pipe.unet).unload()
    assert "save_pretrained" not in vars(pipe.unet)
