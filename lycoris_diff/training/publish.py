"""A run's files on the Hugging Face Hub: what others need, and nothing of the machine it was made on."""

from __future__ import annotations

import json
from dataclasses import dataclass

import yaml
from huggingface_hub import CommitOperationAdd, HfApi

from ..errors import ConfigError
from ..files import CONFIG_NAME, WEIGHTS_NAME
from .config import DreamBoothConfig
from .previews import parse_preview_name
from .record import CARD, PREVIEWS, SETTINGS, public_name, public_settings


@dataclass(frozen=True)
class Upload:
    """What became of an upload.

    Attributes:
        repository: where to.
        url: of the repository; None when the upload failed.
        error: why it failed; None when it did not.
    """

    repository: str
    url: str | None
    error: str | None


def upload(config: DreamBoothConfig) -> Upload:
    """Upload what `save_outputs` wrote to `config.push_to_hub`, in one commit.

    The adapters, the card, its samples and the settings; never pictures, caches, checkpoints or logs. Directories are left
    out of paths in the settings. A new repository is private. A failure is returned and not raised: the files are on disk
    whatever happens to the upload.

    Raises:
        ConfigError: `push_to_hub` is not set.
    """
    repository = config.push_to_hub
    if repository is None:
        raise ConfigError('push_to_hub is not set; give the name of a repository, "owner/name"')
    try:
        api = HfApi()
        url = api.create_repo(repository, private=True, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=held) for name, held in published(config).items()]
        message = f"{config.adapter_file.stem}, trained with lycoris_diff"
        api.create_commit(repository, operations=operations, commit_message=message)
    except Exception as error:  # of whatever kind: hours of training are not to end in a traceback of a network
        return Upload(repository, None, f"{type(error).__name__}: {error}")
    return Upload(repository, str(url), None)


def published(config: DreamBoothConfig) -> dict[str, bytes | str]:
    """Name in the repository -> path or content of every file that is uploaded."""
    output, found = config.output, dict[str, bytes | str]()
    card = (output / CARD).read_text(encoding="utf-8")
    settings = yaml.safe_load((output / SETTINGS).read_text(encoding="utf-8"))
    comments = [line for line in (output / SETTINGS).read_text(encoding="utf-8").splitlines(True) if line.startswith("#")]
    body = yaml.safe_dump(public_settings(settings), sort_keys=False, allow_unicode=True, width=120)
    found[SETTINGS] = ("".join(comments) + body).encode()
    found[CARD] = card.encode()
    if config.adapter_file.is_file():
        found[config.adapter_file.name] = str(config.adapter_file)
    for component in config.adapters:
        if (output / component / CONFIG_NAME).is_file():
            values = json.loads((output / component / CONFIG_NAME).read_text(encoding="utf-8"))
            if values.get("base_model_name_or_path"):  # of a downloaded model this is a directory
                values["base_model_name_or_path"] = public_name(settings["model"])
            found[f"{component}/{CONFIG_NAME}"] = json.dumps(values, indent=2, sort_keys=True).encode()
            found[f"{component}/{WEIGHTS_NAME}"] = str(output / component / WEIGHTS_NAME)
    for picture in sorted((output / PREVIEWS).glob("*.png")):
        name = f"{PREVIEWS}/{picture.name}"
        if parse_preview_name(picture.name) is not None and f"]({name})" in card:
            found[name] = str(picture)
    return found
