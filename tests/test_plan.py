"""The plan of a run says what the run then is."""

from __future__ import annotations

import json
import time

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel

from lycoris_diff import LoKrConfig, LoraConfig, ShiraConfig, get_peft_model
from lycoris_diff.errors import ConfigError
from lycoris_diff.tiny import build_pipeline
from lycoris_diff.training.config import DreamBoothConfig
from lycoris_diff.training.plan import Measured, choose_size, plan_training

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL = ["to_q", "to_k", "conv1"]


def settings_of(adapters, tmp_path, **more):
    return DreamBoothConfig("pictures", tmp_path / "out", "a dog", adapters=adapters, **more)


def full_size(name):
    parts = ["vae", "text_encoder", "tokenizer", "scheduler"]
    kind, config = (StableDiffusionPipeline, SD15) if name == "sd15" else (StableDiffusionXLPipeline, SDXL)
    parts += ["safety_checker", "feature_extractor"] if name == "sd15" else ["text_encoder_2", "tokenizer_2"]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    extra = {"requires_safety_checker": False} if name == "sd15" else {}
    return kind(unet=unet, **dict.fromkeys(parts), **extra)


@pytest.mark.parametrize(("name", "weights", "layers"), [("sd15", 859_520_964, 32), ("sdxl", 2_567_463_684, 140)])
def test_full_size_models_on_the_meta_device(name, weights, layers, tmp_path):
    pipe = full_size(name)
    start = time.process_time()
    plan = plan_training(pipe, settings_of({"unet": LoraConfig(r=16, target_modules=["to_q"])}, tmp_path))
    assert time.process_time() - start < 15
    assert plan.memory.weights == weights * 4
    assert [(row.component, row.role, row.modules) for row in plan.rows] == [("unet", "attention", layers)]
    assert plan.rows[0].bytes == 4 * plan.parameters == 4 * plan.rows[0].parameters
    assert all(parameter.is_meta for parameter in pipe.unet.parameters())


def test_the_plan_is_what_the_run_has(tmp_path):
    pipe = build_pipeline(0)
    adapters = {
        "unet": LoKrConfig(full_matrix=True, decompose_factor=4, target_modules=SMALL),
        "text_encoder": LoraConfig(r=4, rank_pattern={"q_proj": 2}),
    }
    config = settings_of(adapters, tmp_path, train_batch_size=2, gradient_accumulation_steps=3, ema_decay=0.9)
    plan = plan_training(pipe, config, Measured(0.5, 12345, 10**6), pictures=30, processes=2)
    for name, adapter in adapters.items():
        setattr(pipe, name, get_peft_model(getattr(pipe, name), adapter, "default"))
    trained = [p for name in adapters for p in getattr(pipe, name).parameters() if p.requires_grad]
    assert plan.parameters == sum(p.numel() for p in trained) == sum(row.parameters for row in plan.rows)
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = sum(v.nbytes for values in optimizer.state.values() for v in values.values())
    assert plan.memory.optimizer == state
    assert plan.memory.gradients == plan.memory.ema == sum(p.grad.nbytes for p in trained)
    assert plan.memory.adapters + plan.memory.weights == sum(
        t.nbytes for n in ("unet", "text_encoder", "vae") for t in (*getattr(pipe, n).parameters(), *getattr(pipe, n).buffers())
    )
    assert (plan.memory.activations, plan.memory.peak) == (12345, 10**6)
    assert (plan.steps, plan.samples, plan.rounds, plan.seconds) == (500, 6000, 200.0, 250.0)
    assert [(s.label, s.value, s.varies) for s in plan.settings] == [("factor", 4, False), ("rank", 4, True)]
    assert {(row.component, row.role) for row in plan.rows} >= {("unet", "attention"), ("unet", "conv")}
    for component in adapters:
        getattr(pipe, component).save_pretrained(tmp_path / component)
    sizes = {f.component: f.bytes for f in plan.files if f.format == "peft" and f.tensors}
    assert sizes == {c: (tmp_path / c / "adapter_model.safetensors").stat().st_size for c in adapters}
    # adapters that are there already change nothing
    again = plan_training(pipe, config, Measured(0.5, 12345, 10**6), pictures=30, processes=2)
    assert again == plan


def test_a_full_lokr_is_never_said_to_have_a_rank(tmp_path):
    plan = plan_training(build_pipeline(0), settings_of({"unet": LoKrConfig(r=10000, target_modules=SMALL)}, tmp_path))
    assert plan.settings[0].label == "factor"
    assert "rank" not in json.dumps(plan.to_dict()["settings"])


def test_a_target_size_decides(tmp_path):
    pipe = build_pipeline(0)
    config = settings_of({"unet": LoraConfig(r=2, target_modules=SMALL)}, tmp_path, target_size="300KB", save_dtype="float16")
    choice = choose_size(pipe, config, {"ss_x": "y"})
    plan = plan_training(pipe, config, metadata={"ss_x": "y"})
    assert plan.size == choice and plan.parameters == choice.parameters
    assert plan.settings[0].value == choice.configs["unet"].r
    kohya = next(file for file in plan.files if file.format == "kohya")
    assert kohya.bytes == choice.bytes and abs(kohya.bytes - 300_000) < 60_000
    assert json.loads(json.dumps(plan.to_dict()))["size"]["bytes"] == choice.bytes
    assert choose_size(pipe, settings_of(config.adapters, tmp_path)) is None


def test_warnings(tmp_path):
    pipe = build_pipeline(0)
    plan = plan_training(pipe, settings_of({"unet": ShiraConfig(r=2, target_modules=["to_q"])}, tmp_path))
    assert "no out.safetensors" in plan.warnings[0] and "SHiRA" in plan.warnings[0]
    assert {file.format for file in plan.files} == {"peft"}
    shira = {"unet": ShiraConfig(r=2, target_modules=["to_q"])}
    with pytest.raises(ConfigError, match='"kohya" cannot say these adapters'):
        plan_training(pipe, settings_of(shira, tmp_path, formats=("kohya",)))
    # without a kohya file the size asked for is that of the directories
    plan = plan_training(pipe, settings_of(shira, tmp_path, target_size="100KB"))
    assert plan.size is not None and plan.size.bytes == sum(file.bytes for file in plan.files if file.tensors)
    adapters = {"unet": LoraConfig(r=64, alpha=64, target_modules=["to_q"])}
    plan = plan_training(pipe, settings_of(adapters, tmp_path, learning_rate=0.5))
    assert any("learning rate 0.5" in line for line in plan.warnings)
    assert any("rank is larger than a side of the weight on 10 modules" in line for line in plan.warnings)
    adapters = {"unet": LoKrConfig(r=11, decompose_factor=4, target_modules=["attn2.to_k"])}
    assert any("low-rank second half" in line for line in plan_training(pipe, settings_of(adapters, tmp_path)).warnings)


def test_what_does_not_exist_is_refused(tmp_path):
    pipe = build_pipeline(0)
    with pytest.raises(ConfigError, match="text_encoder_2"):
        plan_training(pipe, settings_of({"text_encoder_2": LoraConfig()}, tmp_path))
    with pytest.raises(ConfigError, match="save_dtype is 'int8'"):
        plan_training(pipe, settings_of({"unet": LoraConfig()}, tmp_path, save_dtype="int8"))
