"""Whatever holds an image becomes the same pixels; what is no image is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch

from fedllm.core.errors import DataError, FedLLMError, MissingExtra, ModelError
from fedllm.models.images import MEAN, SPREAD, ImageReader, levels, reader_of

IMAGE = numpy.random.default_rng(0).integers(0, 256, (12, 10, 3)).astype(numpy.uint8)
CONFIG = SimpleNamespace(vision_config=SimpleNamespace(image_size=8))
OPENAI = {"size": 8, "crop_size": 8, "do_center_crop": True, "do_resize": True, "resample": 3}


@pytest.mark.parametrize(
    "held",
    [
        IMAGE,
        IMAGE.tolist(),
        torch.from_numpy(IMAGE),
        IMAGE.transpose(2, 0, 1),
        IMAGE / 255,
        (IMAGE / 255).astype(numpy.float32).tolist(),
        numpy.concatenate([IMAGE, IMAGE[:, :, :1]], 2),
    ],
    ids=["array", "list", "tensor", "channels first", "fractions", "list of fractions", "with transparency"],
)
def test_every_form_gives_the_same_levels(held: Any) -> None:
    assert numpy.array_equal(levels(held), IMAGE)


def test_grey_is_three_equal_colours() -> None:
    grey = IMAGE[:, :, 0]
    for held in (grey, grey[:, :, None], grey[None], grey.tolist()):
        assert (levels(held) == grey[:, :, None]).all() and levels(held).shape == (12, 10, 3)
    assert set(numpy.unique(levels(grey > 100))) == {0, 255}


def test_a_file_of_numbers_and_what_datasets_leaves_undecoded(tmp_path: Path) -> None:
    numpy.save(tmp_path / "x.npy", IMAGE)
    for held in (tmp_path / "x.npy", str(tmp_path / "x.npy"), {"bytes": None, "path": str(tmp_path / "x.npy")}):
        assert numpy.array_equal(levels(held), IMAGE)


def test_a_pil_image_is_anything_that_converts() -> None:
    class Picture:
        size = (10, 12)

        def convert(self, mode: str) -> numpy.ndarray:
            assert mode == "RGB"
            return IMAGE

    assert numpy.array_equal(levels(Picture()), IMAGE)


@pytest.mark.skipif(importlib.util.find_spec("PIL") is not None, reason="Pillow is installed")
def test_a_picture_file_needs_pillow(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    for held in (tmp_path / "x.png", b"\x89PNG"):
        with pytest.raises(MissingExtra, match="pillow"):
            levels(held)


@pytest.mark.skipif(importlib.util.find_spec("PIL") is None, reason="Pillow is not installed")
def test_a_picture_file(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(IMAGE).save(tmp_path / "x.png")
    assert numpy.array_equal(levels(tmp_path / "x.png"), IMAGE)
    assert numpy.array_equal(levels((tmp_path / "x.png").read_bytes()), IMAGE)
    (tmp_path / "y.png").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read"):
        levels(tmp_path / "y.png")


@pytest.mark.parametrize(
    ("held", "text"),
    [
        (IMAGE.astype(float), "from 0 to 255"),
        (IMAGE.astype(int) - 1, "from -1"),
        (IMAGE.astype(int) + 1, "to 256"),
        (numpy.full((4, 4), numpy.nan), "nan"),
        (numpy.zeros((4, 4, 2)), r"shape \(4, 4, 2\)"),
        (numpy.zeros((4,)), "shape"),
        (numpy.zeros((0, 4)), "shape"),
        ([[1, 2], [3]], "differ in length"),
        ([["a", "b"]], "not a number"),
        ("nowhere/at/all.png", "does not exist"),
    ],
)
def test_what_is_no_image(held: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        levels(held)


def test_pixels_are_normalised() -> None:
    found = ImageReader(12, 10)(IMAGE)
    wanted = (IMAGE / 255 - numpy.array(MEAN)) / numpy.array(SPREAD)
    assert found.dtype == torch.float32 and found.shape == (3, 12, 10)
    assert torch.allclose(found, torch.tensor(wanted.transpose(2, 0, 1), dtype=torch.float32), atol=1e-6)


def test_the_shorter_edge_is_resized_and_the_middle_is_cut() -> None:
    reader = reader_of(CONFIG, OPENAI)
    assert reader == ImageReader(8, 8, 8)
    wide = numpy.zeros((8, 24, 3), numpy.uint8)
    wide[:, 8:16] = 255
    assert torch.allclose(reader(wide), reader(numpy.full((8, 8, 3), 255, numpy.uint8)))
    assert reader(IMAGE).shape == (3, 8, 8)
    even = numpy.full((50, 33, 3), 77, numpy.uint8)
    assert torch.equal(reader(even), reader(even[:8, :8]))


def test_no_preprocessor_squeezes_to_the_tower() -> None:
    reader = reader_of(CONFIG, None)
    assert reader == ImageReader(8, 8) and reader(IMAGE).shape == (3, 8, 8)


def test_what_a_preprocessor_may_say() -> None:
    plain = reader_of(CONFIG, {"size": {"height": 8, "width": 8}, "do_normalize": False, "do_rescale": False})
    assert torch.equal(plain(IMAGE[:8, :8]), torch.from_numpy(IMAGE[:8, :8]).permute(2, 0, 1).float())
    assert reader_of(CONFIG, {**OPENAI, "size": {"shortest_edge": 9}}).shortest == 9
    with pytest.raises(ModelError, match="16 x 16"):
        reader_of(CONFIG, {"size": 20, "crop_size": {"height": 16, "width": 16}})
    with pytest.raises(ModelError, match="224 x 224"):
        reader_of(CONFIG, {"size": {"height": 224, "width": 224}})
    with pytest.raises(FedLLMError, match="filter 1"):
        reader_of(CONFIG, {**OPENAI, "resample": 1})


def test_smaller_images_get_a_frame_where_nothing_resizes() -> None:
    reader = ImageReader(6, 6, resize=False, mean=(0.0,) * 3, spread=(1.0,) * 3)
    found = reader(numpy.full((3, 8), 255, numpy.uint8))
    assert found.shape == (3, 6, 6) and found[0].sum() == 18 and found[0, 1:4].sum() == 18
