"""Diffusers' own method names over this library's functions, for pipeline classes of one's own."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..errors import AdapterError
from ..files import DIFFUSERS_NAME
from ..merging import Requantize
from .beside_peft import all_aside, has_peft
from .components import adapter_names, layers_of, models_of
from .fusing import checked_scale, fuse_adapters, fused_adapters, unfuse_adapters
from .hotswap import HotswapReport, prepare_hotswap, prepared_adapters
from .loading import active_adapters, delete_adapter, disable_adapters, enable_adapters, load_adapter, unload_adapters
from .report import LoadReport
from .saving import save_adapter
from .weights import Weight, set_adapters

#: arguments of pipelines' calls that carry ``{"scale": …}``
_SCALE_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
#: arguments of diffusers' ``load_lora_weights`` that say how PEFT's layers are made
_WITHOUT_MEANING = ("low_cpu_mem_usage", "use_safetensors", "return_lora_metadata", "metadata", "network_alphas")


class LycorisLoaderMixin:
    """``load_lora_weights`` and its siblings for every file this library reads; put it before the pipeline's class.

        class MyPipeline(LycorisLoaderMixin, StableDiffusionPipeline): ...

    The methods mean what they mean in diffusers, with these differences: a file that does not fit is refused (``strict=False``
    loads the rest), unfusing gives the original bits, and PEFT's own layers, if there are any, are served as well.
    """

    #: tells that the class looks after its adapters itself
    lycoris_adapters = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Have calls honour ``{"scale": …}`` as diffusers' do for PEFT's layers."""
        super().__init_subclass__(**kwargs)
        call = next((vars(c)["__call__"] for c in cls.__mro__ if "__call__" in vars(c)), None)
        if call is not None and not hasattr(call, "_scales_adapters"):
            cls.__call__ = _scaled_call(call)  # type: ignore[method-assign]

    # --- loading and saving --------------------------------------------------------------------------------------------
    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> LoadReport:
        """`load_adapter` under diffusers' name; without a name adapters are called ``default_0``, ``default_1`` ...

        ``hotswap=True`` exchanges the contents of an adapter that `enable_lora_hotswap` or `prepare_hotswap` made.

        Raises:
            AdapterError: as `load_adapter`.
        """
        given = {k: v for k, v in kwargs.items() if k not in _WITHOUT_MEANING and v is not None}
        prepared = prepared_adapters(self) if given.get("hotswap") else []
        name = adapter_name or (prepared[0] if prepared else self._free_name())
        return load_adapter(self, pretrained_model_name_or_path_or_dict, name, **given)

    def enable_lora_hotswap(self, target_rank: int = 128, check_compiled: str = "error", **kwargs: Any) -> HotswapReport:
        """`prepare_hotswap` for LoRA under diffusers' name: the adapter is called "hotswap", its rank at most `target_rank`.

        Args:
            target_rank: highest rank of the files to come.
            check_compiled: without meaning: room may be made for compiled models too, which compile once more.
            **kwargs: of `prepare_hotswap`.
        """
        return prepare_hotswap(self, {"lora": target_rank}, **kwargs)

    def save_lora_weights(
        self,
        save_directory: str | os.PathLike[str],
        adapter_name: str | None = None,
        weight_name: str = DIFFUSERS_NAME,
        format: str = "kohya",
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Any:
        """`save_adapter` into a directory; the only adapter by default.

        Raises:
            AdapterError: several adapters and no name.
        """
        names = list(adapter_names(models_of(self)))
        if adapter_name is None and len(names) != 1:
            raise AdapterError(f"which adapter? pass adapter_name, one of {names}")
        os.makedirs(save_directory, exist_ok=True)
        path = save_directory if format == "peft" else os.path.join(save_directory, weight_name)
        return save_adapter(self, path, adapter_name or names[0], format, dtype, metadata)

    def unload_lora_weights(self, **kwargs: Any) -> None:
        """Take every adapter off, PEFT's included."""
        unload_adapters(self)
        self._peft("unload_lora_weights", **kwargs)

    def delete_adapters(self, adapter_names: Sequence[str] | str) -> None:
        """Delete adapters by name."""
        own, foreign = self._sorted([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))
        if foreign:
            self._peft("delete_adapters", foreign)
        for name in own:
            delete_adapter(self, name)

    # --- weights -------------------------------------------------------------------------------------------------------
    def set_adapters(
        self, adapter_names: Sequence[str] | str, adapter_weights: Weight | Sequence[Weight] | None = None
    ) -> None:
        """Use these adapters with these weights. As in diffusers, what a dict of blocks leaves out counts as 1.

        Raises:
            AdapterError: an unknown name or block, or another number of weights than of names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, (list, tuple)) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise AdapterError(f"{len(names)} adapters {names} and {len(weights)} weights; expected one for each")
        table = dict(zip(names, weights))
        own, foreign = self._sorted(names)
        set_adapters(self, {n: _all_else_one(table[n]) for n in own})
        if foreign:
            self._peft("set_adapters", foreign, [table[n] for n in foreign])

    def get_active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return [*active_adapters(self), *(self._peft("get_active_adapters") or [])]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Names of all adapters by component."""
        found: dict[str, list[str]] = {}
        for name, components in adapter_names(models_of(self)).items():
            for component in components:
                found.setdefault(component, []).append(name)
        for component, names in (self._peft("get_list_adapters") or {}).items():
            found.setdefault(component, []).extend(names)
        return found

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        enable_adapters(self)
        self._peft("enable_lora")

    def disable_lora(self) -> None:
        """Run the base model alone."""
        disable_adapters(self)
        self._peft("disable_lora")

    # --- fusing --------------------------------------------------------------------------------------------------------
    def fuse_lora(
        self,
        components: Iterable[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = True,
        adapter_names: Sequence[str] | str | None = None,
        requantize: Requantize = False,
        **kwargs: Any,
    ) -> None:
        """`fuse_adapters`; a result that is not finite is refused by default, and so is rounding quantized weights anew."""
        chosen = None if components is None else [c for c in components if c in models_of(self)]
        own, foreign = self._sorted([adapter_names] if isinstance(adapter_names, str) else list(adapter_names or []))
        if own or (adapter_names is None and active_adapters(self)):
            fuse_adapters(self, own or None, safe_fusing, chosen, lora_scale, requantize)
        if foreign or adapter_names is None:
            parts = chosen or list(models_of(self))
            self._peft("fuse_lora", parts, lora_scale, safe_fusing, foreign or None, **kwargs)

    def unfuse_lora(self, components: Iterable[str] | None = None, **kwargs: Any) -> None:
        """`unfuse_adapters`: the original weights, bit for bit."""
        chosen = None if components is None else [c for c in components if c in models_of(self)]
        unfuse_adapters(self, chosen)
        self._peft("unfuse_lora", chosen or list(models_of(self)), **kwargs)

    @property
    def fused_loras(self) -> set[str]:
        """Names of the adapters in the weights."""
        return {*fused_adapters(self), *getattr(self, "_merged_adapters", ())}

    @property
    def num_fused_loras(self) -> int:
        """How many adapters are in the weights."""
        return len(self.fused_loras)

    # --- files of the pipeline -----------------------------------------------------------------------------------------
    def to_json_string(self) -> str:
        """The pipeline's config; it names diffusers' own class, so that a saved pipeline loads everywhere."""
        text: str = super().to_json_string()  # type: ignore[misc]
        own, stock = type(self).__name__, _stock_class(type(self))
        return text.replace(f'"_class_name": "{own}"', f'"_class_name": "{stock}"')

    # --- helpers -------------------------------------------------------------------------------------------------------
    def _peft(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Diffusers' own method, with our layers aside, where PEFT has put any layers."""
        models = models_of(self)
        original = getattr(super(), method, None)
        if original is None or not has_peft(models):
            return None
        with all_aside(models):
            return original(*args, **kwargs)

    def _sorted(self, names: list[str]) -> tuple[list[str], list[str]]:
        """Names of ours, and names of PEFT's.

        Raises:
            AdapterError: a name nobody knows.
        """
        models = models_of(self)
        own = adapter_names(models)
        peft = {n for m in models.values() for n in getattr(m, "peft_config", None) or ()}
        for name in names:
            if name not in own and name not in peft:
                raise AdapterError(f"there is no adapter {name!r}; adapters: {sorted({*own, *peft})}")
        return [n for n in names if n in own], [n for n in names if n not in own]

    def _free_name(self) -> str:
        models = models_of(self)
        taken = {*adapter_names(models), *(n for m in models.values() for n in getattr(m, "peft_config", None) or ())}
        return next(n for i in range(len(taken) + 1) if (n := f"default_{i}") not in taken)


def _all_else_one(weight: Weight) -> Weight:
    if weight is None:
        return 1.0
    if not isinstance(weight, Mapping):
        return weight
    blocks = {k: {"*": 1.0, **v} if isinstance(v, Mapping) else v for k, v in weight.items() if v is not None}
    return {"*": 1.0, **blocks}


def _stock_class(cls: type) -> str:
    return next(c.__name__ for c in cls.__mro__ if c.__module__.startswith("diffusers."))


def _scaled_call(call: Any) -> Any:
    """A pipeline's call that multiplies the strengths by ``{"scale": s}`` for as long as it runs."""

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = (kwargs.get(name) for name in _SCALE_ARGUMENTS)
        scale = next((k["scale"] for k in given if k and "scale" in k), 1.0)
        with nullcontext() if scale == 1.0 else _Scaled(self, scale):
            return call(self, *args, **kwargs)

    __call__._scales_adapters = True  # type: ignore[attr-defined]
    return __call__


class _Scaled:
    """Inside, every adapter that is not fused runs at ``scale`` times its weight.

    Raises:
        AdapterError: the scale is no finite number, or a product with a weight too large for one.
    """

    def __init__(self, pipe: Any, scale: float) -> None:
        layers = [layer for model in models_of(pipe).values() for layer in layers_of(model).values()]
        self.held = [(a, a.get_strength()) for m in layers for n, a in m.named_adapters() if n not in m.merged]
        self.scale = checked_scale(scale, [strength for _, strength in self.held])

    def __enter__(self) -> None:
        for adapter, strength in self.held:
            adapter.set_strength(strength * self.scale)

    def __exit__(self, *_: object) -> None:
        for adapter, strength in self.held:
            adapter.set_strength(strength)
