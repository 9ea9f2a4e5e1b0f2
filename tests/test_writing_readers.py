"""Files written here, read by the programs they are written for: LyCORIS, PEFT and diffusers."""

from __future__ import annotations

import copy
import warnings

import lycoris
import pytest
import torch
from community import CommunityFile, base_weight, spread
from community_names import native_names, weights_of
from peft import LoKrConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from tinymodels import pipeline
from torch import Tensor, nn
from writingcases import SELECTED, community, parts_of, pipeline_directory

from lycoris_diff import AdapterModel
from lycoris_diff.checkpoints.checkpoint import Entry
from lycoris_diff.checkpoints.read import read_checkpoint
from lycoris_diff.checkpoints.write import write_checkpoint
from lycoris_diff.errors import CheckpointError

#: (IA)^3 is missing, which LyCORIS 4.1.3 cannot load back whoever wrote it
LYCORIS = (
    *("lora", "lora-tucker", "lora-dora-rows", "loha", "loha-cp", "loha-dora-rows", "lokr-full", "lokr-w1", "lokr-w2"),
    *("lokr-both", "lokr-tucker", "lokr-dora-rows", "glora", "full", "diag-oft", "diag-oft-constraint", "diag-oft-rescale"),
    *("boft", "miss", "norm"),
)
PEFT = (
    *("lora", "dylora", "lora-tucker", "lora-dora-rows", "loha", "loha-cp", "lokr-full", "lokr-w1", "lokr-w2", "lokr-both"),
    *("miss", "miss-bat", "shira", "peft-oft"),
)
COMFYUI = (
    *("lora", "lora-tucker", "loha", "loha-cp", "lokr-full", "lokr-w1", "lokr-both", "lokr-tucker"),
    *("glora", "full", "miss"),
)
OURS = ("lora", "lokr-w2", "loha-dora-rows", "glora", "norm", "boft", "ia3-in", "full-bias")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return lambda family: str(pipeline_directory(family, folder))


def few_layers(family: str, component: str, paths) -> nn.Module:
    """Some layers of a component in float32, under their names and nothing else."""
    root = nn.Module()
    for path in paths:
        *parents, leaf = path.split(".")
        owner = root
        for name in parents:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner._modules[name]
        owner.add_module(leaf, copy.deepcopy(parts_of(family)[component].get_submodule(path)).float())
    return root.eval()


def example(layer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if isinstance(layer, nn.Linear):
        return torch.randn(3, layer.in_features, generator=generator)
    if isinstance(layer, nn.LayerNorm):
        return torch.randn(3, *layer.normalized_shape, generator=generator)
    channels = layer.num_channels if isinstance(layer, nn.GroupNorm) else layer.in_channels
    return torch.randn(
        2, channels, *(4,) * (2 if isinstance(layer, nn.GroupNorm) else layer.weight.dim() - 2), generator=generator
    )


@torch.no_grad()
def check_layers(model: nn.Module, file: CommunityFile, family: str, component: str) -> None:
    """Every layer's output is that of a layer with the file's own float64 change in its weight."""
    for path, (dw, db) in file.expected[component].items():
        reference = copy.deepcopy(parts_of(family)[component].get_submodule(path))
        plain = copy.deepcopy(reference)
        reference.weight += dw.reshape(reference.weight.shape) if dw is not None else 0
        if db is not None:
            reference.bias += db
        x = example(plain)
        want, before = reference(x.double()), plain(x.double())
        got = model.get_submodule(path)(x)
        size = float((want - before).norm())
        assert size > 1e-4 * float(want.norm()), f"{path}: the adapter has no effect, the test shows nothing"
        assert float((got - want).norm()) < 1e-4 * size + 1e-5 * float(want.norm()), path


def written(family: str, algorithm: str, format: str, bases, folder, scheme: str = "", denoiser_only: bool = True):
    """File, component, checkpoint, report and path of what was written."""
    file = community(family, algorithm, scheme)
    ckpt = read_checkpoint(file.write(folder / "in"), bases(family))
    component = next(c for c in ckpt.components if not c.startswith("text"))
    if denoiser_only:
        ckpt.components = {component: ckpt.components[component]}
        file.expected = {component: file.expected[component]}
    if algorithm.startswith("diag-oft"):  # LyCORIS cannot rebuild blocks that are larger than their number
        rows = {p: len(parts_of(family)[component].get_submodule(p).weight) for p in file.expected[component]}
        ckpt.components[component] = {p: e for p, e in ckpt.components[component].items() if rows[p] >= 16}
        file.expected[component] = {p: e for p, e in file.expected[component].items() if rows[p] >= 16}
    out = folder / "out" if format == "peft" else folder / "out.safetensors"
    return file, component, ckpt, write_checkpoint(ckpt, out, format), out


def in_lycoris(model: nn.Module, path) -> int:
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(path), model)
    network.eval().requires_grad_(False)
    network.apply_to()
    return len(network.loras)


def in_peft(model: nn.Module, path) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns of missing and unexpected keys
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message="Sparse invariant")
        return PeftModel.from_pretrained(model, path).eval().base_model.model


@pytest.mark.parametrize("algorithm", LYCORIS)
def test_lycoris_loads_it(algorithm, bases, tmp_path):
    file, component, ckpt, _, out = written("sd15", algorithm, "lycoris", bases, tmp_path)
    model = few_layers("sd15", component, file.expected[component])
    assert in_lycoris(model, out) == len(ckpt.components[component])
    check_layers(model, file, "sd15", component)


@pytest.mark.parametrize(
    ("family", "algorithm"), [*(("sd15", a) for a in PEFT), *(("flux", a) for a in ("lora", "loha", "miss", "peft-oft"))]
)
def test_peft_loads_it(family, algorithm, bases, tmp_path):
    file, component, _, report, out = written(family, algorithm, "peft", bases, tmp_path)
    assert not report.notes
    model = in_peft(few_layers(family, component, file.expected[component]), out)
    check_layers(model, file, family, component)


@pytest.mark.parametrize("algorithm", OURS)
def test_this_library_loads_the_directory(algorithm, bases, tmp_path):
    """Also what PEFT has no type for."""
    file, component, _, _, out = written("sd15", algorithm, "peft", bases, tmp_path)
    model = AdapterModel.from_pretrained(few_layers("sd15", component, file.expected[component]), out).eval()
    check_layers(model.get_base_model(), file, "sd15", component)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 2},
        {"r": 64},
        {"r": 1, "decompose_both": True},
        {"r": 3, "decompose_factor": 4},
        {"r": 1, "use_effective_conv2d": True},
    ],
    ids=str,
)
def test_peft_lokr_to_kohya_and_back(settings, bases, tmp_path):
    """PEFT derives the shapes of a LoKr's factors from its config: the same config must be found again."""
    torch.manual_seed(0)
    paths = [p for p in SELECTED["sd15"] if not p.startswith("encoder") and "norm" not in p]
    config = LoKrConfig(target_modules=paths, init_weights=False, alpha=3, **settings)
    model = get_peft_model(few_layers("sd15", "unet", paths), config)
    for name, parameter in model.named_parameters():
        if "lokr" in name:
            nn.init.normal_(parameter, std=0.2)
    model.eval().save_pretrained(tmp_path / "peft")
    ckpt = read_checkpoint(tmp_path / "peft", bases("sd15"))
    assert not (ckpt.unknown or ckpt.unmatched or ckpt.wrong_shape)
    write_checkpoint(ckpt, tmp_path / "kohya.safetensors", "kohya")
    report = write_checkpoint(read_checkpoint(tmp_path / "kohya.safetensors", bases("sd15")), tmp_path / "back", "peft")
    fresh = few_layers("sd15", "unet", paths)
    if "use_effective_conv2d" in settings:  # cores are multiplied out for kohya's readers
        loaded = AdapterModel.from_pretrained(fresh, tmp_path / "back").eval().get_base_model()
    else:
        assert not report.notes
        loaded = in_peft(fresh, tmp_path / "back")
    for path in paths:
        x = example(parts_of("sd15")["unet"].get_submodule(path))
        with torch.no_grad():
            want = model.base_model.model.get_submodule(path)(x)
            assert torch.allclose(loaded.get_submodule(path)(x), want, atol=1e-5, rtol=1e-5), path


@pytest.mark.parametrize(
    ("family", "algorithm", "scheme"),
    [
        ("sd15", "lora", ""),
        ("sd15", "lora-dora-rows", ""),
        ("flux", "lora", "lycoris"),
        ("zimage", "lokr-both", "diffusion_model-diffusers"),
    ],
)
def test_diffusers_loads_it(family, algorithm, scheme, bases, tmp_path):
    file, denoiser, _, _, _ = written(family, algorithm, "diffusers", bases, tmp_path, scheme, denoiser_only=False)
    parts = {c: copy.deepcopy(m).float() for c, m in parts_of(family).items()}
    pipe = pipeline(family, parts=parts)
    pipe.load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    for component in file.expected:
        check_layers(parts[component], file, family, component)
    assert denoiser in file.expected


def test_a_text_encoder_without_attention(bases, tmp_path):
    """diffusers tells the kind of a text encoder's file by names that only some modules have."""
    file = community("sd15", "lora")
    ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
    path = "encoder.layers.3.mlp.fc1"
    ckpt.components = {"text_encoder": {path: ckpt.components["text_encoder"][path]}}
    write_checkpoint(ckpt, tmp_path / "out.safetensors", "diffusers")
    parts = {c: copy.deepcopy(m).float() for c, m in parts_of("sd15").items()}
    pipe = pipeline("sd15", parts=parts)
    pipe.load_lora_weights(load_file(tmp_path / "out.safetensors"))
    file.expected = {"text_encoder": {path: file.expected["text_encoder"][path]}}
    check_layers(parts["text_encoder"], file, "sd15", "text_encoder")


def test_a_bias_beside_a_lora(bases, tmp_path):
    """PEFT's ``lora_B.bias``, which Flux' control LoRAs have."""
    file = community("flux", "lora", "lycoris")
    ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("flux"))
    path = "transformer_blocks.0.attn.to_out.0"
    shift = torch.randn(len(parts_of("flux")["transformer"].get_submodule(path).bias))
    ckpt.components["transformer"][path].append(Entry("FULL", {"diff_b": shift}))
    file.expected["transformer"][path] = (file.expected["transformer"][path][0], shift.double())
    write_checkpoint(ckpt, tmp_path / "out.safetensors", "diffusers")
    parts = {c: copy.deepcopy(m).float() for c, m in parts_of("flux").items()}
    pipeline("flux", parts=parts).load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    check_layers(parts["transformer"], file, "flux", "transformer")
    ckpt.components["transformer"][path] = [Entry("FULL", {"diff_b": shift})]
    with pytest.raises(CheckpointError, match="FULL has no place"):
        write_checkpoint(ckpt, tmp_path / "no.safetensors", "diffusers")
    write_checkpoint(ckpt, tmp_path / "yes.safetensors", "kohya")
    assert "lora_unet_double_blocks_0_img_attn_proj.diff_b" in load_file(tmp_path / "yes.safetensors")


def test_kohya_files_of_lora_load_in_diffusers(bases, tmp_path):
    """diffusers converts kohya's names itself."""
    file = community("sd15", "lora", "lycoris")
    ckpt = read_checkpoint(file.write(tmp_path / "in"), bases("sd15"))
    kept = {p: e for p, e in ckpt.components["unet"].items() if "attn" in p}
    ckpt.components = {"unet": kept}
    file.expected = {"unet": {p: file.expected["unet"][p] for p in kept}}
    write_checkpoint(ckpt, tmp_path / "out.safetensors", "kohya")
    assert all(k.startswith("lora_unet_") for k in load_file(tmp_path / "out.safetensors"))
    parts = {c: copy.deepcopy(m).float() for c, m in parts_of("sd15").items()}
    pipeline("sd15", parts=parts).load_lora_weights(str(tmp_path), weight_name="out.safetensors")
    check_layers(parts["unet"], file, "sd15", "unet")


# --- ComfyUI, by its formulas as they were read from its sources: what rank an alpha is divided by, and how factors multiply
def comfyui_weight(t: dict[str, Tensor], stem: str, weight: Tensor) -> Tensor:
    def get(name: str) -> Tensor | None:
        return t[f"{stem}.{name}"].double() if f"{stem}.{name}" in t else None

    alpha = get("alpha")
    if (up := get("lora_up.weight")) is not None:
        down, mid = get("lora_down.weight"), get("lora_mid.weight")
        scale = alpha / down.shape[0]
        if mid is not None:
            return weight + scale * torch.einsum("op,pqkl,qi->oikl", up.flatten(1), mid, down.flatten(1))
        return weight + scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if (w1b := get("hada_w1_b")) is not None:
        halves = []
        for half in "12":
            a, b, core = get(f"hada_w{half}_a"), get(f"hada_w{half}_b"), get(f"hada_t{half}")
            halves.append(a @ b if core is None else torch.einsum("ijkl,jr,ip->prkl", core, b, a))
        return weight + alpha / w1b.shape[0] * (halves[0] * halves[1]).reshape(weight.shape)
    if any(k.startswith(f"{stem}.lokr_") for k in t):
        dim, halves = None, []
        for half in "12":
            full = get(f"lokr_w{half}")
            if full is None:
                dim = get(f"lokr_w{half}_b").shape[0]
                full = get(f"lokr_w{half}_a") @ get(f"lokr_w{half}_b")
            halves.append(full)
        w1, w2 = halves
        w1 = w1[..., None, None] if w2.dim() == 4 else w1
        return weight + (1.0 if dim is None else alpha / dim) * torch.kron(w1, w2).reshape(weight.shape)
    if (a1 := get("a1.weight")) is not None:
        a2, b1, b2 = get("a2.weight"), get("b1.weight"), get("b2.weight")
        through = torch.einsum("oi...,ir,rj->oj...", weight, a1.flatten(1), a2.flatten(1))
        return weight + alpha / a2.shape[0] * (through + (b1.flatten(1) @ b2.flatten(1)).reshape(weight.shape))
    return weight + get("diff")


@pytest.mark.parametrize(
    ("family", "algorithm"),
    [
        (f, a) for f in ("sdxl", "flux") for a in COMFYUI if f == "sdxl" or not a.endswith(("tucker", "cp"))
    ],  # Flux has no kernels
)
def test_comfyui_computes_the_same(family, algorithm, bases, tmp_path):
    """On the fused weights and under the original code's names, from a table that is not the library's."""
    source = "lycoris" if family == "flux" and algorithm in ("lora", "loha", "miss") else ""
    if algorithm == "miss":
        source = "peft"
    file, component, _, _, out = written(family, algorithm, "comfyui", bases, tmp_path, source)
    tensors = load_file(out)
    layers = weights_of(parts_of(family)[component])
    seen = set()
    for name, shares in native_names(family, parts_of(family)[component]).items():
        present = [s for s in shares if s.path in file.expected[component]]
        if not present:
            continue
        weight, _ = base_weight(layers, shares)
        got = comfyui_weight(tensors, f"diffusion_model.{name}", weight) - weight
        for share, part in zip(shares, spread(got, shares)):
            want = file.expected[component].get(share.path, (torch.zeros_like(part), None))[0]
            assert float((part - want).norm()) < 1e-6 * float(got.norm()), share.path
            seen.add(share.path)
    assert seen >= set(file.expected[component])
