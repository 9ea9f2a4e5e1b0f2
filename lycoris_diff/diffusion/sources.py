"""Where an adapter comes from: a file, a directory, or a repository on the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ..checkpoints.safety import PICKLE_SUFFIXES
from ..errors import CheckpointError
from ..files import CONFIG_NAME, DIFFUSERS_NAME, WEIGHTS_NAME

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
#: keywords of `find_source` that only matter for the Hub
HUB_ARGUMENTS = frozenset(("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download"))
#: what optimizers, schedulers and training states are called, beside an adapter
_NO_ADAPTER = ("optimizer", "scheduler", "checkpoint-", "random_states")


def find_source(source: str | os.PathLike[str], weight_name: str | None = None, **hub: Any) -> Path:
    """The file, or the directory of one adapter, behind a name.

    Args:
        source: a safetensors file; a directory with one, with PEFT's two files, or with a PEFT directory for every component;
            or ``"owner/name"`` of a Hub repository that looks like such a directory.
        weight_name: the file in the directory or repository, when there are several.
        **hub: ``subfolder``, ``revision``, ``token``, ``cache_dir``, ``local_files_only``, ``force_download``.

    Raises:
        CheckpointError: none or several files could be meant, or only a pickle is there.
        FileNotFoundError: there is no such file, directory or repository. OSError: the Hub cannot be reached.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise CheckpointError(f"the source is {source!r:.100}; expected a file, a directory or a repository")
    path = Path(source)
    subfolder = hub.pop("subfolder", None) or ""
    if path.is_file():
        return path
    if path.is_dir():
        return _in_directory(path / subfolder, weight_name)
    text = os.fspath(source)
    if not _REPOSITORY.fullmatch(text) or text.startswith("."):
        raise FileNotFoundError(f"no such file or directory: {text}")
    folder = _download(text, weight_name, subfolder, **hub)
    return _in_directory(folder / subfolder, weight_name)


def _in_directory(folder: Path, weight_name: str | None) -> Path:
    if weight_name is not None:
        if not (folder / weight_name).is_file():
            raise FileNotFoundError(f"{folder} has no file {weight_name!r}; it has {_names(folder)}")
        return folder / weight_name
    if (folder / CONFIG_NAME).is_file() or any(folder.glob(f"*/{CONFIG_NAME}")):
        return folder
    return folder / _only(_names(folder), folder)


def _only(names: Iterable[str], where: object) -> str:
    """The one adapter file among names."""
    every = list(names)
    files = [n for n in every if n.endswith(".safetensors") and not any(word in n for word in _NO_ADAPTER)]
    preferred = [n for n in files if PurePosixPath(n).name in (DIFFUSERS_NAME, WEIGHTS_NAME)]
    found = preferred if len(preferred) == 1 else files
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(f"{where} has several adapter files; pass one of them, or weight_name: {sorted(found)}")
    pickles = [n for n in every if n.endswith(PICKLE_SUFFIXES)]
    hint = f"; {pickles[0]} is a pickle and is not read, re-save it as safetensors" if pickles else ""
    raise CheckpointError(f"{where} has no .safetensors file{hint}")


def _download(repository: str, weight_name: str | None, subfolder: str, **hub: Any) -> Path:
    """Bring what is needed of a repository to the cache; return the folder that holds it."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        if HF_HUB_OFFLINE or hub.get("local_files_only"):
            return Path(snapshot_download(repository, **{**hub, "local_files_only": True}))
        listing = HfApi(token=hub.get("token")).list_repo_files(repository, revision=hub.get("revision"))
        return Path(snapshot_download(repository, allow_patterns=_wanted(listing, weight_name, subfolder, repository), **hub))
    except (LocalEntryNotFoundError, RepositoryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"no such file or directory, and no repository {repository!r} on the Hub or in its cache: {error}"
        ) from error


def _wanted(listing: Sequence[str], weight_name: str | None, subfolder: str, repository: str) -> list[str]:
    """Names to download: a PEFT directory's files, one such a component, or the one adapter file."""
    prefix = f"{subfolder.strip('/')}/" if subfolder else ""
    inside = [n.removeprefix(prefix) for n in listing if n.startswith(prefix)]
    if weight_name is not None:
        return [prefix + weight_name]
    peft = [n for n in inside if PurePosixPath(n).name == CONFIG_NAME and n.count("/") <= 1]
    if CONFIG_NAME in peft:
        return [prefix + CONFIG_NAME, prefix + WEIGHTS_NAME]
    if peft:
        return [prefix + str(PurePosixPath(n).parent / file) for n in peft for file in (CONFIG_NAME, WEIGHTS_NAME)]
    return [prefix + _only([n for n in inside if "/" not in n], repository)]


def _names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_file()) if folder.is_dir() else []
