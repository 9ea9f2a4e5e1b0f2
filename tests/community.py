"""Community checkpoint files for tests: any algorithm under any naming scheme, with the change that they make to every weight.

`community_file` writes what the trainers of kohya, LyCORIS, PEFT, diffusers, OneTrainer and ai-toolkit write. The
expected changes are computed in float64 from the tensors' values, by formulas in `community_algorithms` and names in
`community_names`, never by the library under test.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from community_algorithms import Made, fits, make
from community_names import Share, diffusers_names, native_names, weights_of
from safetensors.torch import save_file
from torch import Tensor, nn

Expected = dict[str, dict[str, "tuple[Tensor | None, Tensor | None]"]]


@dataclass
class CommunityFile:
    """A file's content and what it must do.

    Attributes:
        tensors, metadata: of the safetensors file.
        expected: component -> module path -> changes of weight and bias in float64, None where there is none.
        config: content of ``adapter_config.json``; the checkpoint is a directory then.
        modules: number of modules under a name of their own.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)
    expected: Expected = field(default_factory=dict)
    config: dict[str, Any] | None = None
    modules: int = 0

    def write(self, path: Path) -> Path:
        """Write to ``path`` (without suffix); returns the file or directory."""
        tensors = {k: v.contiguous() for k, v in self.tensors.items()}
        if self.config is None:
            path = path.with_suffix(".safetensors")
            save_file(tensors, path, self.metadata or None)
            return path
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(self.config))
        return path

    def merged(self, other: CommunityFile) -> CommunityFile:
        """Both files' tensors in one; where both change a weight, the changes add up."""
        expected: Expected = {c: dict(m) for c, m in self.expected.items()}
        for component, modules in other.expected.items():
            for path, (dw, db) in modules.items():
                old = expected.setdefault(component, {}).get(path, (None, None))
                expected[component][path] = (_add(old[0], dw), _add(old[1], db))
        return CommunityFile({**self.tensors, **other.tensors}, {**self.metadata, **other.metadata}, expected, self.config)


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


# --- how a scheme spells tensor names; unlisted suffixes stay LyCORIS'

_PEFT_LORA = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "dora_scale": "lora_magnitude_vector"}
SPELLINGS: dict[str, dict[str, str]] = {
    "kohya": {},
    "peft": _PEFT_LORA,
    "peft-weight": {**_PEFT_LORA, "dora_scale": "lora_magnitude_vector.weight"},
    "ai-toolkit": {**_PEFT_LORA, "dora_scale": "magnitude"},
    "default": {"lora_down.weight": "lora_A.default.weight", "lora_up.weight": "lora_B.default.weight"},
    "bare": {"lora_down.weight": "lora_A", "lora_up.weight": "lora_B"},
    "lora-dot": {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"},
    "lora-linear": {"lora_down.weight": "lora_linear_layer.down.weight", "lora_up.weight": "lora_linear_layer.up.weight"},
}
_VECTORS = ("lora_magnitude_vector", "lora_magnitude_vector.weight", "magnitude")


@dataclass(frozen=True)
class Scheme:
    """One way of naming modules and tensors.

    Attributes:
        prefixes: component -> what stands before the module's name.
        names: "diffusers" or "native" for the denoiser.
        flat: dots of names are underscores.
        spelling: row of `SPELLINGS`.
        text_model: text encoders have the ``text_model`` segment that transformers 5 dropped, None for the model's own name.
        alpha: LoRA has an alpha tensor; without one its scale is 1. LoHa, LoKr and others keep theirs.
        families: denoisers that the scheme is used for, () for all.
        only: algorithms by prefix of their name, () for all.
        stem: changes the finished module name.
    """

    prefixes: Mapping[str, str]
    names: str = "diffusers"
    flat: bool = True
    spelling: str = "kohya"
    text_model: bool | None = True
    alpha: bool = True
    families: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    stem: Callable[[str], str] = str


def _processor(name: str) -> str:
    """``….attn1.to_q`` as old diffusers processors spell it; ``to_out.0`` is ``to_out``."""
    head, _, leaf = name.removesuffix(".0").rpartition(".")
    return f"{head}.processor.{leaf}_lora"


_UNET = {"unet": "lora_unet_"}
_KOHYA = {"unet": "lora_unet_", "transformer": "lora_unet_"}
_TE = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
_DOTTED = {c: f"{c}." for c in ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")}
_TRANSFORMERS = ("flux", "flux2", "sd3", "wan", "zimage", "qwen", "lumina2", "hunyuan")
_LORA = ("lora", "lora-no-alpha", "dylora")
_LYCORIS = (
    "kohya",
    "kohya-sd",
    "kohya-ldm",
    "kohya-diffusers",
    "kohya-no-text-model",
    "kohya-sd-no-text-model",
    "kohya-te3",
    "lycoris",
    "onetrainer-legacy",
    "diffusion_model",
    "diffusion_model-diffusers",
    "diffusers-alpha",
    "bare-native",
    "wan-fun",
)

SCHEMES: dict[str, Scheme] = {
    "kohya": Scheme({**_KOHYA, **_TE}, "native", families=("sdxl", *_TRANSFORMERS)),
    "kohya-sd": Scheme({**_UNET, "text_encoder": "lora_te_"}, families=("sd15",)),
    "kohya-ldm": Scheme({**_UNET, **_TE}, "native", families=("sd15",)),
    "kohya-diffusers": Scheme({**_KOHYA, **_TE}, families=("sdxl", "layers", *_TRANSFORMERS)),
    "kohya-te3": Scheme({**_KOHYA, "text_encoder": "lora_te1_", "text_encoder_2": "lora_te3_"}, "native", families=("flux",)),
    "kohya-no-text-model": Scheme({**_KOHYA, **_TE}, text_model=False, families=("sdxl",)),
    "kohya-sd-no-text-model": Scheme({**_UNET, "text_encoder": "lora_te_"}, text_model=False, families=("sd15",)),
    "kohya-oft": Scheme(
        {"unet": "oft_unet_", "transformer": "oft_unet_"}, "native", families=("sdxl", "flux"), only=("kohya-oft",)
    ),
    "lycoris": Scheme({"unet": "lycoris_", "transformer": "lycoris_"}),
    "onetrainer-legacy": Scheme(
        {"unet": "lora_unet_", "transformer": "lora_transformer_", **_TE},
        families=("sdxl", "flux", "flux2", "sd3", "zimage", "qwen", "hunyuan"),
    ),
    "onetrainer-half-dotted": Scheme({**_UNET, **_TE}, families=("sd15", "sdxl"), only=("loha", "loha-4d", "loha-dora-rows")),
    "diffusion_model": Scheme(
        {"transformer": "diffusion_model.", "unet": "diffusion_model."}, "native", flat=False, families=("sdxl", *_TRANSFORMERS)
    ),
    "diffusion_model-peft": Scheme(
        {"transformer": "diffusion_model."}, "native", False, "peft", alpha=False, families=_TRANSFORMERS, only=_LORA
    ),
    "diffusion_model-diffusers": Scheme({"transformer": "diffusion_model."}, flat=False, families=("zimage", "qwen")),
    "diffusion_model-bare": Scheme(
        {"transformer": "diffusion_model."}, "native", False, "bare", families=("flux", "wan"), only=_LORA
    ),
    "diffusers": Scheme(_DOTTED, flat=False, spelling="peft-weight", text_model=None, alpha=False),
    "diffusers-text-model": Scheme(_DOTTED, flat=False, spelling="peft", alpha=False, families=("sd15", "sdxl", "flux")),
    "diffusers-alpha": Scheme(_DOTTED, flat=False, text_model=None),
    "diffusers-default": Scheme(_DOTTED, flat=False, spelling="default", text_model=None, alpha=False, only=_LORA),
    "diffusers-old": Scheme(
        _DOTTED, flat=False, spelling="lora-dot", text_model=True, alpha=False, families=("sd15", "sdxl"), only=_LORA
    ),
    "processors": Scheme(
        _DOTTED, flat=False, spelling="kohya", alpha=False, families=("sd15", "sdxl"), only=_LORA, stem=_processor
    ),
    "text-encoder-old": Scheme(_DOTTED, flat=False, spelling="lora-linear", alpha=False, families=("sd15", "sdxl"), only=_LORA),
    "ai-toolkit": Scheme(
        _DOTTED, flat=False, spelling="ai-toolkit", text_model=None, alpha=False, only=(*_LORA, "lora-dora-rows")
    ),
    "bare": Scheme({"transformer": "", "unet": ""}, flat=False, spelling="peft", alpha=False),
    "bare-native": Scheme({"transformer": ""}, "native", flat=False, families=_TRANSFORMERS),
    "omi": Scheme(
        {**_DOTTED, "text_encoder": "clip_l.", "text_encoder_2": "t5."}, "native", False, families=("flux",), only=_LORA
    ),
    "wan-fun": Scheme({"transformer": "lora_unet__"}, "native", families=("wan",)),
    "peft": Scheme({}, flat=False, spelling="peft", text_model=None),
}
# Which schemes an algorithm appears in; algorithms by the beginning of their name, first match decides.
_PLACES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("kohya-oft",), ("kohya-oft",)),
    (("miss", "shira", "peft-oft"), ("peft",)),
    (
        ("sparse-bias", "tlora", "norm", "boft", "diag-oft"),
        ("kohya", "kohya-sd", "kohya-ldm", "kohya-diffusers", "lycoris", "diffusion_model"),
    ),
    (
        ("lora-dora-rows",),
        (*_LYCORIS, "diffusers", "diffusers-text-model", "ai-toolkit", "bare", "diffusion_model-peft", "peft"),
    ),
    (("lora-alpha-0",), tuple(name for name in _LYCORIS if name != "diffusers-alpha")),  # LyCORIS' convention, not diffusers'
    (("lora-tucker", "lora-dora", "lora-alpha", "glora", "ia3", "full"), _LYCORIS),
    (("loha", "lokr"), (*_LYCORIS, "onetrainer-half-dotted", "peft")),
    (("lora", "dylora"), tuple(name for name in SCHEMES if name != "kohya-oft")),
)


def schemes_for(family: str, algorithm: str) -> list[str]:
    """Schemes under which files of this algorithm and family exist."""
    places = (
        ("kohya", "kohya-sd", "kohya-diffusers")
        if algorithm == "peft-oft-scaled"
        else next(places for starts, places in _PLACES if algorithm.startswith(starts))
    )
    return [
        name
        for name, scheme in SCHEMES.items()
        if name in places
        and (not scheme.families or family in scheme.families)
        and (not scheme.only or algorithm in scheme.only)
    ]


def _text_name(path: str, with_text_model: bool | None) -> str:
    if with_text_model is None or path.startswith(("text_projection", "encoder.block", "shared")):
        return path
    bare = path.removeprefix("text_model.")
    return f"text_model.{bare}" if with_text_model else bare


def names_in(scheme: str, family: str, component: str, model: nn.Module) -> dict[str, list[Share]]:
    """Module names of a component under a scheme, with prefix, -> the diffusers modules they hold."""
    rules = SCHEMES[scheme]
    if component.startswith("text_encoder"):
        names = {_text_name(path, rules.text_model): shares for path, shares in diffusers_names(model).items()}
    elif rules.names == "native":
        names = native_names(family, model)
    else:
        names = diffusers_names(model)
    if scheme == "omi":
        names = _leaves(names)
    names = {rules.stem(name): shares for name, shares in names.items() if scheme != "processors" or _has_processor(name)}
    prefix = rules.prefixes.get(component, "")
    return {prefix + (name.replace(".", "_") if rules.flat else name): shares for name, shares in names.items()}


def _has_processor(name: str) -> bool:
    return name.split(".")[-1] in ("to_q", "to_k", "to_v") or name.endswith("to_out.0")


def _leaves(names: dict[str, list[Share]]) -> dict[str, list[Share]]:
    """OMI writes a fused weight as one leaf a part: ``….qkv.0``."""
    found = {}
    for name, shares in names.items():
        if len(shares) == 1:
            found[name] = shares
        else:
            found.update({f"{name}.{i}": [Share(s.path)] for i, s in enumerate(shares)})
    return found


def base_weight(layers: Mapping[str, nn.Module], shares: list[Share]) -> tuple[Tensor, Tensor | None]:
    """The native weight and bias in float64, put together from the diffusers modules."""

    def native(value: Tensor, swapped: bool) -> Tensor:
        value = value.detach().double()
        return torch.cat(value.chunk(2)[::-1]) if swapped else value

    first = layers[shares[0].path]
    weight = torch.cat([native(layers[s.path].weight, s.swapped) for s in shares])
    if getattr(first, "bias", None) is None:
        return weight, None
    return weight, torch.cat([native(layers[s.path].bias, s.swapped) for s in shares])


def spread(change: Tensor | None, shares: list[Share]) -> list[Tensor | None]:
    """The diffusers modules' parts of a native change."""
    if change is None:
        return [None] * len(shares)
    parts = []
    for share in shares:
        part = change if share.stop < 0 else change[share.start : share.stop]
        parts.append(torch.cat(part.chunk(2)[::-1]) if share.swapped else part)
    return parts


def _keys(stem: str, made: Made, scheme: str, algorithm: str) -> tuple[dict[str, Tensor], float]:
    """Tensors of one module under a scheme's spelling, and the scale that a reader must find."""
    rules = SCHEMES[scheme]
    if scheme == "processors":
        names = {"lora_down.weight": ".down.weight", "lora_up.weight": ".up.weight"}
        return {stem + names[k]: v for k, v in made.tensors.items()}, 1.0
    table = SPELLINGS[rules.spelling]
    plain_lora = "lora_down.weight" in made.tensors
    tensors = {}
    for suffix, value in made.tensors.items():
        suffix = table.get(suffix, suffix)
        # PEFT's vector is flat for linear layers and (1, out, 1, 1) for convolutions
        if suffix in _VECTORS and value.shape[0] == value.numel():
            value = value.reshape(-1) if value.ndim == 2 else value.transpose(0, 1)
        tensors[f"{stem}.{suffix}"] = value
    scale = made.scale
    if plain_lora and not rules.alpha:
        scale = 1.0
    elif made.alpha is not None:
        tensors[f"{stem}.alpha"] = made.alpha
    return tensors, scale


def community_file(
    family: str,
    scheme: str,
    algorithm: str,
    parts: Mapping[str, nn.Module],
    select: Callable[[str], bool] | Iterable[str] | None = None,
    dtype: torch.dtype = torch.float32,
    metadata: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> CommunityFile:
    """A file of one algorithm on all modules that it exists for.

    Args:
        family, parts: base model and its components (diffusers' attribute names).
        scheme, algorithm: rows of `SCHEMES` and `community_algorithms.ALGORITHMS`.
        select: which diffusers paths to change (a fused weight is written when any of its parts is chosen); all by default.
        dtype: of the floating tensors.
        limit: at most so many modules a component.
    """
    chosen = (lambda path: True) if select is None else select if callable(select) else set(select).__contains__
    found = CommunityFile({}, dict(metadata or {}))
    rules = SCHEMES[scheme]
    peft: tuple[Made, list[str]] | None = None
    for component, model in parts.items():
        if (
            component.startswith("text_encoder")
            if scheme == "peft" and len(parts) > 1
            else component not in rules.prefixes and scheme != "peft"
        ):
            continue
        layers, count = weights_of(model), 0
        for stem, shares in names_in(scheme, family, component, model).items():
            weight, bias = base_weight(layers, shares)
            if not any(chosen(s.path) for s in shares) or not fits(algorithm, tuple(weight.shape)) or count == limit:
                continue
            if algorithm == "full-bias" and bias is None:
                continue
            if algorithm == "ia3-in" and getattr(layers[shares[0].path], "groups", 1) > 1:
                continue
            made = make(algorithm, weight, zlib.crc32(shares[0].path.encode()), dtype)
            count += 1
            if scheme == "peft":
                if not made.peft_type:
                    return CommunityFile({})
                tensors, scale = _keys(f"base_model.model.{stem}", made, scheme, algorithm)
                tensors = {k: v for k, v in tensors.items() if not k.endswith(".alpha")}
                scale = 2.0 / max(made.rank, 1) if made.peft_type in ("LORA", "LOHA", "LOKR") else 1.0
                peft = (made, [*(peft[1] if peft else []), stem])
            elif scheme == "onetrainer-half-dotted":
                tensors, scale = _half_dotted(stem, shares[0].path, made)
            else:
                tensors, scale = _keys(stem, made, scheme, algorithm)
            found.tensors.update({k: _stored(v, dtype) for k, v in tensors.items()})
            change_w, change_b = made.change(weight, bias, scale)
            spread_w, spread_b = spread(change_w, shares), spread(change_b, shares)
            for share, dw, db in zip(shares, spread_w, spread_b):
                found.expected.setdefault(component, {})[share.path] = (dw, db)
            found.modules += 1
    if peft is not None:
        found.config = peft_config(*peft)
    return found


def _stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        value.to(dtype) if value.dtype == torch.float32 and value.numel() and value.isfinite().all() and value.ndim else value
    )


def _half_dotted(stem: str, path: str, made: Made) -> tuple[dict[str, Tensor], float]:
    """OneTrainer's former LoHa names: the last segment of the module's name keeps its dot, except for alpha."""
    head = stem[: len(stem) - len(path.replace(".", "_"))]
    # the rule of the writer: of "name.hada_w1_a" the last two dots survive
    *front, last = path.split(".")
    dotted = "_".join(front) + "." + last if front else last
    tensors = {f"{head}{dotted}.{k}": v for k, v in made.tensors.items() if k != "dora_scale"}
    if "dora_scale" in made.tensors:
        tensors[f"{stem}.dora_scale"] = made.tensors["dora_scale"]
    if made.alpha is not None:
        tensors[f"{stem}.alpha"] = made.alpha
    return tensors, made.scale


def peft_config(made: Made, targets: list[str]) -> dict[str, Any]:
    """``adapter_config.json`` of one algorithm; strength is alpha / r = 2 / r."""
    config: dict[str, Any] = {
        "peft_type": made.peft_type,
        "peft_version": "0.21.2",
        "r": max(made.rank, 1),
        "target_modules": targets,
        "inference_mode": True,
    }
    config |= {"LORA": {"lora_alpha": 2.0, "init_lora_weights": True}, "LOHA": {"alpha": 2.0}, "LOKR": {"alpha": 2.0}}.get(
        made.peft_type, {}
    )
    config |= made.peft_options
    if made.peft_type == "LOKR":
        config["init_weights"] = True
    return config
