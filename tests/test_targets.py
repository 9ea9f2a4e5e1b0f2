"""Which modules an adapter lands on: names, patterns, presets, defaults, and typos that name the nearest candidates."""

from __future__ import annotations

import pytest
import torch
from cases import assert_untouched, fingerprint, randomize
from modelcases import CONFIGS, adapted_layers, wrapped
from smallmodels import MODELS, bert, clip, gpt2, llama, output_of, sd3, t5, tokens, unet
from torch import nn

from lycoris_diff import (
    AdapterError,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    ShiraConfig,
    TargetError,
    get_peft_model,
    inject_adapter,
)


def matched(base: nn.Module, **fields) -> set[str]:
    fields.setdefault("r", 1)
    return set(inject_adapter(base, LoKrConfig(**fields), adapter_name="default").matched)


def names(base: nn.Module, kinds, keep=lambda name: True) -> set[str]:
    return {n for n, m in base.named_modules() if isinstance(m, kinds) and keep(n)}


def test_suffix_lists_match_whole_segments():
    assert matched(unet(), target_modules=["to_q"]) == names(unet(), nn.Linear, lambda n: n.endswith(".to_q"))
    assert matched(unet(), target_modules=["to_out.0"]) == names(unet(), nn.Linear, lambda n: n.endswith(".to_out.0"))
    full = "down_blocks.0.attentions.0.proj_in"
    assert matched(unet(), target_modules=[full]) == {full}
    with pytest.raises(TargetError):  # "_q" is no whole segment
        matched(unet(), target_modules=["_q"])


def test_regular_expressions_match_the_whole_name():
    expected = names(unet(), nn.Conv2d, lambda n: n.startswith("up_blocks") and n.endswith("conv1"))
    assert matched(unet(), target_modules=r"up_blocks\..*conv1") == expected
    with pytest.raises(TargetError):
        matched(unet(), target_modules=r"up_blocks\..*con")


@pytest.mark.parametrize("family", list(MODELS))
def test_all_linear_leaves_out_the_head(family):
    from transformers.pytorch_utils import Conv1D

    base = MODELS[family][0]()
    head = {"lm_head", "classifier"}
    expected = names(base, (nn.Linear, Conv1D), lambda n: n not in head)
    assert matched(base, target_modules="all-linear") == expected


@pytest.mark.parametrize("family", ["unet", "clip", "sd3", "dit", "t5"])
def test_all_takes_every_layer_of_a_supported_kind(family):
    base = MODELS[family][0]()
    expected = names(base, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    assert matched(base, target_modules="all") == expected


@pytest.mark.parametrize("family", ["unet", "sd3", "dit"])
def test_presets_by_role(family):
    make = MODELS[family][0]
    attention, mlp = matched(make(), target_modules="attention"), matched(make(), target_modules="mlp")
    assert {n for n in attention if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))} >= names(
        make(), nn.Linear, lambda n: n.endswith(("to_q", "to_k", "to_v", "to_out.0"))
    )
    assert mlp >= names(make(), nn.Linear, lambda n: n.endswith(("ff.net.0.proj", "ff.net.2")))
    assert not attention & mlp
    assert not any(".ff." in n for n in attention) and not any("to_q" in n for n in mlp)
    if family == "unet":
        conv = matched(make(), target_modules="conv")
        assert conv and conv <= names(make(), nn.Conv2d)
        assert conv >= names(make(), nn.Conv2d, lambda n: n.endswith(("conv1", "conv2")))


def test_presets_on_text_encoders():
    for make, attention, mlp in (
        (clip, ("q_proj", "k_proj", "v_proj", "out_proj"), ("fc1", "fc2")),
        (t5, ("q", "k", "v", "o"), ("wi_0", "wi_1", "wo")),
        (llama, ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")),
    ):
        assert {n.split(".")[-1] for n in matched(make(), target_modules="attention")} == set(attention)
        assert {n.split(".")[-1] for n in matched(make(), target_modules="mlp")} == set(mlp)


@pytest.mark.parametrize("family", list(MODELS))
@pytest.mark.parametrize("kind", ["lokr", "loha", "miss", "shira", "lora"])
def test_defaults_by_architecture(family, kind):
    """Without targets every family has a default."""
    make, inputs = MODELS[family]
    model = get_peft_model(make(), CONFIGS[kind]())
    assert adapted_layers(model)
    randomize(model)
    assert not torch.equal(output_of(model, inputs()), output_of(make(), inputs()))


FAMILIES = [
    "bert",
    "roberta",
    "xlm-roberta",
    "electra",
    "distilbert",
    "gpt2",
    "gpt_neo",
    "gpt_neox",
    "gptj",
    "bloom",
    "falcon",
    "opt",
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "vit",
    "dinov2",
    "t5",
    "mt5",
    "umt5",
    "bart",
    "whisper",
    "clip_text_model",
]


def on_meta(family: str) -> nn.Module:
    """One block of a transformers family, without memory."""
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(family)
    for name in ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, 1)
    with torch.device("meta"):
        return AutoModel.from_config(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_of_transformers_families(family):
    """Every common family has defaults that exist in its model, PEFT's where PEFT has some."""
    peft = pytest.importorskip("peft")
    report = inject_adapter(on_meta(family), LoraConfig(r=1), adapter_name="default", low_cpu_mem_usage=True)
    assert report.matched
    try:
        theirs = peft.get_peft_model(on_meta(family), peft.LoraConfig(r=1))
    except ValueError:
        return  # PEFT has none
    assert set(report.matched) == {n.removeprefix("base_model.model.") for n in theirs.targeted_module_names}


def test_unknown_architecture_asks_for_targets():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.strange = nn.Linear(4, 4)

    base = Odd()
    with pytest.raises(AdapterError, match="target_modules"):
        get_peft_model(base, LoKrConfig())
    assert type(base.strange) is nn.Linear


def test_exclusion_wins():
    got = matched(clip(), target_modules=["q_proj", "fc1"], exclude_modules=["fc1"])
    assert got == names(clip(), nn.Linear, lambda n: n.endswith("q_proj"))
    got = matched(clip(), target_modules="all-linear", exclude_modules=r".*layers\.[01]\..*")
    assert got == names(clip(), nn.Linear, lambda n: ".layers.2." in n)


def test_layer_indices():
    got = matched(clip(), target_modules=["q_proj"], layers_to_transform=[0, 2])
    assert got == names(clip(), nn.Linear, lambda n: n.endswith("q_proj") and ".layers.1." not in n)
    assert matched(clip(), target_modules=["q_proj"], layers_to_transform=1) == names(
        clip(), nn.Linear, lambda n: n.endswith("layers.1.self_attn.q_proj")
    )
    got = matched(sd3(), target_modules=["to_q"], layers_to_transform=[1], layers_pattern="transformer_blocks")
    assert got == {"transformer_blocks.1.attn.to_q"}
    with pytest.raises(TargetError):
        matched(clip(), target_modules=["q_proj"], layers_to_transform=[7])
    with pytest.raises(AdapterError):
        matched(clip(), target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="bloks")


def test_ranks_and_alphas_by_pattern():
    config = LoHaConfig(
        r=2,
        alpha=4,
        target_modules=["q_proj", "fc1"],
        rank_pattern={"fc1": 5, r".*layers\.0\.self_attn\.q_proj": 3},
        alpha_pattern={"fc1": 10, "layers.2.self_attn.q_proj": 1},
    )
    layers = adapted_layers(get_peft_model(clip(), config))
    for name, layer in layers.items():
        rank = 5 if name.endswith("fc1") else 3 if "layers.0." in name else 2
        alpha = 10 if name.endswith("fc1") else 1 if "layers.2." in name else 4
        assert layer.adapters["default"].hada_w1_b.shape[0] == rank == layer.r["default"], name
        assert layer.scaling["default"] == pytest.approx(alpha / rank), name


def test_modules_to_save_are_trained_whole(tmp_path):
    from lycoris_diff import AdapterModel

    base = bert()
    before = base.classifier.weight.detach().clone()
    model = get_peft_model(base, MissConfig(r=4, target_modules=["query"], modules_to_save=["classifier"], init_weights=False))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "classifier" in n}
    assert len(trained) == 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**tokens(), labels=torch.tensor([0, 2])).loss.backward()
    optimizer.step()
    changed = output_of(model, tokens())
    with model.disable_adapter():
        assert torch.equal(output_of(model, tokens()), output_of(bert(), tokens()))
    model.save_pretrained(tmp_path)
    assert torch.equal(output_of(AdapterModel.from_pretrained(bert(), tmp_path), tokens()), changed)
    model.add_adapter("second", MissConfig(r=4, target_modules=["query"]))
    model.set_adapter("second")
    assert torch.equal(output_of(model, tokens()), output_of(bert(), tokens()))
    model.set_adapter("default")
    assert torch.equal(output_of(model, tokens()), changed)
    kept = AdapterModel.from_pretrained(bert(), tmp_path).merge_and_unload()
    assert type(kept.classifier) is nn.Linear and not torch.equal(kept.classifier.weight, before)
    restored = model.unload()
    assert type(restored.classifier) is nn.Linear and torch.equal(restored.classifier.weight, before)


# --------------------------------------------------------------------------------------------------------------- typos

TYPOS = {
    "one of several names": ({"target_modules": ["q_proj", "v_porj"]}, "v_porj", "v_proj"),
    "the only name": ({"target_modules": ["qproj"]}, "qproj", "q_proj"),
    "rank pattern": ({"target_modules": ["q_proj"], "rank_pattern": {"qproj": 3}}, "qproj", "q_proj"),
    "alpha pattern": ({"target_modules": ["q_proj"], "alpha_pattern": {"q_prj": 3}}, "q_prj", "q_proj"),
    "excluded": ({"target_modules": ["q_proj"], "exclude_modules": ["fc_1"]}, "fc_1", "fc1"),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["final_layernorm"]}, "final_layernorm", "norm"),
    "preset": ({"target_modules": "all-liner"}, "all-liner", "all-linear"),
}


@pytest.mark.parametrize("case", list(TYPOS))
def test_typos_name_the_nearest(case):
    fields, typo, nearest = TYPOS[case]
    base = clip()
    before = fingerprint(base)
    with pytest.raises(AdapterError) as error:
        get_peft_model(base, LoKrConfig(r=2, **fields))
    assert typo in str(error.value)
    assert nearest in str(error.value)
    assert_untouched(base, before)


def test_a_typo_on_a_second_adapter_changes_nothing():
    model = wrapped("lokr", target_modules=["q_proj"])
    before = fingerprint(model)
    for config in (
        LoHaConfig(target_modules=["q_proj", "v_porj"]),
        ShiraConfig(r=1, target_modules=["embeddings"]),
        MissConfig(r=4, target_modules=["q_proj"], layers_to_transform=[9]),
    ):
        with pytest.raises(AdapterError):
            model.add_adapter("second", config)
        assert_untouched(model, before)
        assert list(model.active_adapters) == ["default"] and list(model.peft_config) == ["default"]


def test_targets_inside_adapters_are_never_matched():
    """A second adapter looks at the base's own layers, not at parts of the first adapter."""
    model = wrapped("lora", target_modules="all-linear")
    count = len(adapted_layers(model))
    model.add_adapter("second", LoKrConfig(r=1, target_modules="all-linear"))
    assert len(adapted_layers(model)) == count
    model.add_adapter("third", LoKrConfig(r=1, target_modules=["q_proj"]))
    assert all(not isinstance(m, nn.Linear) for n, m in model.named_modules() if n.endswith("q_proj"))


def test_a_layer_shared_by_two_places_is_adapted_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(6, 6)
            self.second = self.first
            self.last = nn.Linear(6, 6)

        def forward(self, x):
            return self.last(self.second(self.first(x)))

    base = Tied()
    before = fingerprint(base)
    x = torch.randn(2, 6)
    plain = base(x)
    model = get_peft_model(base, LoKrConfig(r=1, target_modules=["first", "second"], init_weights=False))
    inner = model.get_base_model()
    assert inner.first is inner.second
    changed = model(x).detach()
    assert not torch.equal(changed, plain)
    model.merge_adapter()
    assert torch.allclose(model(x), changed, atol=1e-5)
    model.unload()
    assert base.first is base.second
    assert_untouched(base, before, flags=False)


def test_tied_weights_are_not_merged_silently():
    """GPT-2's head shares the embedding's weight: merging into it would change the embedding as well."""
    base = gpt2()
    embedding = base.transformer.wte.weight.detach().clone()
    try:
        model = get_peft_model(base, LoKrConfig(r=2, target_modules=["lm_head"], init_weights=False))
    except AdapterError:
        return
    changed = output_of(model, tokens())
    try:
        merged = model.merge_and_unload()
    except AdapterError:
        return
    assert torch.equal(merged.transformer.wte.weight, embedding)
    assert torch.allclose(output_of(merged, tokens()), changed, atol=1e-4)
