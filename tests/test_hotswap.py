"""Contents of adapters are exchanged in compiled models without another compilation, exactly."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from pipelinefiles import make_file
from smallpipelines import pipeline, same_weights

from lycoris_diff import (
    AdapterError,
    BOFTConfig,
    GLoraConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    NormConfig,
    OFTConfig,
    ShiraConfig,
    StableDiffusionLycorisPipeline,
    delete_adapter,
    explain,
    fuse_adapters,
    inject_adapter,
    list_adapters,
    load_adapter,
    prepare_hotswap,
    save_adapter,
    set_adapters,
    unfuse_adapters,
    unload_adapters,
)

ALGORITHMS = ("lora", "lokr", "loha", "full")


def few(path):
    """Tracing takes the longer the more layers have adapters."""
    return path.startswith(("down_blocks.0", "mid_block"))


def attention(path):
    return few(path) and ("to_q" in path or "to_v" in path)


def other_rank(path, rank):
    """A kohya LoRA file cut or stretched to another rank."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for name, value in tensors.items():
        if "lora_down" in name:
            tensors[name] = torch.randn(rank, *value.shape[1:]) * 0.3
        elif "lora_up" in name:
            tensors[name] = torch.randn(value.shape[0], rank, *value.shape[2:]) * 0.3
    save_file(tensors, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    pipe = pipeline("sd15")
    found = {}
    for seed, name in enumerate(ALGORITHMS):
        found[name] = folder / f"{name}.safetensors"
        take = (lambda path: attention(path) or (few(path) and "conv1" in path)) if name == "lokr" else attention
        make_file(found[name], pipe, name, ("unet",), take, seed=seed)
    found["lora-8"] = folder / "lora-8.safetensors"
    make_file(found["lora-8"], pipe, "lora", ("unet",), lambda path: few(path) and "to_q" in path, seed=9)
    other_rank(found["lora-8"], 8)
    return found


def answer(unet):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, unet.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor([3, 500]), encoder_hidden_states=text).sample


def loaded(files, weights):
    """What a fresh pipeline answers with files loaded the ordinary way."""
    pipe = pipeline("sd15")
    for name, weight in weights.items():
        load_adapter(pipe, files[name], name, weight=weight)
    return answer(pipe.unet)


def compiled(pipe):
    """The compiled UNet and what counts its compilations; the first is done."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    unet = torch.compile(pipe.unet, backend=counter)
    answer(unet)
    return unet, counter


def test_contents_weights_and_active_set_without_recompilation(files):
    """Tolerance: float32, parts summed in another order than separate adapters."""
    pipe = pipeline("sd15")
    base = answer(pipe.unet)
    report = prepare_hotswap(pipe, list(files.values()), ["one", "two"])
    assert report.parts["Lora"] > 0 and report.parts["LoKr"] > 0 and report.bytes > 0
    unet, counter = compiled(pipe)
    frames = counter.frame_count
    torch.testing.assert_close(answer(unet), base, rtol=0, atol=1e-6)
    assert torch.equal(answer(pipe.unet), base)  # nothing of an empty slot runs where nothing is compiled

    steps = [
        (lambda: load_adapter(pipe, files["lora"], "one", hotswap=True), {"lora": 1.0}),
        (lambda: load_adapter(pipe, files["lokr"], "two", weight=0.5, hotswap=True), {"lora": 1.0, "lokr": 0.5}),
        (lambda: set_adapters(pipe, {"two": 0.7}), {"lokr": 0.7}),
        (lambda: load_adapter(pipe, files["loha"], "two", hotswap=True), {"loha": 1.0}),
        (lambda: set_adapters(pipe, {"one": 0.3, "two": -1.0}), {"lora": 0.3, "loha": -1.0}),
        (lambda: load_adapter(pipe, files["lora-8"], "one", hotswap=True), {"lora-8": 1.0, "loha": -1.0}),
        (lambda: load_adapter(pipe, files["full"], "two", hotswap=True), {"lora-8": 1.0, "full": 1.0}),
        (lambda: set_adapters(pipe, {}), {}),
        (lambda: load_adapter(pipe, files["lora"], "two", hotswap=True), {"lora": 1.0}),
    ]
    for change, expected in steps:
        change()
        wanted = loaded(files, expected)
        torch.testing.assert_close(answer(unet), wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(answer(pipe.unet), wanted, rtol=1e-4, atol=1e-5)
        assert not expected or (wanted - base).abs().max() > 1e-3
    assert counter.frame_count == frames
    unload_adapters(pipe)
    assert same_weights(pipe, pipeline("sd15")) and torch.equal(answer(pipe.unet), base)


@pytest.mark.parametrize("name", ["lora", "lokr", "loha", "full", "lora-8"])
def test_fused_explained_and_saved_like_an_ordinary_adapter(name, files, tmp_path):
    pipe = pipeline("sd15")
    prepare_hotswap(pipe, [files["lora"], files["lora-8"], files[name]], "slot")
    load_adapter(pipe, files[name], "slot", weight=0.5, hotswap=True)
    wanted = loaded(files, {name: 0.5})
    fuse_adapters(pipe)
    torch.testing.assert_close(answer(pipe.unet), wanted, rtol=1e-4, atol=1e-5)
    unfuse_adapters(pipe)
    assert list_adapters(pipe) == ["slot"]
    strengths = [found[0] for found in explain(pipe).components["unet"].values()]
    active = [strength for strength in strengths if strength.state == "active"]
    assert active and all(strength.weight == 0.5 and strength.algorithm == name.split("-")[0].upper() for strength in active)
    save_adapter(pipe, tmp_path / "again.safetensors", "slot")
    again = pipeline("sd15")
    load_adapter(again, tmp_path / "again.safetensors", weight=0.5)
    torch.testing.assert_close(answer(again.unet), wanted, rtol=1e-4, atol=1e-5)
    delete_adapter(pipe, "slot")
    assert same_weights(pipe, pipeline("sd15"))


class TestRanks:
    def test_every_fitting_file(self, files):
        pipe = pipeline("sd15")
        report = prepare_hotswap(pipe, {"lora": 8, "loha": 4}, target_modules=["to_q", "to_v"])
        assert report.names == ["hotswap"] and set(report.parts) == {"Lora", "LoHa"}
        assert "room for" in str(report)
        for name in ("lora", "loha", "lora-8"):
            load_adapter(pipe, files[name], "hotswap", hotswap=True)
            torch.testing.assert_close(answer(pipe.unet), loaded(files, {name: 1.0}), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize(
        ("name", "message"),
        [("lokr", "no room for LoKr"), ("full", "no room for Full"), ("lora-8", "no room for Lora")],
    )
    def test_what_was_not_prepared_is_refused(self, name, message, files):
        pipe = pipeline("sd15")
        prepare_hotswap(pipe, {"lora": 4}, target_modules=["to_q", "to_v", "conv1"])
        load_adapter(pipe, files["lora"], "hotswap", hotswap=True)
        before = answer(pipe.unet)
        with pytest.raises(AdapterError, match=f"{message}.*give prepare_hotswap"):
            load_adapter(pipe, files[name], "hotswap", hotswap=True)
        assert torch.equal(answer(pipe.unet), before)

    def test_modules_that_were_not_prepared(self, files):
        pipe = pipeline("sd15")
        prepare_hotswap(pipe, {"lora": 4}, target_modules=["to_q"])
        with pytest.raises(AdapterError, match="to_v: nothing is prepared there"):
            load_adapter(pipe, files["lora"], "hotswap", hotswap=True)


FEW = r"(down_blocks\.0|mid_block)\..*\.(%s)"
TO_Q, CONV = FEW % "to_q", FEW % "conv1|to_q"
MORE = {
    "dora": lambda: LoraConfig(r=2, use_dora=True, target_modules=CONV),
    "dora-in": lambda: LoraConfig(r=2, use_dora=True, dora_axis="in", target_modules=TO_Q),
    "lokr-core": lambda: LoKrConfig(r=2, use_effective_conv2d=True, target_modules=CONV),
    "loha-core": lambda: LoHaConfig(r=2, use_effective_conv2d=True, target_modules=CONV),
    "oft": lambda: OFTConfig(oft_block_size=4, target_modules=TO_Q),
    "boft": lambda: BOFTConfig(r=4, target_modules=TO_Q),
    "glora": lambda: GLoraConfig(r=2, target_modules=TO_Q),
    "ia3": lambda: IA3Config(target_modules=TO_Q),
    "norm": lambda: NormConfig(target_modules=FEW % "norm1"),
    "miss": lambda: MissConfig(r=4, target_modules=TO_Q),
    "shira": lambda: ShiraConfig(r=1, random_seed=0, target_modules=TO_Q),
}


@pytest.fixture(scope="module")
def more(tmp_path_factory):
    """A file, or a PEFT directory, of every other algorithm."""
    folder, found = tmp_path_factory.mktemp("more"), {}
    for name, config in MORE.items():
        pipe = pipeline("sd15")
        inject_adapter(pipe.unet, config(), name)
        with torch.no_grad():
            for parameter in pipe.unet.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        form = "peft" if name in ("miss", "shira", "oft") else "kohya"
        found[name] = folder / (name if form == "peft" else f"{name}.safetensors")
        save_adapter(pipe, found[name], name, format=form)
    return found


@pytest.mark.parametrize("name", MORE)
def test_every_algorithm(name, files, more):
    """Beside room for another file, on and off, and out again."""
    pipe = pipeline("sd15")
    base = answer(pipe.unet)
    prepare_hotswap(pipe, [files["lora-8"], more[name]], "slot")
    for weight in (1.0, 0.4):
        load_adapter(pipe, more[name], "slot", weight=weight, hotswap=True)
        torch.testing.assert_close(answer(pipe.unet), loaded(more, {name: weight}), rtol=1e-4, atol=1e-5)
    assert (answer(pipe.unet) - base).abs().max() > 1e-4
    load_adapter(pipe, files["lora-8"], "slot", hotswap=True)
    torch.testing.assert_close(answer(pipe.unet), loaded(files, {"lora-8": 1.0}), rtol=1e-4, atol=1e-5)
    set_adapters(pipe, [])
    assert torch.equal(answer(pipe.unet), base)


def test_compiled_with_what_depends_on_the_base_weight(more):
    pipe = pipeline("sd15")
    prepare_hotswap(pipe, [more[name] for name in ("dora", "oft", "shira", "miss")])
    unet, counter = compiled(pipe)
    frames = counter.frame_count
    for name in ("dora", "oft", "shira", "miss"):
        load_adapter(pipe, more[name], "hotswap", weight=0.6, hotswap=True)
        torch.testing.assert_close(answer(unet), loaded(more, {name: 0.6}), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == frames


def test_under_diffusers_names(files):
    plain = pipeline("sd15")
    pipe = StableDiffusionLycorisPipeline(**plain.components, requires_safety_checker=False)
    pipe.enable_lora_hotswap(target_rank=8, target_modules=["to_q", "to_v"])
    for name in ("lora", "lora-8"):
        pipe.load_lora_weights(files[name], hotswap=True)
        torch.testing.assert_close(answer(pipe.unet), loaded(files, {name: 1.0}), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"lorra": 4},), "no algorithm 'lorra'.*lora"),
        (({"lora": 0},), "r is 0|rank"),
        (({},), "expected different names"),
        (({"lora": 4}, ["a", "a"]), "expected different names"),
        (({"lora": 4}, "a.b"), "without dots"),
        (({"tlora": 4},), "cannot be hot-swapped"),
    ],
)
def test_refused(arguments, message):
    pipe = pipeline("sd15")
    with pytest.raises(AdapterError, match=message):
        prepare_hotswap(pipe, *arguments)
    assert same_weights(pipe, pipeline("sd15"))


def test_only_prepared_names(files):
    pipe = pipeline("sd15")
    load_adapter(pipe, files["lora"], "style")
    with pytest.raises(AdapterError, match="prepare_hotswap"):
        load_adapter(pipe, files["lora"], "style", hotswap=True)
    with pytest.raises(AdapterError, match="already exists"):
        prepare_hotswap(pipe, {"lora": 4}, "style")
    with pytest.raises(AdapterError, match="prepare_hotswap"):
        load_adapter(pipe, files["lora"], "other", hotswap=True)
