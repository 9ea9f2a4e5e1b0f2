"""Predicted file sizes are those of the files that are written, to the byte."""

from __future__ import annotations

import dataclasses

import pytest
import safetensors.torch
import tinymodels
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lycoris_diff import (
    AdapterError,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    ShiraConfig,
    get_peft_model,
    save_adapter,
)
from lycoris_diff.adapters import (
    ADAPTERS,
    BOFTConfig,
    DiagOFTConfig,
    FullConfig,
    GLoraConfig,
    IA3Config,
    NormConfig,
    OFTConfig,
    TLoraConfig,
)
from lycoris_diff.diffusion.components import models_of
from lycoris_diff.tiny import build_pipeline
from lycoris_diff.training.filesize import predict_files, safetensors_bytes

UNET = ["to_q", "to_k", "to_out.0", "ff.net.2", "conv1", "conv_shortcut", "proj_in"]
LINEAR = ["to_q", "to_k", "ff.net.2"]

CASES = {
    "lora": LoraConfig(r=3, target_modules=UNET, rank_pattern={"to_q": 5}, alpha_pattern={"to_k": 2.5}),
    "lora-rs-dora": LoraConfig(r=3, use_rslora=True, weight_decompose=True, target_modules=UNET),
    "lora-dora-in": LoraConfig(r=3, weight_decompose=True, dora_axis="in", target_modules=UNET),
    "lora-tucker": LoraConfig(r=3, use_effective_conv2d=True, target_modules=UNET),
    "loha-dora": LoHaConfig(r=2, weight_decompose=True, target_modules=UNET),
    "loha-tucker": LoHaConfig(r=2, use_effective_conv2d=True, target_modules=UNET),
    "lokr-dora": LoKrConfig(r=2, weight_decompose=True, target_modules=UNET, rank_pattern={"to_q": 1}),
    "lokr-full": LoKrConfig(full_matrix=True, decompose_factor=4, target_modules=UNET),
    "lokr-both-tucker": LoKrConfig(r=2, decompose_both=True, use_effective_conv2d=True, target_modules=UNET),
    "lokr-no-strength": LoKrConfig(r=2, alpha=0, target_modules=UNET),
    "glora": GLoraConfig(r=2, target_modules=UNET, use_effective_conv2d=True),
    "ia3": IA3Config(target_modules=UNET, on_input_pattern={"to_k": True}),
    "full": FullConfig(target_modules=["to_q", "conv1"]),
    "norm": NormConfig(),
    "diag-oft": DiagOFTConfig(r=4, rescaled=True, target_modules=UNET),
    "boft": BOFTConfig(r=8, target_modules=LINEAR),
    "oft": OFTConfig(oft_block_size=8, target_modules=LINEAR),
    "tlora": TLoraConfig(r=3, target_modules=LINEAR),
    "miss": MissConfig(r=4, target_modules=LINEAR),
    "miss-bat": MissConfig(r=4, init_weights="bat", target_modules=LINEAR),
    "miss-mini": MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=LINEAR),
    "shira": ShiraConfig(r=2, target_modules=LINEAR),
    "lora-biases": LoraConfig(r=2, bias="lora_only", target_modules=["to_out.0"]),
    "lora-modules-to-save": LoraConfig(r=2, modules_to_save=["conv_out"], target_modules=LINEAR),
}


def on_encoder(config):
    """The same algorithm for the text encoder."""
    plain = {
        "target_modules": ["q_proj"],
        "rank_pattern": {},
        "alpha_pattern": {},
        "on_input_pattern": {},
        "modules_to_save": None,
    }
    own = {name: value for name, value in plain.items() if hasattr(config, name)}
    return dataclasses.replace(config, **(own | ({"target_modules": None} if config.peft_name == "NORM" else {})))


def test_every_algorithm_is_a_case():
    ours = {name for name, cls in ADAPTERS.items() if cls.__module__.startswith("lycoris_diff.")} - {"COMBINED"}
    assert {config.peft_name for config in CASES.values()} == ours


@pytest.mark.parametrize("name", CASES)
def test_bytes_of_every_algorithm(name, tmp_path):
    configs = {"unet": CASES[name], "text_encoder": on_encoder(CASES[name])}
    pipe = build_pipeline(0)
    models, metadata = models_of(pipe), {"ss_comment": 'Grüße, "quoted"\n\x01' * 3}
    predicted = predict_files(models, configs, ["peft"])
    try:
        kohya = predict_files(models, configs, ["kohya"], "my adapter", metadata=metadata)
    except AdapterError as error:
        kohya = str(error)
    assert not any(parameter.is_meta for model in models.values() for parameter in model.parameters())
    for component, config in configs.items():
        setattr(pipe, component, get_peft_model(getattr(pipe, component), config, "default"))
        getattr(pipe, component).save_pretrained(tmp_path / component)
    for file in predicted:
        assert (tmp_path / file.component / file.name).stat().st_size == file.bytes, file
    path = tmp_path / "my adapter.safetensors"
    if isinstance(kohya, str):  # the writer refuses as well, in the same words
        with pytest.raises(AdapterError) as refused:
            save_adapter(pipe, path, "default", metadata=metadata)
        assert str(refused.value) == kohya
    else:
        written = save_adapter(pipe, path, "default", metadata=metadata)
        assert [(file.bytes, file.tensors) for file in kohya] == [(path.stat().st_size, written.tensors)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_bytes_in_another_dtype(dtype, tmp_path):
    pipe = build_pipeline(0)
    configs = {"unet": CASES["lora"]}
    predicted = predict_files(models_of(pipe), configs, ["kohya"], dtype=dtype)
    pipe.unet = get_peft_model(pipe.unet, configs["unet"], "default")
    save_adapter(pipe, tmp_path / "adapter.safetensors", "default", dtype=dtype)
    assert (tmp_path / "adapter.safetensors").stat().st_size == predicted[0].bytes
    # an adapter that is there already does not count
    assert predict_files(models_of(pipe), configs, ["kohya"], dtype=dtype) == predicted


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_bytes_of_other_models(family, tmp_path):
    pipe = tinymodels.pipeline(family)
    component = "unet" if family == "sdxl" else "transformer"
    config = LoraConfig(r=2, target_modules=["to_q", "to_k"])
    predicted = predict_files(models_of(pipe), {component: config}, ["kohya"])
    setattr(pipe, component, get_peft_model(getattr(pipe, component), config, "default"))
    with torch.no_grad():
        for parameter in getattr(pipe, component).parameters():
            if parameter.requires_grad:  # as after training: nothing is zero
                parameter.add_(torch.randn_like(parameter))
    save_adapter(pipe, tmp_path / "adapter.safetensors", "default")
    assert (tmp_path / "adapter.safetensors").stat().st_size == predicted[0].bytes


DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32]
DTYPES += [torch.float64, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        TEXT.filter(bool),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 12), max_size=3)),
        max_size=12,
    ).filter(lambda tensors: "__metadata__" not in tensors),
    st.none()
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_safetensors_bytes(layout, metadata):
    tensors = {name: torch.zeros(shape).to(dtype) for name, (dtype, shape) in layout.items()}
    blank = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in layout.items()}
    assert safetensors_bytes(blank, metadata) == len(safetensors.torch.save(tensors, metadata))
