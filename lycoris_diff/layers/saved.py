"""SavedModule: a module trained in full, one copy an adapter, beside its original (``modules_to_save``)."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn


class SavedModule(nn.Module):
    """Runs the copy of the active adapter, or the original.

    Attributes:
        original_module: untouched.
        modules_to_save: adapter name -> its trained copy.
        active: name of the adapter whose copy runs, None for the original.
        enabled: False runs the original.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original_module = original
        self.modules_to_save = nn.ModuleDict()
        self.active: str | None = None
        self.enabled = True
        self.training = original.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original_module", "modules_to_save"):
                raise
            return getattr(self.current, name)

    def add(self, adapter_name: str) -> None:
        """Add a copy of the original for an adapter, trained in the original's dtype."""
        self.modules_to_save[adapter_name] = copy.deepcopy(self.original_module)

    @property
    def current(self) -> nn.Module:
        """The module that runs."""
        if self.enabled and self.active is not None and self.active in self.modules_to_save:
            return self.modules_to_save[self.active]
        return self.original_module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Whatever the module in use returns."""
        return self.current(*args, **kwargs)
