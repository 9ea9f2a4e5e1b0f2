"""The ends of tensor names: which algorithm a tensor belongs to and which of its factors it is.

A name is the module's name followed by one of the known suffixes below; the longest that matches counts, since module names
contain dots, underscores or both.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Suffix(NamedTuple):
    """What the end of a tensor's name says.

    Attributes:
        group: algorithm whose decoder takes the tensor; "shared" for what several algorithms use.
        role: factor, in this package's spelling.
        spelling: "peft", "kohya" ... where several projects spell the same factor, "" elsewhere.
    """

    group: str
    role: str
    spelling: str = ""


def _lora(up: str, down: str, spelling: str) -> dict[str, Suffix]:
    return {up: Suffix("lora", "up", spelling), down: Suffix("lora", "down", spelling)}


def _plain(group: str, names: str, tail: str = "") -> dict[str, Suffix]:
    return {f".{name}{tail}": Suffix(group, name) for name in names.split()}


SUFFIXES: dict[str, Suffix] = {
    # LoRA and LoCon
    **_lora(".lora_up.weight", ".lora_down.weight", "kohya"),
    **_lora(".lora_B.weight", ".lora_A.weight", "peft"),
    **_lora(".lora_B", ".lora_A", "peft"),
    **_lora(".lora.up.weight", ".lora.down.weight", "diffusers"),
    **_lora(".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight", "diffusers"),
    **_lora("_lora.up.weight", "_lora.down.weight", "processor"),
    **_lora(".up.weight", ".down.weight", "xlabs"),
    ".lora_mid.weight": Suffix("lora", "mid"),
    ".lora_B.bias": Suffix("lora", "bias"),
    ".lora_up.bias": Suffix("lora", "bias"),
    # what LyCORIS' extraction leaves over, and what A1111 reads beside LoRA
    **_plain("sparse", "bias_indices bias_values bias_size"),
    ".bias": Suffix("dense", "bias"),
    # LoHa, LoKr, GLoRA, (IA)^3
    **_plain("loha", "hada_w1_a hada_w1_b hada_w2_a hada_w2_b hada_t1 hada_t2"),
    **_plain("lokr", "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"),
    **_plain("glora", "a1 a2 b1 b2 bm", ".weight"),
    **{f".glora_{name}": Suffix("glora", name) for name in ("a1", "a2", "b1", "b2", "bm")},
    ".weight": Suffix("ia3", "weight"),
    ".on_input": Suffix("ia3", "on_input"),
    ".ia3_weight": Suffix("ia3", "ia3_weight"),
    # dense changes
    **_plain("full", "diff diff_b"),
    **_plain("norm", "w_norm b_norm"),
    # rotations
    **_plain("oft", "oft_blocks rescale"),
    ".oft_R.weight": Suffix("peft_oft", "oft_R"),
    ".oft_R": Suffix("peft_oft", "oft_R"),
    ".oft_R.scaled_oft": Suffix("peft_oft", "scaled"),
    # T-LoRA, MiSS, SHiRA
    **_plain("tlora", "q_layer p_layer", ".weight"),
    **_plain("tlora", "q_layer p_layer lambda_layer"),
    **_plain("miss", "miss_block"),
    **_plain("shira", "shira_weight shira_indices shira_gaps"),
    # used by several algorithms
    **_plain("shared", "alpha scale dora_scale"),
    ".lora_magnitude_vector.weight": Suffix("shared", "magnitude"),
    ".lora_magnitude_vector": Suffix("shared", "magnitude"),
    ".magnitude": Suffix("shared", "magnitude"),
}

#: factors of known meaning that are not read -> why
REFUSED: dict[str, str] = {
    ".reshape_weight": "the layer's weight would have to be padded to another shape, which only ComfyUI's own models support",
    ".set_weight": "it replaces the layer's weight instead of changing it; merge it into the base model",
    ".oft_diag": "very old LyCORIS files store the rotation itself, which A1111 alone applies; merge it there",
    ".lokr_t1": "no trainer writes a core for the first half of a LoKr, and no reader applies it",
    ".lora_embedding_A": "adapters on embeddings are not supported",
    ".lora_embedding_B": "adapters on embeddings are not supported",
    ".lora_A.bias": "LoRA has no bias on its first half",
    ".ia3_l": "PEFT's (IA)^3 multiplies the bias as well; merge it with PEFT",
    ".boft_R": "PEFT's BOFT is another algorithm than LyCORIS'; merge it with PEFT",
    ".boft_s": "PEFT's BOFT is another algorithm than LyCORIS'; merge it with PEFT",
    ".bone_block": "Bone was replaced by MiSS; convert the adapter with PEFT",
    ".vera_lambda_b": "VeRA is not supported",
    ".vera_lambda_d": "VeRA is not supported",
}  # fmt: skip

#: tensors that are no adapter and do no harm
_HARMLESS = re.compile(r"^bundle_emb\.|(^|\.)_aux\.|(^|[._])position_ids$")
#: factors PEFT stores below the adapter's name, which its own files leave out and others do not
_NAMED = re.compile(
    r"\.(lora_A|lora_B|lora_magnitude_vector|oft_R|miss_block|shira_\w+|hada_\w+|lokr_\w+|dora_scale)"
    r"\.(?!weight$|bias$|scaled_oft$)([^.]+)(?=$|\.weight$|\.bias$|\.scaled_oft$)"
)
#: XLabs' processors: both streams of a block share a module, so the stem keeps the name of the factor pair
_XLABS = re.compile(r"(?P<stem>.+\.processor\.(?:qkv|proj)_lora[12]?)(?P<suffix>\.(?:up|down)\.weight)")
_CUTS = re.compile(r"\.|_lora(?=\.)")
_PART = re.compile(r"(?P<key>.+\.oft_blocks)\.(?P<part>\d{1,3})")
#: no suffix is longer, adapter's name included
_TAIL = 192


class Split(NamedTuple):
    """A tensor's name, taken apart.

    Attributes:
        stem: the module's name with its prefix.
        suffix: as in the table, "" when none matches.
        adapter: PEFT's name of the adapter, "" without one.
        part: number of the row block for lists of factors (sd-scripts' OFT on fused projections), None elsewhere.
    """

    stem: str
    suffix: str
    adapter: str = ""
    part: int | None = None


def split_key(key: str) -> Split:
    """Take a tensor's name apart at the longest known suffix; no suffix when there is none."""
    found = _split(key)
    # ".weight" is also the end of names that hold the name of PEFT's adapter
    if found.suffix in ("", ".weight", ".bias"):
        head, tail = key[:-_TAIL], key[-_TAIL:]
        if named := _NAMED.search(tail):
            return _split(head + _NAMED.sub(r".\1", tail))._replace(adapter=named[2])
        if part := _PART.fullmatch(key):
            return _split(part["key"])._replace(part=int(part["part"]))
    return found


def _split(key: str) -> Split:
    if xlabs := _XLABS.fullmatch(key):
        return Split(xlabs["stem"], xlabs["suffix"])
    # the leftmost match is the longest; ".up.weight" alone belongs to the processors above
    start = max(1, len(key) - _TAIL)
    for cut in (m.start() for m in _CUTS.finditer(key, start)):
        suffix = key[cut:]
        if (suffix in SUFFIXES and SUFFIXES[suffix].spelling != "xlabs") or suffix in REFUSED:
            return Split(key[:cut], suffix)
    return Split(key, "")


def is_harmless(key: str) -> bool:
    """Whether a tensor is no adapter and may be ignored: bundled embeddings, position ids, bookkeeping."""
    return _HARMLESS.search(key) is not None
