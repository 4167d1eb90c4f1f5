"""Opens pictures of any kind, for data sets and for whatever else looks at a photograph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# A list leaves the suffix out: the first of these that there is counts. VOC itself has JPEG.
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")

_ORIENTATION = 274  # the tag of EXIF and of TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {  # of those that swap width and height
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
_BITS, _KIND, _UNSIGNED = 258, 339, 1  # TIFF's tags of a sample, and a value of the second


def open_picture(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """A decoded picture in RGB of 8 bits, turned as its EXIF data says, the way viewers show it.

    Args:
        size: width and height that its boxes were drawn for. Some tools for that ignore EXIF: if
            the picture has this size as it is stored, and not when turned, it is returned as it
            is stored. Where both have it (a square, a half turn, a mirror image) it is turned,
            for browsers and most tools show it so, and boxes are drawn on what is shown. The same
            goes where neither has it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read as a picture; the message names it.
    """
    try:
        with Image.open(path) as file:
            # Pillow itself turns a TIFF as it loads it, and may then forget that it did.
            tiff = file.format == "TIFF"
            orientation = _orientation(file) if tiff else 1
            picture = to_rgb(file)
            if not tiff:
                orientation = _orientation(file)  # after loading: some PNGs say it at their end
                if orientation in _UPRIGHT:
                    picture = picture.transpose(_UPRIGHT[orientation])
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except Exception as error:  # Pillow's decoders raise many kinds, even MemoryError
        reason = str(error) or type(error).__name__
        raise ValueError(
            f"{path}: expected an image file, got one that cannot be read ({reason})"
        ) from None
    if size and picture.size != size and picture.size[::-1] == size and orientation in _BACK:
        return picture.transpose(_BACK[orientation])
    return picture


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes in RGB, 8 bits a channel.

    - Grey of 16 bits is scaled by 255/65535 (of 12 bits, in TIFF, by 255/4095).
    - Grey of 32 bits, whole numbers or floating point, has no agreed white. White is the first of
      1, 255 and 65535 that no pixel exceeds, and black is 0; if there are pixels below 0 or above
      65535, the least is black and the greatest white.
    - What is transparent lies on white, as on a page; dropping alpha would show colours that
      nobody was meant to see.
    - CMYK becomes (255 - C)(255 - K) / 255 and so on, without regard to a profile of colours; a
      JPEG's is taken to be inverted, as Adobe writes it.
    - Palettes and all else are converted by Pillow.

    Raises:
        ValueError: floating-point pixels that are not finite.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return Image.fromarray(_eight_bits(image)).convert("RGB")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        above = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), above)
    return image.convert("RGB")


def _orientation(file: Image.Image) -> Any:
    try:
        return file.getexif().get(_ORIENTATION, 1)
    except Exception:  # of many kinds; broken EXIF data says nothing, and the picture may be whole
        return 1


def _eight_bits(image: Image.Image) -> np.ndarray:
    """Deep grey as uint8 [H, W]."""
    grey = np.asarray(image)
    tags: Any = getattr(image, "tag_v2", {})  # a TIFF's
    bits = tags.get(_BITS, (16,))[0]
    if grey.dtype == np.int32 and (bits, tags.get(_KIND, (_UNSIGNED,))[0]) == (32, _UNSIGNED):
        grey = grey.view(np.uint32)  # Pillow has no mode for these
    values = grey.astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("its pixels are not finite numbers")
    low, high = values.min(), values.max()
    # Pillow opens some files of 16 bits in mode I, which has 32.
    if image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):
        low, high = 0, 2**bits - 1
    elif low >= 0 and high <= 65535:
        low, high = 0, next(white for white in (1, 255, 65535) if high <= white)
    scaled: np.ndarray = np.rint((values - low) * (255 / (high - low or 1)))
    return scaled.astype(np.uint8)
