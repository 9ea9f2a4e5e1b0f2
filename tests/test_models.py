"""The methods of a wrapped model: adding, switching, scaling, merging, removing, on real architectures."""

from __future__ import annotations

import copy
import gc
import inspect
import itertools
import weakref

import pytest
import torch
from cases import ALGORITHMS, adapt, assert_untouched, fingerprint, make_layer, randomize, relative_error
from modelcases import CLASSES, CONFIGS, STRONG, adapted_layers, three_adapters, wrapped
from smallmodels import MODELS, clip, gpt2, output_of, picture, stable_diffusion, tokens, unet, unet_inputs
from torch import nn

from lycoris_diff import (
    AdapterError,
    AdapterModel,
    LoHaConfig,
    LoHaModel,
    LoKrConfig,
    LoKrModel,
    MissConfig,
    MissModel,
    get_peft_model,
    inject_adapter,
)

# ------------------------------------------------------------------------------------------ every system, every family


@pytest.mark.parametrize("kind", list(CONFIGS))
@pytest.mark.parametrize("family", list(MODELS))
def test_life_of_an_adapter(family, kind, tmp_path):
    make, inputs = MODELS[family]
    base, inputs = make(), inputs()
    untouched, plain = fingerprint(base), output_of(base, inputs)
    config = CONFIGS[kind](target_modules="all-linear")
    model = CLASSES[type(config)](base, config, "default")
    assert isinstance(model, AdapterModel)
    assert relative_error(output_of(model, inputs), plain) < 1e-5  # default start
    randomize(model, std=STRONG)
    changed = output_of(model, inputs)
    assert torch.isfinite(changed).all() and relative_error(changed, plain) > 1e-4

    model.save_pretrained(tmp_path)
    reloaded = AdapterModel.from_pretrained(make(), tmp_path)
    # the same values; some processors add up in another order where memory is aligned otherwise
    assert relative_error(output_of(reloaded, inputs), changed) < 1e-6

    model.merge_adapter()
    assert relative_error(output_of(model, inputs), changed) < 1e-4
    model.unmerge_adapter()
    assert torch.equal(output_of(model, inputs), changed)
    with model.disable_adapter():
        assert torch.equal(output_of(model, inputs), plain)
    assert torch.equal(output_of(model, inputs), changed)

    restored = model.unload()
    assert restored is base
    assert_untouched(base, untouched, flags=False)
    assert torch.equal(output_of(base, inputs), plain)

    merged = reloaded.merge_and_unload()
    assert not adapted_layers(merged)
    assert {n: type(m) for n, m in merged.named_modules()} == untouched["tree"]
    assert merged.state_dict().keys() == untouched["tensors"].keys()
    assert relative_error(output_of(merged, inputs), changed) < 1e-4


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_unet_with_convolutions(kind):
    base, inputs = unet(), unet_inputs()
    untouched, plain = fingerprint(base), output_of(base, inputs)
    model = get_peft_model(base, CONFIGS[kind](target_modules="all"))
    randomize(model, std=STRONG)
    kinds = {type(layer.base_layer) for layer in adapted_layers(model).values()}
    assert kinds == {nn.Linear, nn.Conv2d}
    assert len(adapted_layers(model)) == sum(isinstance(m, (nn.Linear, nn.Conv2d)) for m in unet().modules())
    changed = output_of(model, inputs)
    model.merge_adapter()
    assert relative_error(output_of(model, inputs), changed) < 1e-4
    model.unload()
    assert_untouched(base, untouched, flags=False)
    assert torch.equal(output_of(base, inputs), plain)


@pytest.mark.parametrize("family", list(MODELS))
def test_training_mode_gradients_reach_only_the_adapter(family):
    make, inputs = MODELS[family]
    model = get_peft_model(make(), LoKrConfig(r=2, target_modules="all-linear", init_weights=False))
    model.train()
    out = model(**inputs())
    (out[0] if not isinstance(out, torch.Tensor) else out).float().square().mean().backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lokr_" in n for n in trainable)
    assert with_gradient <= trainable
    count, total = model.get_nb_trainable_parameters()
    assert count == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert total == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", ["unet", "clip", "gpt2", "sd3"])
def test_the_wrapper_looks_like_the_model(family):
    make, _ = MODELS[family]
    base = make()
    model = LoKrModel(base, LoKrConfig(r=2, target_modules="all-linear"), "default")
    assert inspect.signature(model.forward) == inspect.signature(make().forward)
    assert model.config is base.config and model.dtype == base.dtype and model.device == base.device
    assert model.get_base_model() is base
    assert model.peft_config["default"].r == 2
    model.print_trainable_parameters()


def test_inject_in_place_reports():
    base = unet()
    report = inject_adapter(base, LoHaConfig(r=2, target_modules=["to_q", "conv1"]), adapter_name="style")
    names = [n for n, m in unet().named_modules() if n.endswith(("to_q", "conv1"))]
    assert sorted(report.matched) == sorted(names)
    assert report.trainable_parameters == sum(p.numel() for p in base.parameters() if p.requires_grad)
    assert sorted(adapted_layers(base)) == sorted(names)
    randomize(base, std=STRONG)
    model = AdapterModel(base)
    changed = output_of(model, unet_inputs())
    model.set_scale("style", 0.0)
    assert torch.equal(output_of(base, unet_inputs()), output_of(unet(), unet_inputs()))
    model.set_scale("style", 1.0)
    assert torch.equal(output_of(base, unet_inputs()), changed)
    model.unload()
    assert not adapted_layers(base)


@pytest.mark.parametrize("layer", ["linear", "conv2d-stride2", "hf-conv1d"])
def test_adapted_layer_shows_its_base(layer):
    base = make_layer(layer, torch.float32)
    attributes = (
        {k: v for k, v in vars(base).items() if k in base.__constants__ or k in ("nf", "nx")}
        if hasattr(base, "__constants__")
        else {"nf": base.nf, "nx": base.nx}
    )
    model, adapted = adapt(base, ALGORITHMS["lokr"]())
    assert adapted.base_layer is base and adapted.weight is base.weight and adapted.bias is base.bias
    for name, value in attributes.items():
        assert getattr(adapted, name) == value, name
    assert adapted.r == {"default": 2} and adapted.scaling == {"default": 1.5}
    model.add_adapter("m", MissConfig(r=6, mini_r=4, init_weights="mini", target_modules=["layer"]))
    assert adapted.mini_r["m"] == 4 and adapted.r["m"] == 6


# -------------------------------------------------------------------------------------------------- several adapters


def test_set_adapter_switches_and_freezes():
    model, x = three_adapters(), tokens()
    results = {}
    for active in (["a"], ["b"], ["c"], ["a", "b"], ["a", "b", "c"]):
        model.set_adapter(active if len(active) > 1 else active[0])
        assert list(model.active_adapters) == active
        trainable = {n for n, p in model.named_parameters() if p.requires_grad}
        assert trainable
        for name, _ in model.named_parameters():
            owner = next(
                (a for a in "abc" if f".{a}." in name and ("lokr_" in name or "shira_" in name or "miss_" in name)),
                None,
            )
            assert (name in trainable) == (owner in active), name
        results[tuple(active)] = output_of(model, x)
    outputs = list(results.values())
    assert all(not torch.equal(p, q) for p, q in itertools.combinations(outputs, 2))
    model.set_adapter(["c", "a", "b"])
    assert relative_error(output_of(model, x), results["a", "b", "c"]) < 1e-5
    with pytest.raises(AdapterError, match="nothing"):
        model.set_adapter("nothing")
    assert list(model.active_adapters) == ["c", "a", "b"]


def test_delete_adapter():
    model, x = three_adapters(), tokens()
    model.set_adapter("b")
    only_b = output_of(model, x)
    model.delete_adapter("a")
    assert torch.equal(output_of(model, x), only_b)
    assert not [n for n, _ in model.named_parameters() if ".a.lokr" in n]
    assert "a" not in model.peft_config
    model.add_adapter("a", CONFIGS["loha"](target_modules=["q_proj"]))
    model.delete_adapter("a")
    model.delete_adapter("c")
    model.delete_adapter("b")
    assert torch.equal(output_of(model, x), output_of(clip(), x))
    with pytest.raises(AdapterError):
        model.delete_adapter("b")


def test_deleting_a_merged_adapter_gives_the_base_back():
    model, x = three_adapters(), tokens()
    model.set_adapter(["a", "b"])
    model.merge_adapter()
    model.delete_adapter("a")
    model.unmerge_adapter()
    model.set_adapter("b")
    only_b = output_of(model, x)
    fresh = three_adapters()
    fresh.set_adapter("b")
    assert torch.equal(only_b, output_of(fresh, x))
    model.unload()
    assert torch.equal(output_of(model.get_base_model(), x), output_of(clip(), x))


def test_second_model_over_the_same_base_adds_an_adapter():
    base, x = clip(), tokens()
    first = LoKrModel(base, CONFIGS["lokr"](target_modules=["q_proj"]), "one")
    second = LoHaModel(base, CONFIGS["loha"](target_modules=["v_proj"]), "two")
    randomize(base, std=STRONG)
    assert set(second.active_adapters) >= {"two"}
    assert not torch.equal(output_of(second, x), output_of(clip(), x))
    second.set_adapter(["one", "two"])
    both = output_of(first, x)
    second.unload()
    assert not torch.equal(both, output_of(base, x))
    assert torch.equal(output_of(base, x), output_of(clip(), x))


@pytest.mark.parametrize("wrap", [AdapterModel, LoKrModel, get_peft_model])
def test_wrapping_a_wrapper_is_refused(wrap):
    model = wrapped("lokr")
    with pytest.raises(AdapterError):
        wrap(model, CONFIGS["lokr"](target_modules=["q_proj"]), "other")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["default", "a.b", "", "with.dot"])
def test_bad_adapter_names(name):
    model, before = wrapped("lokr"), None
    before = fingerprint(model)
    with pytest.raises(AdapterError):
        model.add_adapter(name, CONFIGS["loha"](target_modules=["q_proj"]))
    assert_untouched(model, before)


@pytest.mark.parametrize("name", ["base_layer", "weight", "adapters", "forward", "training", "keys", "0", "a-b", "ä"])
def test_surprising_adapter_names_work_or_are_refused(name):
    """Names that collide with attributes must not half work."""
    base, x = clip(), tokens()
    before = fingerprint(base)
    try:
        model = get_peft_model(base, CONFIGS["lokr"](target_modules=["q_proj"]), adapter_name=name)
    except AdapterError:
        assert_untouched(base, before)
        return
    randomize(model, std=STRONG)
    changed = output_of(model, x)
    assert not torch.equal(changed, output_of(clip(), x))
    model.set_adapter(name)
    model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(output_of(model, x), changed)
    model.unload()
    assert_untouched(base, before, flags=False)


# ------------------------------------------------------------------------------------------------------- memory, saving


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_low_cpu_mem_usage(kind, tmp_path):
    model, x = wrapped(kind), tokens()
    model.save_pretrained(tmp_path)
    empty = get_peft_model(clip(), CONFIGS[kind](target_modules="all-linear"), low_cpu_mem_usage=True)
    devices = {p.device.type for layer in adapted_layers(empty).values() for p in layer.adapters.parameters()}
    assert devices == {"meta"}
    assert {p.device.type for layer in adapted_layers(empty).values() for p in layer.base_layer.parameters()} == {"cpu"}
    loaded = AdapterModel.from_pretrained(clip(), tmp_path, low_cpu_mem_usage=True)
    assert not any(t.is_meta for t in itertools.chain(loaded.parameters(), loaded.buffers()))
    assert relative_error(output_of(loaded, x), output_of(model, x)) < 1e-6  # memory may be aligned otherwise
    loaded.merge_adapter()
    loaded.unmerge_adapter()
    loaded.load_adapter(tmp_path, "again", is_trainable=True)
    assert relative_error(output_of(loaded, x), output_of(model, x)) < 1e-6  # memory may be aligned otherwise


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_state_dict_alone_restores(kind):
    """Also the masks of SHiRA, which a fresh model draws anew."""
    fields = {"random_seed": None} if kind == "shira" else {}
    config = CONFIGS[kind](target_modules=["q_proj", "fc1"])
    for name, value in fields.items():
        setattr(config, name, value)
    model = get_peft_model(clip(), config)
    randomize(model, std=STRONG)
    torch.manual_seed(99)
    fresh = get_peft_model(clip(), copy.deepcopy(config))
    result = fresh.load_state_dict(model.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(output_of(fresh, tokens()), output_of(model, tokens()))


def test_pipeline_saves_the_base_under_its_own_names(tmp_path):
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    pipe = stable_diffusion()
    plain, before = picture(pipe), copy.deepcopy(pipe.unet.state_dict())
    pipe.unet = LoKrModel(pipe.unet, LoKrConfig(r=2, target_modules=["to_q", "to_k"], init_weights=False), "default")
    pipe.text_encoder = MissModel(pipe.text_encoder, MissConfig(r=4, target_modules=["q_proj"]), "default")
    assert not torch.equal(picture(pipe), plain)
    pipe.save_pretrained(tmp_path)
    stored = load_file(next((tmp_path / "unet").glob("*.safetensors")))
    assert stored.keys() == before.keys()
    assert all(torch.equal(stored[k], before[k]) for k in stored)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    again.set_progress_bar_config(disable=True)
    assert type(again.unet).__name__ == "UNet2DConditionModel"
    assert torch.equal(picture(again), plain)


def test_unloaded_layers_are_freed():
    """Nothing (no cache, no registry) may keep an adapted layer alive."""
    for kind in CONFIGS:
        model = wrapped(kind)
        output_of(model, tokens())
        model.merge_adapter()
        refs = [weakref.ref(layer) for layer in adapted_layers(model).values()]
        refs += [weakref.ref(layer.adapters["default"]) for layer in adapted_layers(model).values()]
        base = model.unload()
        del model
        gc.collect()
        assert not any(ref() is not None for ref in refs), kind
        del base


def test_dtype_and_device_moves():
    model, x = wrapped("lokr", target_modules=["q_proj", "fc1"]), tokens()
    model.add_adapter("s", CONFIGS["shira"](target_modules=["fc1"]))
    randomize(model, std=STRONG)
    model.set_adapter(["default", "s"])
    expected = output_of(model, x)
    assert relative_error(output_of(model.double(), x), expected) < 1e-5
    for layer in adapted_layers(model).values():
        for name, buffer in layer.named_buffers():
            assert "indices" not in name or buffer.dtype == torch.int32
    assert relative_error(output_of(model.bfloat16(), x), expected) < 0.1
    assert output_of(model, x).dtype == torch.bfloat16


def test_gradient_checkpointing_of_the_model():
    model = get_peft_model(gpt2(), LoKrConfig(r=2, target_modules=["c_attn", "c_fc"], init_weights=False))
    model.train()
    for dropout in (m for m in model.modules() if isinstance(m, nn.Dropout)):
        dropout.p = 0.0
    batch = {**tokens(), "labels": tokens()["input_ids"]}
    model(**batch).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    model(**batch).loss.backward()
    assert expected
    for name, value in expected.items():
        assert torch.allclose(dict(model.named_parameters())[name].grad, value, rtol=1e-4, atol=1e-6)
