"""AdapterModel: a model with adapters, with the methods PEFT users know. Its memory is on the base model (`bookkeeping`)."""

from __future__ import annotations

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .adapters.base import LARGEST_STRENGTH
from .adapters.config import AdapterConfig
from .bookkeeping import AdapterState, adapted_layers, check_new_name, saved_copies, set_active, state_of
from .errors import AdapterError, ConfigError
from .injection import InjectReport, attach, detach, inject_adapter, save_base_model, unwrap
from .merging import Requantize, allow_rounding, mergeable_layers, report_losses, weighted_sum
from .per_sample import samples_with
from .wrapper import TransparentWrapper


class AdapterModel(TransparentWrapper):
    """A base model with named adapters. Attributes it lacks are the base model's, and so is its forward signature.

    Args:
        model: the base model; it is changed in place. One that already carries adapters keeps them.
        config: adapter to add and make active; None only wraps a model that already has adapters.
        adapter_name: its name.
        low_cpu_mem_usage: create the factors on the meta device, to be filled by a file.
        autocast_adapter_dtype: float32 factors on half-precision bases.

    Raises:
        AdapterError: wrapping a wrapper, a taken name, or whatever `inject_adapter` refuses.
    """

    config_class: type[AdapterConfig] | None = None

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig | None = None,
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        if isinstance(model, AdapterModel):
            raise AdapterError(f"{type(model).__name__} is already a wrapper; use its add_adapter(), or wrap get_base_model()")
        if self.config_class is not None and config is not None and not isinstance(config, self.config_class):
            raise ConfigError(
                f"{type(self).__name__} takes a {self.config_class.__name__}, got {type(config).__name__}; "
                "get_peft_model chooses the class from the config"
            )
        if config is None and state_of(model) is None:
            raise ConfigError(f"{type(model).__name__} has no adapters yet; pass a config")
        super().__init__(model)
        self.inject_report: InjectReport | None = None
        if config is not None:
            self.inject_report = inject_adapter(model, config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)

    @property
    def base_model(self) -> AdapterModel:
        """This object; PEFT's ``model.base_model.model`` reaches the base model."""
        return self

    def get_base_model(self) -> nn.Module:
        """The base model (with the adapted layers inside)."""
        return self.model

    def _invoke(self, *args: Any, adapter_names: Sequence[str | Sequence[str] | None] | None = None, **kwargs: Any) -> Any:
        """Run the base model with its adapters.

        Args:
            *args: of the base model.
            adapter_names: an entry for every sample of the batch: an adapter's name, several, or None (also ``"__base__"``) for
                the base model alone; without it all samples run with the active adapters.
            **kwargs: of the base model.

        Raises:
            AdapterError: as `per_sample.samples_with`; or activation checkpointing, which would run blocks again without it.
        """
        if adapter_names is None:
            return self.model(*args, **kwargs)
        if torch.is_grad_enabled() and any(getattr(m, "gradient_checkpointing", False) for m in self.model.modules()):
            raise AdapterError(
                "adapter_names with gradient checkpointing: backward would run the blocks again without them. Turn "
                "checkpointing off (disable_gradient_checkpointing), or call the model under torch.no_grad()"
            )
        with samples_with([self.model], adapter_names):
            return self.model(*args, **kwargs)

    # --- bookkeeping -------------------------------------------------------------------------------------------------
    @property
    def _state(self) -> AdapterState:
        return state_of(self.model) or AdapterState()

    @property
    def peft_config(self) -> dict[str, AdapterConfig]:
        """Config of every adapter by name."""
        return self._state.configs

    @property
    def active_adapters(self) -> list[str]:
        """Names of the active adapters."""
        return list(self._state.active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, a list when there are several."""
        active = self.active_adapters
        return active[0] if len(active) == 1 else active

    def add_adapter(
        self,
        adapter_name: str,
        config: AdapterConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> InjectReport:
        """Add an adapter of any algorithm; the active ones stay as they are.

        Raises:
            AdapterError: as `inject_adapter`, before anything has changed.
        """
        active = self.active_adapters
        report = inject_adapter(self.model, config, adapter_name, low_cpu_mem_usage, autocast_adapter_dtype)
        set_active(self.model, active or [adapter_name])
        return report

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make one adapter, or several at once, active; the others are frozen and off. Merged ones are unmerged first.

        Raises:
            AdapterError: an unknown name.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._known(names)
        if self.merged_adapters:
            warnings.warn(f"{self.merged_adapters} are merged; they are taken out before the active set changes", stacklevel=2)
            self.unmerge_adapter()
        set_active(self.model, names, inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; layers without adapters become the base layers again.

        Raises:
            AdapterError: an unknown name.
        """
        self._known([adapter_name])
        detach(self.model, adapter_name)

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Multiply an adapter's trained strength: 1 is as trained, 0 exactly the base. Merged adapters are re-merged.

        Biases of the base trained with it (``bias="all"``) and whole modules (``modules_to_save``) have no strength: they stay
        as they are until another adapter is set, or adapters are disabled.

        Raises:
            AdapterError: an unknown name or a scale that is not a finite number.
        """
        self._known([adapter_name])
        if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) <= LARGEST_STRENGTH:
            raise AdapterError(f"scale of {adapter_name!r} is {scale!r}; expected a finite number")
        for _, layer in adapted_layers(self.model):
            if adapter_name in layer.adapters:
                layer.adapter(adapter_name).set_strength(scale)
                if adapter_name in layer.merged:
                    layer.merge(layer.merged)

    @contextlib.contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Inside, the model is exactly the base model; merged adapters are taken out and merged again afterwards."""
        if not any(layer.enabled for _, layer in adapted_layers(self.model)):
            yield  # already off: leaving does not turn them on
            return
        self.disable_adapter_layers()
        try:
            yield
        finally:
            self.enable_adapter_layers()

    def disable_adapter_layers(self) -> None:
        """Run the base model alone until `enable_adapter_layers`."""
        for _, layer in adapted_layers(self.model):
            if layer.enabled:
                layer.suspend()
        self._enable_saved(False)

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        for _, layer in adapted_layers(self.model):
            if not layer.enabled:
                layer.resume()
        self._enable_saved(True)

    def _enable_saved(self, enabled: bool) -> None:
        for _, module in saved_copies(self.model):
            module.enabled = enabled
        biases = self._state.biases
        if biases is not None:
            biases.use(self.model, trained=enabled and biases.owner in self.active_adapters)

    # --- merging -----------------------------------------------------------------------------------------------------
    def merge_adapter(
        self,
        adapter_names: Sequence[str] | str | None = None,
        safe_merge: bool = False,
        requantize: Requantize = False,
    ) -> None:
        """Write adapters (default: the active ones) into the base weights, keeping the originals in host memory.

        They stay in the weights until `unmerge_adapter` or `set_adapter`.

        Args:
            adapter_names: which; those that are merged already stay.
            safe_merge: refuse a result that is not finite.
            requantize: round quantized weights anew by their own scheme, which loses part of the change: True prints how much,
                a function is called with the `RequantizeReport`. False refuses them.

        Raises:
            AdapterError: unknown name, a quantized layer, or a non-finite result; no weight has been touched then.
        """
        names = self._names(adapter_names)
        layers = mergeable_layers(self.model, names, safe_merge, requantize)
        allow_rounding([layer for _, layer in layers], requantize)
        for _, layer in layers:
            layer.merge(dict.fromkeys((*layer.held, *names)))
        report_losses(requantize, layers)

    def unmerge_adapter(self) -> None:
        """Put the original weights back, bit for bit."""
        for _, layer in adapted_layers(self.model):
            layer.unmerge()

    @property
    def merged_adapters(self) -> list[str]:
        """Names of the adapters merged somewhere."""
        return list(dict.fromkeys(n for _, layer in adapted_layers(self.model) for n in layer.merged))

    @property
    def snapshot_bytes(self) -> int:
        """Host memory that holds original weights while merged, in bytes."""
        return sum(layer.snapshot.nbytes for _, layer in adapted_layers(self.model) if layer.snapshot)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | str | None = None,
        requantize: Requantize = False,
    ) -> nn.Module:
        """Write adapters into the base weights for good and return the base model without adapters.

        Args:
            progressbar: show progress.
            safe_merge: refuse a result that is not finite.
            adapter_names: which; default the active ones. Adapters merged already stay merged.
            requantize: as in `merge_adapter`.
        """
        names = self._names(adapter_names)
        layers = mergeable_layers(self.model, names, safe_merge, requantize)
        allow_rounding([layer for _, layer in layers], requantize)
        with _progress(len(layers), progressbar) as advance:
            for _, layer in layers:
                layer.merge_for_good(dict.fromkeys((*layer.merged, *names)))
                advance()
        report_losses(requantize, layers)
        unwrap(self.model, keep_saved=True)
        return self.model

    def unload(self) -> nn.Module:
        """Remove every adapter and return the base model as it was, merged adapters taken out."""
        self.unmerge_adapter()
        unwrap(self.model)
        return self.model

    # --- combining ---------------------------------------------------------------------------------------------------
    def add_weighted_adapter(self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> InjectReport:
        """Add the exact weighted sum of adapters, of any algorithms and ranks, as a new (inactive) adapter.

        Weights multiply each adapter's strength as trained. The sum holds copies: the originals may be deleted.

        Raises:
            AdapterError: unknown or repeated names, as many weights as adapters missing, non-finite weights.
        """
        self._known(adapters)
        check_new_name(self.model, adapter_name)
        if not adapters or len(adapters) != len(weights) or len(set(adapters)) != len(adapters):
            raise AdapterError(
                f"expected one weight for each of several different adapters, got {list(adapters)} and {list(weights)}"
            )
        if not all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights):
            raise AdapterError(f"weights are {list(weights)}; expected finite numbers")
        config, layers = weighted_sum(self.model, adapters, weights)
        active = self.active_adapters
        attach(self.model, config, adapter_name, layers)
        set_active(self.model, active)
        total = sum(p.numel() for p in self.model.parameters())
        own_size = sum(p.numel() for _, a in layers.values() for p in a.parameters())
        return InjectReport(adapter_name, config.peft_name, list(layers), [], own_size, total)

    # --- counting ----------------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Trainable and all parameters, the latter with the adapters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the counts as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    # --- files -------------------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        *,
        compact: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
        save_peft_format: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        **kwargs: Any,
    ) -> None:
        """Save adapters in PEFT's directory format: the one called "default" in the directory, others in sub-directories.

        Args:
            save_directory: is created.
            safe_serialization: must be True; pickles are not written.
            selected_adapters: names; all by default.
            compact: code SHiRA's indices (a quarter of the size; only this library reads it).
            state_dict: values to write instead of the live ones, under the live names (trainers gather sharded weights so).
            save_peft_format: False saves the *base model* under its own names instead. That is how a diffusers pipeline
                calls this method, and `variant` and `max_shard_size` belong to it.
        """
        from .files import save_adapter_directory

        if not save_peft_format:
            given = {"safe_serialization": safe_serialization, "variant": variant, "max_shard_size": max_shard_size}
            save_base_model(self.model, save_directory, **{k: v for k, v in given.items() if v is not None})
            return
        if not safe_serialization:
            raise AdapterError("safe_serialization=False would write a pickle; only safetensors is written")
        names = self._names(selected_adapters or list(self.peft_config))
        for name in names:
            folder = os.fspath(save_directory) if name == "default" else os.path.join(save_directory, name)
            save_adapter_directory(self.model, name, folder, compact=compact, state_dict=state_dict)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: AdapterConfig | None = None,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        **hub: Any,
    ) -> AdapterModel:
        """Load an adapter directory, local or from the Hugging Face Hub, written by this library or by PEFT.

        Args:
            model: base model, changed in place only when everything fits.
            model_id: directory or repository.
            adapter_name: must be new.
            is_trainable: the factors are float32 (on half-precision bases) and take gradients; otherwise they compute in the
                base's dtype, and the file's values are kept in host memory for merging and saving.
            config: overrides the directory's own config.
            low_cpu_mem_usage: kept for PEFT's sake; factors are always taken over from the file without an extra copy.
            autocast_adapter_dtype: see `is_trainable`.
            **hub: ``subfolder``, ``revision``, ``token``, ``cache_dir`` …

        Raises:
            CheckpointError: the files do not fit the model or are damaged; OSError: they cannot be opened.
        """
        from .files import load_adapter_directory

        if isinstance(model, AdapterModel):
            raise AdapterError(f"{type(model).__name__} is already a wrapper; use its load_adapter()")
        loaded = load_adapter_directory(model, model_id, adapter_name, is_trainable, config, autocast_adapter_dtype, **hub)
        wrapper = class_for(loaded.peft_name)
        return wrapper(model)

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **hub: Any,
    ) -> None:
        """Load another adapter directory; the active adapters stay active. Arguments as in `from_pretrained`."""
        from .files import load_adapter_directory

        active = self.active_adapters
        load_adapter_directory(self.model, model_id, adapter_name, is_trainable, None, autocast_adapter_dtype, **hub)
        set_active(self.model, active or [adapter_name], inference_mode=not active and not is_trainable)

    # --- helpers -----------------------------------------------------------------------------------------------------
    def _names(self, names: Sequence[str] | str | None) -> list[str]:
        chosen = self.active_adapters if names is None else [names] if isinstance(names, str) else list(names)
        self._known(chosen)
        return chosen

    def _known(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.peft_config:
                raise AdapterError(f"there is no adapter {name!r}; adapters: {sorted(self.peft_config)}")


def class_for(peft_name: str) -> type[AdapterModel]:
    """The class of models that begin with an algorithm; the common one for algorithms without a class of their own."""
    named = (c for c in AdapterModel.__subclasses__() if c.config_class and c.config_class.peft_name == peft_name)
    return next(named, AdapterModel)


@contextlib.contextmanager
def _progress(total: int, show: bool) -> Iterator[Any]:
    if not show:
        yield lambda: None
        return
    from rich.progress import Progress

    with Progress() as progress:
        task = progress.add_task("merging", total=total)
        yield lambda: progress.advance(task)
