"""Images - from whatever a row holds to the pixels a model was trained on.

The numbers of a model's preprocessor_config.json (size, crop, mean, spread) are read, and applied here with torch.
transformers' own image processors need Pillow or torchvision and differ in the last bits from each other; one way that
needs neither gives every site the same pixels. It follows the torchvision one: resize with anti-aliasing and round to
whole levels, cut the middle, scale, normalise. Pillow is needed only to open JPEG and PNG files.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from fedllm.core.errors import DataError, MissingExtra, ModelError

MEAN = (0.48145466, 0.4578275, 0.40821073)
"""CLIP's mean of red, green and blue (Radford et al., 2103.00020), where a model states none."""
SPREAD = (0.26862954, 0.26130258, 0.27577711)
"""CLIP's standard deviations."""
_FILTERS = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}  # the numbers of Pillow's filters


@dataclass(frozen=True)
class ImageReader:
    """Makes pixel values [3, height, width] of an image.

    Attributes:
        height: rows of the result.
        width: columns of the result.
        shortest: length of the shorter edge after resizing; None resizes to (height, width) at once.
        resize: whether images are resized at all.
        filter: nearest-exact, bilinear or bicubic.
        scale: factor of the levels 0..255.
        mean: subtracted from each colour.
        spread: divides each colour.
    """

    height: int
    width: int
    shortest: int | None = None
    resize: bool = True
    filter: str = "bicubic"
    scale: float = 1 / 255
    mean: tuple[float, ...] = MEAN
    spread: tuple[float, ...] = SPREAD

    def __call__(self, image: Any) -> torch.Tensor:
        """Pixel values, float32.

        Args:
            image: an array or nested list [H, W], [H, W, 1|3|4] or [1|3, H, W] of whole numbers 0..255 or fractions
                0..1, a PIL image, a path to a picture or a .npy file, encoded bytes, or {"bytes": ..., "path": ...}.

        Raises:
            DataError: it is none of these.
            MissingExtra: a picture file without Pillow.
        """
        x = torch.from_numpy(levels(image)).permute(2, 0, 1).unsqueeze(0).float()
        x = self._cut(self._resized(x))[0] * self.scale
        mean, spread = (torch.tensor(each).view(-1, 1, 1) for each in (self.mean, self.spread))
        return (x - mean) / spread

    def _resized(self, x: torch.Tensor) -> torch.Tensor:
        if not self.resize:
            return x
        rows, columns = x.shape[-2:]
        size = (self.height, self.width)
        if self.shortest is not None:  # the longer edge is cut off to whole pixels, as torchvision does
            short = min(rows, columns)
            size = (rows * self.shortest // short, columns * self.shortest // short)
        if size == (rows, columns):
            return x
        smooth: dict[str, Any] = {} if self.filter == "nearest-exact" else {"antialias": True, "align_corners": False}
        x = torch.nn.functional.interpolate(x, size, mode=self.filter, **smooth)
        return x.round().clamp(0, 255)

    def _cut(self, x: torch.Tensor) -> torch.Tensor:
        """The middle; an image that is smaller gets a black frame."""
        for axis, wanted in ((-2, self.height), (-1, self.width)):
            missing = wanted - x.shape[axis]
            if missing > 0:
                before = missing // 2
                frame = (before, missing - before) if axis == -1 else (0, 0, before, missing - before)
                x = torch.nn.functional.pad(x, frame)
            elif missing < 0:
                x = x.narrow(axis, -missing // 2, wanted)
        return x


def reader_of(config: Any, stated: Mapping[str, Any] | None) -> ImageReader:
    """The reader of a model.

    Args:
        config: its transformers configuration (of both towers).
        stated: what its preprocessor_config.json says; None where it has none: then images are resized to the size
            the tower reads, whatever their proportions, and normalised as CLIP does.

    Raises:
        ModelError: a filter or size that is not known here.
    """
    vision = getattr(config, "vision_config", config)
    side = vision.image_size
    height, width = (side, side) if isinstance(side, int) else side
    if stated is None:
        return ImageReader(height, width)
    size, crop = stated.get("size", {"shortest_edge": height}), stated.get("crop_size")
    cut = bool(stated.get("do_center_crop", crop is not None))
    shortest = size if isinstance(size, int) and cut else None
    shortest = int(size["shortest_edge"]) if isinstance(size, Mapping) and "shortest_edge" in size else shortest
    for box in [_box(crop, (height, width))] * cut + [_box(size, (height, width))] * (shortest is None):
        if box != (height, width):
            raise ModelError(
                f"The model's preprocessor makes images of {box[0]} x {box[1]} pixels.",
                f"Its image tower reads {height} x {width}.",
                action="Mend preprocessor_config.json.",
            )
    kind = int(stated.get("resample", 3))
    if kind not in _FILTERS:
        raise ModelError(
            f"The model's preprocessor resizes with filter {kind}.", f"Known: {', '.join(map(str, _FILTERS))}."
        )
    plain = not stated.get("do_normalize", True)
    scale = float(stated.get("rescale_factor", 1 / 255)) if stated.get("do_rescale", True) else 1.0
    return ImageReader(
        height,
        width,
        shortest,
        bool(stated.get("do_resize", True)),
        _FILTERS[kind],
        scale,
        (0.0,) * 3 if plain else tuple(stated.get("image_mean") or MEAN),
        (1.0,) * 3 if plain else tuple(stated.get("image_std") or SPREAD),
    )


def _box(size: Any, otherwise: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of a size as preprocessors write it."""
    if isinstance(size, int):
        return size, size
    if isinstance(size, Mapping) and "height" in size and "width" in size:
        return int(size["height"]), int(size["width"])
    return otherwise


def levels(image: Any) -> numpy.ndarray:
    """An image as levels 0..255, [H, W, 3], uint8; grey becomes three equal colours, transparency is left out."""
    x = _array(image)
    if x.ndim == 2:
        x = x[:, :, None]
    if x.ndim == 3 and x.shape[2] not in (1, 3, 4) and x.shape[0] in (1, 3):
        x = x.transpose(1, 2, 0)
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4) or 0 in x.shape:
        raise DataError(f"An image has the shape {x.shape}.", "Allowed: [H, W], [H, W, 1, 3 or 4] or [1 or 3, H, W].")
    x = numpy.repeat(x, 3, 2) if x.shape[2] == 1 else x[:, :, :3]
    return numpy.ascontiguousarray(_whole(x))


def _whole(x: numpy.ndarray) -> numpy.ndarray:
    """Whole levels: integers as they are, fractions times 255."""
    if x.dtype.kind not in "uifb":
        raise DataError("An image holds something that is not a number.", "Expected: 0..255, or fractions 0..1.")
    if x.dtype.kind == "b":
        return x.astype(numpy.uint8) * 255
    low, high, most = float(x.min()), float(x.max()), 1.0 if x.dtype.kind == "f" else 255.0
    if not low >= 0.0 or not high <= most:  # written so that NaN fails too
        raise DataError(
            f"An image holds numbers from {low:g} to {high:g}.",
            "Whole numbers must lie in 0..255 and fractions in 0..1.",
            action="Scale the images, or store them as whole numbers.",
        )
    return numpy.rint(x * 255).astype(numpy.uint8) if x.dtype.kind == "f" else x.astype(numpy.uint8)


def _array(image: Any) -> numpy.ndarray:
    """The numbers of an image, whatever holds it."""
    if isinstance(image, Mapping) and ("bytes" in image or "path" in image):  # an undecoded Image of datasets
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if isinstance(image, (str, Path)):
        return _file(Path(image))
    if isinstance(image, bytes):
        return _opened(io.BytesIO(image), "An encoded image")
    if isinstance(image, torch.Tensor):
        return image.detach().cpu().numpy()
    convert = getattr(image, "convert", None)
    if convert is not None:  # a PIL image
        return numpy.asarray(convert("RGB"))
    try:
        return numpy.asarray(image)
    except ValueError as fault:
        raise DataError("An image is a list whose rows differ in length.", "Expected: a full array.") from fault


def _file(path: Path) -> numpy.ndarray:
    if not path.is_file():
        raise DataError(
            f"The image file '{path}' does not exist.",
            action="Give paths that hold from where fedllm is started, or absolute ones.",
        )
    if path.suffix == ".npy":
        return numpy.load(path, allow_pickle=False)
    return _opened(path, f"The image file '{path}'")


def _opened(source: Any, what: str) -> numpy.ndarray:
    if importlib.util.find_spec("PIL") is None:
        raise MissingExtra("pillow", "images", f"{what}, to be decoded,")
    from PIL import Image

    try:
        with Image.open(source) as picture:
            return numpy.asarray(picture.convert("RGB"))
    except OSError as fault:
        raise DataError(f"{what} cannot be read: {fault}.", "JPEG, PNG and other pictures, or .npy arrays.") from fault
