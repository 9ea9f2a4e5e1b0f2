"""Prompts as the denoiser sees them: encoded once and kept on disk, or at every step where a text encoder is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .data.cache import DiskCache, key_of, model_digest
from .families.base import Family, Tensors

VERSION = 1  # of what is kept on disk


class Prompts:
    """Token ids of all prompts of a run and, where no text encoder is trained, what the encoders make of them.

    Args:
        family: of the pipeline whose tokenizers and text encoders are used.
        prompts: all of the run's.
        trained: whether a text encoder is trained.
        cache: where encoded prompts are kept, by the encoders' content and the token ids.
    """

    def __init__(self, family: Family, prompts: Sequence[str], trained: bool, cache: DiskCache) -> None:
        self.family = family
        self._tokens: dict[str, Tensors] = {prompt: family.tokenize([prompt]) for prompt in dict.fromkeys(prompts)}
        self._encoded: dict[str, Tensors] | None = None
        if not trained:
            encoders = {name: getattr(family.pipe, name) for name in family.text_encoders}
            digests = [model_digest(encoder) for encoder in encoders.values()]
            self._encoded = {}
            for prompt, tokens in self._tokens.items():
                ids = [str(ids.tolist()) for ids in tokens.values()]
                key = key_of("prompt", VERSION, family.title, *digests, *ids)
                kept = cache.get(key)
                if kept is None:
                    with torch.no_grad():
                        kept = {k: v.cpu() for k, v in self._encode(encoders, tokens).items()}
                    cache.put(key, kept)
                self._encoded[prompt] = kept

    def conditioning(self, encoders: Mapping[str, nn.Module], prompts: Sequence[str], device: torch.device) -> Tensors:
        """What the denoiser is told about `prompts`, `(prompts, ...)` by name; each different one is encoded once."""
        different = list(dict.fromkeys(prompts))
        rows = torch.tensor([different.index(prompt) for prompt in prompts], device=device)
        if self._encoded is not None:
            parts = [self._encoded[prompt] for prompt in different]
            encoded = {name: torch.cat([part[name] for part in parts]).to(device) for name in parts[0]}
        else:
            tokens = {
                name: torch.cat([self._tokens[prompt][name] for prompt in different]) for name in self.family.text_encoders
            }
            encoded = self._encode(encoders, tokens)
        return {name: values[rows] for name, values in encoded.items()}

    def _encode(self, encoders: Mapping[str, nn.Module], tokens: Tensors) -> Tensors:
        placed = {name: ids.to(getattr(self.family.pipe, name).device) for name, ids in tokens.items()}
        return self.family.encode(encoders, placed)
