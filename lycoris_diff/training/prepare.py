"""A run's pictures and prompts, ready to be trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from ..errors import ConfigError
from .batches import Batches, Chance, Shown
from .config import DreamBoothConfig
from .data.buckets import Bucket, Placement, make_buckets, place
from .data.cache import DiskCache
from .data.class_pictures import ensure_class_pictures
from .data.pictures import Picture, PictureSet, count_picture_files, find_pictures
from .data.stream import Stream
from .families import Family
from .latents import LatentStore
from .objective import Objective
from .processes import sharding
from .prompts import Prompts

#: what a long stage calls: its name, what is done and how much there is
OnStage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Data:
    """What a run is trained on.

    Attributes:
        pictures: of the subject, as found.
        class_pictures: of the class; None without prior preservation.
        generated: how many of them were generated for this run.
        instances, classes: the same, encoded.
        prompts: all captions, encoded.
    """

    pictures: PictureSet
    class_pictures: PictureSet | None
    generated: int
    instances: list[Shown]
    classes: list[Shown]
    prompts: Prompts

    @property
    def digest(self) -> str:
        """Content of all pictures and captions: the same data gives the same run."""
        return self.pictures.digest + (self.class_pictures.digest if self.class_pictures else "")


def find_data(config: DreamBoothConfig) -> PictureSet:
    """Return the subject's pictures.

    Raises:
        AdapterError: there is none that can be read, or one without a prompt.
        OSError: the directory is absent.
    """
    return find_pictures(config.instance_data_dir, config.instance_prompt, config.repeats, config.masked_loss)


def find_class_data(family: Family, config: DreamBoothConfig, on_stage: OnStage) -> tuple[PictureSet | None, int]:
    """Return the pictures of the class, after generating those that are missing, and how many those were."""
    folder = config.class_pictures
    if folder is None:
        return None, 0
    made = 0
    if config.class_prompt is not None:
        edge = _whole(config.resolution, family.edge_factor)
        made = ensure_class_pictures(
            family.pipe,
            folder,
            config.class_prompt,
            config.num_class_images,
            resolution=(edge, edge),
            batch_size=config.sample_batch_size,
            seed=config.seed,
            on_picture=lambda done, total: on_stage("class pictures", done, total),
        )
    return find_pictures(folder, config.class_prompt), made


def prepare_data(
    family: Family, config: DreamBoothConfig, pictures: PictureSet, accelerator: Accelerator, cache: Path, on_stage: OnStage
) -> Data:
    """Generate missing class pictures and encode everything; what is in `cache` is not encoded again.

    With several processes the first one works, the others find its results.

    Raises:
        AdapterError: pictures or prompts that cannot be used.
        OSError: a file cannot be read or written.
    """
    check_class_pictures(config, accelerator)
    with accelerator.main_process_first():
        class_pictures, generated = find_class_data(family, config, on_stage)
        return encode_data(family, config, pictures, class_pictures, generated, cache, on_stage)


def check_class_pictures(config: DreamBoothConfig, accelerator: Accelerator) -> None:
    """Refuse to draw pictures of the class where no process has the whole model.

    Raises:
        ConfigError: with the number of pictures that there are.
    """
    folder = config.class_pictures
    if folder is None or config.class_prompt is None or sharding(accelerator) is None:
        return
    there = count_picture_files(folder)
    if there < config.num_class_images:
        raise ConfigError(
            f"{folder} has {there} of {config.num_class_images} pictures of the class; with FSDP no process has the whole "
            "model to draw the others. Put them there, or have a run without FSDP draw them"
        )


def encode_data(
    family: Family,
    config: DreamBoothConfig,
    pictures: PictureSet,
    class_pictures: PictureSet | None,
    generated: int,
    cache: Path,
    on_stage: OnStage,
) -> Data:
    """Encode pictures and captions; each picture of the class is cut to all buckets of the subject's."""
    disk = DiskCache(cache)
    store = LatentStore(family, disk)
    buckets = buckets_of(config, family.edge_factor)
    classes = class_pictures.pictures if class_pictures else ()
    own = [place(picture.size, buckets, config.bucket_upscale, config.bucket_step) for picture in pictures.pictures]
    used = sorted({placement.bucket for placement in own})
    ways = (False, True) if config.random_flip else (False,)
    total = len(own) + len(classes) * len(used)
    done = 0

    def show(picture: Picture, placements: list[Placement]) -> Shown:
        nonlocal done
        latents = {p.bucket: tuple(store.get(picture, p, mirrored) for mirrored in ways) for p in placements}
        done += len(placements)
        on_stage("latents", done, total)
        return Shown(picture.caption, latents)

    instances = [show(picture, [placement]) for picture, placement in zip(pictures.pictures, own, strict=True)]
    shown_classes = [show(picture, [place(picture.size, [bucket]) for bucket in used]) for picture in classes]
    captions = [shown.caption for shown in (*instances, *shown_classes)]
    trained = any(name in config.adapters for name in family.text_encoders)
    prompts = Prompts(family, [*captions, *([""] if config.caption_dropout else [])], trained, disk)
    return Data(pictures, class_pictures, generated, instances, shown_classes, prompts)


def batches_of(
    family: Family, objective: Objective, config: DreamBoothConfig, data: Data, rank: int = 0, world: int = 1
) -> Batches:
    """Return the run's batches for one of `world` processes."""
    size = config.train_batch_size * world
    buckets = [next(iter(shown.latents)) for shown in data.instances]
    repeats = [picture.repeats for picture in data.pictures.pictures]
    class_stream = None
    if data.classes:
        anywhere = [buckets[0]] * len(data.classes)  # they follow the subject's bucket
        class_stream = Stream(anywhere, [1] * len(data.classes), size, config.seed + 1)
    return Batches(
        family=family,
        objective=objective,
        instances=data.instances,
        instance_stream=Stream(buckets, repeats, size, config.seed),
        classes=data.classes,
        class_stream=class_stream,
        chance=Chance(config.seed, config.caption_dropout, config.noise_offset),
        rank=rank,
        world=world,
    )


def buckets_of(config: DreamBoothConfig, factor: int) -> list[Bucket]:
    """Return the buckets that pictures may go into; without `aspect_buckets` one square.

    Raises:
        ConfigError: edges that the model cannot divide.
    """
    edges: dict[str, int] = {}
    if config.aspect_buckets or not config.bucket_upscale:
        edges["bucket_step"] = config.bucket_step
    if not config.aspect_buckets:
        edges["resolution"] = config.resolution
    for name, value in edges.items():
        if value % factor:
            raise ConfigError(f"{name} is {value}; this model needs multiples of {factor}, such as {_whole(value, factor)}")
    if not config.aspect_buckets:
        return [Bucket(config.resolution, config.resolution)]
    return make_buckets(config.resolution, config.bucket_step)


def _whole(value: int, factor: int) -> int:
    return max(factor, round(value / factor) * factor)
