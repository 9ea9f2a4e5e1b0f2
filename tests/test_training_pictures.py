"""Folders of training pictures: what is found, what is left out and said so, and what a file looks like as a tensor."""

from __future__ import annotations

import hashlib
import io
import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from lycoris_diff.errors import AdapterError
from lycoris_diff.training.data.buckets import Bucket, make_buckets, place
from lycoris_diff.training.data.captions import Note, read_metadata
from lycoris_diff.training.data.pictures import PictureSet, Skipped, find_pictures, picture_files
from lycoris_diff.training.data.reading import decode_picture, read_mask, read_picture

checked = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

ORIENTATION = 0x0112


def draw(path, size=(12, 10), seed=0, **options):
    """Write a picture of noise and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(path, **options)
    return picture


def names(pictures: PictureSet) -> list[str]:
    return [picture.path.name for picture in pictures.pictures]


def captions(pictures: PictureSet) -> dict[str, str]:
    return {picture.path.name: picture.caption for picture in pictures.pictures}


# what is found ----------------------------------------------------------------------------------------------------------


def test_every_common_kind_of_picture_is_found_sorted_by_name(tmp_path):
    kinds = ["b.png", "a.JPG", "c.jpeg", "d.webp", "e.bmp", "f.gif", "g.tif", "h.tiff"]
    for seed, name in enumerate(kinds):
        draw(tmp_path / name, seed=seed)
    draw(tmp_path / ".hidden.png")
    (tmp_path / "notes.md").write_text("not a picture")
    found = find_pictures(tmp_path, "a prompt", repeats=3)
    assert names(found) == sorted(kinds)
    assert found.skipped == ()
    for picture in found.pictures:
        assert (picture.caption, picture.repeats, picture.mask, picture.size) == ("a prompt", 3, None, (12, 10))
        assert picture.digest == hashlib.sha256(picture.path.read_bytes()).hexdigest()
    assert [path.name for path in picture_files(tmp_path)] == sorted(kinds)


def test_a_folder_given_in_a_roundabout_way(tmp_path, monkeypatch):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "./a.png", "text": "words"}')
    monkeypatch.chdir(tmp_path)
    for folder in (".", tmp_path / ".." / tmp_path.name, str(tmp_path)):
        found = find_pictures(folder, None)
        assert captions(found) == {"a.png": "words"} and found.skipped == ()


def test_folders_without_pictures(tmp_path):
    with pytest.raises(FileNotFoundError):
        find_pictures(tmp_path / "absent", "p")
    draw(tmp_path / ".hidden.png")
    with pytest.raises(AdapterError, match=r"no pictures in .*end in \.png, \.jpg"):
        find_pictures(tmp_path, "p")
    draw(tmp_path / "a.png")
    with pytest.raises(NotADirectoryError):
        find_pictures(tmp_path / "a.png", "p")


# captions ---------------------------------------------------------------------------------------------------------------


def test_the_nearest_caption_counts(tmp_path):
    for name in ("sidecar", "metadata", "prompt"):
        draw(tmp_path / f"{name}.png")
    (tmp_path / "sidecar.txt").write_text("\ufeff  from the\r\n text file \n", encoding="utf-8")
    lines = [
        {"file_name": "sidecar.png", "text": "not this", "repeats": 4},
        {"file_name": "metadata.png", "caption": "from the\u2028line", "prompt": "nor this"},
    ]
    (tmp_path / "metadata.jsonl").write_text(
        "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    found = find_pictures(tmp_path, "from the prompt", repeats=2)
    assert captions(found) == {
        "sidecar.png": "from the text file",
        "metadata.png": "from the line",
        "prompt.png": "from the prompt",
    }
    assert {picture.path.stem: picture.repeats for picture in found.pictures} == {"sidecar": 4, "metadata": 2, "prompt": 2}


def test_pictures_without_a_caption_are_named(tmp_path):
    for number in range(13):
        draw(tmp_path / f"{number:02}.png")
    (tmp_path / "03.txt").write_text("has one")
    with pytest.raises(
        AdapterError, match=r"12 pictures .* no caption: 00\.png, 01\.png, 02\.png, 04\.png.* and 2 more.*NAME\.txt"
    ):
        find_pictures(tmp_path, None)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("[1]", "line 2 of .* has no file_name"),
        ('{"text": "b"}', "line 2 of .* has no file_name"),
        ('{"file_name": "b.png", "text": 3}', "text in line 2 of .* is 3; expected a text"),
        ('{"file_name": "b.png", "text": " "}', "caption is empty: text in line 2"),
        ('{"file_name": "b.png", "repeats": 0}', "repeats in line 2 of .* is 0"),
        ('{"file_name": "b.png", "repeats": true}', "repeats in line 2 of .* is True"),
        ('{"file_name": "./a.png"}', "line 2 of .* describes './a.png' again"),
    ],
)
def test_metadata_that_cannot_be_understood(tmp_path, line, text):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n' + line)
    with pytest.raises(AdapterError, match=text):
        read_metadata(tmp_path)


def test_captions_that_cannot_be_understood(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(AdapterError, match=r"caption is empty: .*a\.txt"):
        find_pictures(tmp_path, "p")
    (tmp_path / "a.txt").write_bytes("größe".encode("latin-1"))
    with pytest.raises(AdapterError, match=r"a\.txt.* not in UTF-8"):
        find_pictures(tmp_path, "p")


def test_a_line_about_no_picture_is_reported(tmp_path):
    draw(tmp_path / "a.png")
    lines = [{"file_name": name, "text": "x"} for name in ("a.png", "b.png", "../c.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    found = find_pictures(tmp_path, None)
    assert names(found) == ["a.png"]
    reason = "named in metadata.jsonl, but there is no such picture"
    assert found.skipped == (Skipped("../c.png", reason), Skipped("b.png", reason))
    assert read_metadata(tmp_path)[tmp_path / "b.png"] == Note("x", None)


# kohya's folders --------------------------------------------------------------------------------------------------------


def test_folders_named_the_way_of_kohya(tmp_path):
    draw(tmp_path / "10_sks dog" / "a.png")
    draw(tmp_path / "10_sks dog" / "b.png")
    draw(tmp_path / "10_sks dog" / "c.png")
    draw(tmp_path / "3_" / "a.png")
    draw(tmp_path / "d.png")
    (tmp_path / "10_sks dog" / "b.txt").write_text("beside it")
    (tmp_path / "10_sks dog" / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "nearer", "repeats": 2}')
    lines = ['{"file_name": "d.png", "text": "d"}', '{"file_name": "3_/a.png", "text": "in a folder"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name": "10_sks dog/c.png", "text": "farther"}']))
    found = find_pictures(tmp_path, None, repeats=5)
    assert [(p.path.relative_to(tmp_path).as_posix(), p.caption, p.repeats) for p in found.pictures] == [
        ("10_sks dog/a.png", "sks dog", 10),
        ("10_sks dog/b.png", "beside it", 10),
        ("10_sks dog/c.png", "nearer", 2),
        ("3_/a.png", "in a folder", 3),
        ("d.png", "d", 5),
    ]
    assert find_pictures(tmp_path, "the prompt").pictures[0].caption == "the prompt"


def test_folders_that_are_not_read_are_reported(tmp_path):
    draw(tmp_path / "a.png")
    draw(tmp_path / "more" / "b.png")
    draw(tmp_path / "20260131_holiday" / "b.png")
    draw(tmp_path / "0_off" / "b.png")
    draw(tmp_path / ".cache" / "b.png")
    (tmp_path / "empty").mkdir()
    found = find_pictures(tmp_path, "p")
    assert names(found) == ["a.png"]
    assert [item.name for item in found.skipped] == ["0_off", "20260131_holiday", "more"]
    assert found.skipped[0].reason == "its name says 0 repeats"
    (tmp_path / "a.png").unlink()
    with pytest.raises(AdapterError, match=r"no pictures.*Left out: .*more \(only sub-directories named like '10_some words'"):
        find_pictures(tmp_path, "p")


# bad files --------------------------------------------------------------------------------------------------------------


def test_bad_pictures_are_skipped_by_name(tmp_path):
    draw(tmp_path / "good.png")
    draw(tmp_path / "cut.png", size=(64, 64))
    draw(tmp_path / "cut.jpg", size=(64, 64))
    for name in ("cut.png", "cut.jpg"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        assert Image.open(path).size == (64, 64)  # the header alone would pass
    (tmp_path / "text.png").write_text("no picture at all")
    (tmp_path / "empty.jpg").touch()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    found = find_pictures(tmp_path, "p")
    assert names(found) == ["good.png"]
    reasons = {item.name: item.reason for item in found.skipped}
    assert list(reasons) == ["cut.jpg", "cut.png", "empty.jpg", "float.tif", "text.png"]
    assert "truncated" in reasons["cut.png"] and "truncated" in reasons["cut.jpg"]
    assert reasons["text.png"] == reasons["empty.jpg"] == "not a picture, or of a kind that Pillow cannot read"
    assert "32-bit grey levels" in reasons["float.tif"]
    (tmp_path / "good.png").unlink()
    with pytest.raises(AdapterError, match=r"no pictures .* that can be read.*cut\.jpg .*text\.png \(not a picture"):
        find_pictures(tmp_path, "p")


def test_a_bad_picture_needs_no_caption(tmp_path):
    draw(tmp_path / "10_words" / "a.png")
    (tmp_path / "bad.png").write_text("")
    assert names(find_pictures(tmp_path, None)) == ["a.png"]


@pytest.mark.filterwarnings("ignore")  # what Pillow says about damaged files is not the matter
@pytest.mark.parametrize(
    ("kind", "limit"), [("PNG", 200), ("JPEG", 700), ("WEBP", 200), ("BMP", 60), ("GIF", 900), ("TIFF", 200)]
)
def test_damaged_files_never_raise_anything_else(tmp_path, monkeypatch, kind, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)  # a damaged header may promise much more
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, kind)
    good = buffer.getvalue()
    chance = np.random.default_rng(1)
    draw(tmp_path / "good.png")
    for number in range(40):
        data = bytearray(good)
        for place_ in chance.integers(0, min(limit, len(data)), 3):
            data[place_] = chance.integers(0, 256)
        (tmp_path / f"{number}.{kind.lower()}").write_bytes(bytes(data[: chance.integers(1, len(data) + 1)]))
    found = find_pictures(tmp_path, "p")
    assert len(found.pictures) + len(found.skipped) == 41
    assert found.skipped and all(item.reason for item in found.skipped)


# masks ------------------------------------------------------------------------------------------------------------------


def test_masks_belong_to_pictures_and_are_none_themselves(tmp_path):
    draw(tmp_path / "a.jpg")
    draw(tmp_path / "b.png")
    Image.new("L", (12, 10), 255).save(tmp_path / "a.mask.png")
    Image.new("L", (12, 10), 255).save(tmp_path / "c.mask.png")
    Image.new("L", (12, 10), 255).save(tmp_path / "b.mask.jpg")
    plain = find_pictures(tmp_path, "p")
    assert names(plain) == ["a.jpg", "b.png"] and plain.skipped == ()
    assert [picture.mask for picture in plain.pictures] == [None, None]
    masked = find_pictures(tmp_path, "p", masked=True)
    assert [picture.mask for picture in masked.pictures] == [tmp_path / "a.mask.png", None]
    assert [item.name for item in masked.skipped] == ["b.mask.jpg", "c.mask.png"]
    assert masked.pictures[0].digest != plain.pictures[0].digest and masked.pictures[1].digest == plain.pictures[1].digest
    Image.new("L", (12, 10), 254).save(tmp_path / "a.mask.png")
    assert find_pictures(tmp_path, "p", masked=True).digest != masked.digest
    assert find_pictures(tmp_path, "p").digest == plain.digest


def test_masks_that_cannot_be_used(tmp_path):
    draw(tmp_path / "a.png")
    with pytest.raises(AdapterError, match=r"no picture in .* has a mask; put NAME\.mask\.png"):
        find_pictures(tmp_path, "p", masked=True)
    Image.new("L", (10, 12)).save(tmp_path / "a.mask.png")
    with pytest.raises(AdapterError, match=r"a\.mask\.png.* has 10 x 12 pixels, its picture has 12 x 10"):
        find_pictures(tmp_path, "p", masked=True)
    (tmp_path / "a.mask.png").write_text("no picture")
    with pytest.raises(AdapterError, match=r"mask .*a\.mask\.png.* cannot be read"):
        find_pictures(tmp_path, "p", masked=True)


# the dataset's digest ---------------------------------------------------------------------------------------------------


def test_the_digest_follows_what_is_trained_and_nothing_else(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for seed, name in enumerate("abc"):
        draw(here / f"{name}.png", seed=seed)
    there.mkdir()
    for name in "cab":  # made in another order
        shutil.copy(here / f"{name}.png", there)
    digest = find_pictures(here, "p").digest
    assert len(digest) == 64
    assert find_pictures(there, "p").digest == digest
    (there / "notes.md").write_text("x")
    (there / "bad.png").write_text("x")
    assert find_pictures(there, "p").digest == digest
    others = [find_pictures(there, "q").digest, find_pictures(there, "p", repeats=2).digest]
    (there / "a.txt").write_text("its own")
    others.append(find_pictures(there, "p").digest)
    draw(there / "a.png", seed=7)
    others.append(find_pictures(there, "p").digest)
    (there / "c.png").unlink()
    others.append(find_pictures(there, "p").digest)
    assert len({digest, *others}) == 6


# files as tensors -------------------------------------------------------------------------------------------------------


def square_of_before(path, resolution):
    """The square that training read before there were buckets."""
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    picture = Image.alpha_composite(white, upright).convert("RGB")
    square = ImageOps.fit(picture, (resolution, resolution), method=Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 127.5 - 1.0


@checked
@given(
    st.integers(1, 90), st.integers(1, 90), st.integers(1, 64), st.sampled_from(["RGB", "RGBA", "LA", "P", "L", "1"]), st.data()
)
def test_squares_are_those_of_pillows_fit(tmp_path_factory, width, height, resolution, mode, data):
    path = tmp_path_factory.mktemp("square") / "a.png"
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert(mode)
    options = {}
    if mode in ("P", "RGB", "L"):
        options = data.draw(
            st.sampled_from([{}, {"transparency": {"P": 3, "L": 9, "RGB": tuple(map(int, pixels[0, 0, :3]))}[mode]}])
        )
    exif = Image.Exif()
    exif[ORIENTATION] = data.draw(st.integers(1, 8))
    picture.save(path, exif=exif, **options)
    size = (width, height) if exif[ORIENTATION] < 5 else (height, width)
    placement = place(size, [Bucket(resolution, resolution)])
    assert torch.equal(read_picture(path, placement), square_of_before(path, resolution))


@checked
@given(st.integers(1, 120), st.integers(1, 120), st.sampled_from([8, 16]))
def test_buckets_are_those_of_pillows_fit(tmp_path_factory, width, height, step):
    path = tmp_path_factory.mktemp("bucket") / "a.png"
    picture = draw(path, (width, height))
    placement = place((width, height), make_buckets(48, step))
    expected = ImageOps.fit(picture, (placement.bucket.width, placement.bucket.height), method=Image.Resampling.LANCZOS)
    read = read_picture(path, placement)
    assert read.dtype == torch.float32 and read.shape == (3, placement.bucket.height, placement.bucket.width)
    assert torch.equal(((read + 1) * 127.5).round().byte().permute(1, 2, 0), torch.from_numpy(np.array(expected)))


def test_the_picture_read_is_the_resized_one_cut(tmp_path):
    """Against resizing the whole and cutting whole pixels: the two differ by less than a pixel's way."""
    x, y = np.meshgrid(np.linspace(0, 1, 333), np.linspace(0, 1, 200))
    smooth = np.stack([x, y, (x + y) / 2], -1)
    Image.fromarray((smooth * 255).round().astype(np.uint8)).save(tmp_path / "a.png")
    placement = place((333, 200), make_buckets(128, 16))
    picture = decode_picture(tmp_path / "a.png").resize(placement.resized, Image.Resampling.LANCZOS)
    left, top = placement.crop
    cut = picture.crop((left, top, left + placement.bucket.width, top + placement.bucket.height))
    expected = torch.from_numpy(np.array(cut)).permute(2, 0, 1) / 127.5 - 1
    assert (read_picture(tmp_path / "a.png", placement) - expected).abs().max() < 2 / min(placement.resized) + 2 / 127.5


def test_a_turned_photograph_is_upright_in_size_and_pixels(tmp_path):
    upright = Image.new("RGB", (8, 16), "blue")
    upright.paste("red", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was turned: to be shown a quarter turn clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    found = find_pictures(tmp_path, "p")
    assert found.pictures[0].size == (8, 16)
    pixels = read_picture(found.pictures[0].path, place((8, 16), [Bucket(8, 16)]))
    assert (pixels[:, 0, 0].tolist(), pixels[:, -1, 0].tolist()) == ([1, -1, -1], [-1, -1, 1])


def test_transparent_parts_are_white_and_sixteen_bits_keep_their_greys(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    placement = place((4, 4), [Bucket(4, 4)])
    assert (read_picture(tmp_path / "clear.png", placement) == 1).all()
    grey = (np.arange(16) * 4321 + 200).astype(np.uint16).reshape(4, 4)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        levels = (read_picture(tmp_path / name, placement)[0] + 1) / 2
        assert torch.allclose(levels, torch.from_numpy(grey / 65535).float(), atol=0.5 / 255 + 1e-6)


def test_files_that_changed_since_they_were_found(tmp_path):
    path = tmp_path / "a.png"
    draw(path, (12, 10))
    placement = place((12, 10), [Bucket(8, 8)])
    draw(path, (10, 12))
    with pytest.raises(AdapterError, match=r"a\.png.* has 10 x 12 pixels, 12 x 10 were expected"):
        read_picture(path, placement)
    path.write_text("no picture")
    for read in (lambda: read_picture(path, placement), lambda: read_mask(path, placement, 2)):
        with pytest.raises(AdapterError, match=r"a\.png.* cannot be read"):
            read()
    path.unlink()
    with pytest.raises(AdapterError, match=r"a\.png.* cannot be read"):
        read_picture(path, placement)


# masks as tensors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_a_mask_is_the_mean_over_the_pixels_of_each_latent(tmp_path, scale):
    pixels = np.random.default_rng(0).integers(0, 256, (32 * scale, 48 * scale), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.mask.png")
    placement = place((48 * scale, 32 * scale), [Bucket(24, 32)])
    mask = read_mask(tmp_path / "a.mask.png", placement, 8)
    left, top = placement.box[0], placement.box[1]
    assert (left, top) == (12 * scale, 0)
    part = torch.from_numpy(pixels)[:, 12 * scale : 36 * scale].float() / 255
    expected = torch.nn.functional.avg_pool2d(part[None], 8 * scale)
    assert mask.shape == (1, 4, 3) and mask.dtype == torch.float32
    assert torch.allclose(mask, expected, atol=1e-5)


@checked
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_masks_stay_from_0_to_1(tmp_path_factory, width, height, factor, white):
    path = tmp_path_factory.mktemp("mask") / "a.mask.png"
    Image.new("L", (width, height), 255 if white else 0).save(path)
    placement = place((width, height), make_buckets(32, 8))
    mask = read_mask(path, placement, factor)
    assert mask.shape == (1, placement.bucket.height // factor, placement.bucket.width // factor)
    assert (mask == float(white)).all()


def test_masks_of_other_kinds(tmp_path):
    path = tmp_path / "a.mask.png"
    placement = place((8, 8), [Bucket(8, 8)])
    mask = Image.new("RGBA", (8, 8), (255, 255, 255, 0))  # transparent: does not count
    mask.paste((255, 255, 255, 255), (0, 0, 4, 8))
    mask.save(path)
    assert read_mask(path, placement, 4).tolist() == [[[1, 0], [1, 0]]]
    exif = Image.Exif()
    exif[ORIENTATION] = 3  # upside down
    mask.save(path, exif=exif)
    assert read_mask(path, placement, 4).tolist() == [[[0, 1], [0, 1]]]
    with pytest.raises(AdapterError, match="8 x 8 pixels cannot be divided by 3"):
        read_mask(path, placement, 3)
