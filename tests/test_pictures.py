"""Pictures of every kind are opened alike by the reader and by `cam`, and on purpose."""

import re
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision import models

pytest.importorskip("pytorch_grad_cam")

from da_ops.detection.figures import Network, draw_comparison
from da_ops.detection.pictures import open_picture, to_rgb
from da_ops.detection.voc import BadFileError

from .devkit import Devkit

# What a viewer shows of pixels stored under each orientation of EXIF.
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
LOSSLESS = {".png": {}, ".tif": {}, ".webp": {"lossless": True}}


@pytest.fixture
def devkit(tmp_path):
    return Devkit(tmp_path / "VOCdevkit")


def noise(height=48, width=60, dtype=np.uint8, channels=3):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng().integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def turned(path, pixels, orientation, **options):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(pixels).save(path, exif=exif, **options)


def read(devkit, picture, size):
    """What the reader makes of a picture whose annotation says a size, [H, W, 3]."""
    devkit.add("a", size=size)
    devkit.image("a").unlink()
    picture.rename(devkit.image("a", suffix=picture.suffix))
    return devkit.read()[0][0].permute(1, 2, 0).numpy()


# Which way round


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_pictures_are_upright(tmp_path, suffix, orientation):
    pixels = noise()
    turned(tmp_path / f"a{suffix}", pixels, orientation, **LOSSLESS[suffix])
    got = np.asarray(open_picture(tmp_path / f"a{suffix}"))
    assert np.array_equal(got, UPRIGHT[orientation](pixels))


@pytest.mark.parametrize("suffix", LOSSLESS)
@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("annotated", ["upright", "stored"])
def test_the_reader_takes_the_way_round_that_has_the_annotated_size(
    devkit, tmp_path, suffix, orientation, annotated
):
    pixels = noise()
    shown = UPRIGHT[orientation](pixels)
    turned(tmp_path / f"a{suffix}", pixels, orientation, **LOSSLESS[suffix])
    height, width = (shown if annotated == "upright" else pixels).shape[:2]
    got = read(devkit, tmp_path / f"a{suffix}", (width, height))
    # Where both have the size, boxes belong to what viewers show.
    expected = pixels if annotated == "stored" and orientation >= 5 else shown
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_squares_are_upright_in_the_reader_too(devkit, tmp_path, orientation):
    pixels = noise(50, 50)
    turned(tmp_path / "a.png", pixels, orientation)
    got = read(devkit, tmp_path / "a.png", (50, 50))
    assert np.array_equal(got, UPRIGHT[orientation](pixels))


@pytest.mark.parametrize(
    ("orientation", "height", "shown"), [(1, 60, "60x48"), (3, 60, "60x48"), (6, 61, "48x60")]
)
def test_of_another_size_it_is_named(devkit, tmp_path, orientation, height, shown):
    turned(tmp_path / "a.jpg", noise(), orientation)
    with pytest.raises(BadFileError, match=rf"a\.jpg: is {shown}, its annotation says 48x{height}"):
        read(devkit, tmp_path / "a.jpg", (48, height))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0no such thing", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0", b"x" * 9]
)
def test_broken_exif_data_says_nothing(tmp_path, exif):
    pixels = noise()
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(open_picture(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_an_unknown_orientation_says_nothing(tmp_path, orientation):
    pixels = noise()
    turned(tmp_path / "a.png", pixels, orientation)
    assert np.array_equal(open_picture(tmp_path / "a.png"), pixels)


# Grey of more than eight bits


def grey(image):
    got = np.asarray(image)
    assert got.dtype == np.uint8 and (got == got[..., :1]).all()
    return got[..., 0]


def tiff(path, pixels, bits=None, kind=1, order="<"):
    """A TIFF with one channel, of a kind of sample that Pillow does not write."""
    height, width = pixels.shape
    if bits == 12:
        pairs = pixels.reshape(-1, 2).astype(np.uint32)
        packed = (pairs[:, 0] << 12 | pairs[:, 1]).astype(">u4")
        data = packed.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()
    else:
        bits = pixels.itemsize * 8
        data = pixels.astype(f"{order}{' uif'[kind]}{pixels.itemsize}").tobytes()
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height,
            279: len(data), 339: kind}  # fmt: skip
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HI", 42, 8 + len(data))
    path.write_bytes(head + data + struct.pack(order + "H", len(tags)) + entries + bytes(4))


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jp2"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    pixels = noise(dtype=np.uint16, channels=0)
    pixels[0, :3] = 0, 65535, 257 * 100
    Image.fromarray(pixels).save(tmp_path / f"a{suffix}")
    got = grey(open_picture(tmp_path / f"a{suffix}"))
    assert np.array_equal(got, np.rint(pixels / 257)) and got[0, :3].tolist() == [0, 255, 100]


def test_the_reader_scales_sixteen_bits(devkit, tmp_path):
    pixels = noise(dtype=np.uint16, channels=0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(grey(read(devkit, tmp_path / "a.png", (60, 48))), np.rint(pixels / 257))


def test_pillows_mode_of_32_bits_may_have_16(tmp_path):
    """It takes that mode for PGM, even where the picture is dark."""
    pixels = np.arange(200, dtype=np.uint16)[None]
    (tmp_path / "a.pgm").write_bytes(b"P5 200 1 65535\n" + pixels.astype(">u2").tobytes())
    assert np.array_equal(grey(open_picture(tmp_path / "a.pgm")), np.rint(pixels / 257))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_dark_pictures_of_sixteen_bits_stay_dark(tmp_path, suffix):
    Image.fromarray(np.full((4, 5), 250, np.uint16)).save(tmp_path / f"a{suffix}")
    assert (grey(open_picture(tmp_path / f"a{suffix}")) == 1).all()


@pytest.mark.parametrize("order", ["<", ">"])
def test_bytes_in_both_orders(tmp_path, order):
    pixels = noise(dtype=np.uint16, channels=0)
    tiff(tmp_path / "a.tif", pixels, order=order)
    assert np.array_equal(grey(open_picture(tmp_path / "a.tif")), np.rint(pixels / 257))


def test_twelve_bits_are_scaled(tmp_path):
    pixels = noise(dtype=np.uint16, channels=0) >> 4
    pixels[0, :2] = 0, 4095
    tiff(tmp_path / "a.tif", pixels, bits=12)
    got = grey(open_picture(tmp_path / "a.tif"))
    assert np.array_equal(got, np.rint(pixels * (255 / 4095))) and got[0, 1] == 255


DEEP = {  # pixels, and what is black and what white
    "masks": (np.array([[0, 1, 1, 0]]), 0, 1),
    "8 bits": (np.array([[0, 1, 128, 255]]), 0, 255),
    "16 bits": (np.array([[0, 256, 300, 65000]]), 0, 65535),
    "more": (np.array([[0, 70_000, 1_000_000, 2**31 - 1]]), 0, 2**31 - 1),
    "above the signed range": (np.array([[0, 2**31, 2**32 - 1]]), 0, 2**32 - 1),
    "below": (np.array([[-1000, 0, 400, 3000]]), -1000, 3000),
    "black": (np.array([[0, 0]]), 0, 1),
    "all one": (np.array([[-7, -7]]), -7, -6),
}


def holds(dtype, pixels):
    return dtype == np.float32 or np.array_equal(pixels.astype(dtype), pixels)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for case, (pixels, _, _) in DEEP.items()
        for dtype in (np.int16, np.int32, np.uint32, np.float32)
        if holds(dtype, pixels)
    ],
)
def test_deep_grey_is_scaled(tmp_path, case, dtype):
    pixels, black, white = DEEP[case]
    kind = {"u": 1, "i": 2, "f": 3}[np.dtype(dtype).kind]
    tiff(tmp_path / "a.tif", pixels.astype(dtype), kind=kind)
    got = grey(open_picture(tmp_path / "a.tif"))
    assert np.array_equal(got, np.rint((pixels - black) * 255.0 / (white - black)))


def test_floating_point_from_0_to_1(tmp_path):
    pixels = np.random.default_rng().random((48, 60), np.float32)
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    exact = np.rint(pixels.astype(np.float64) * 255)  # a product in float32 may round to a half
    assert np.array_equal(grey(open_picture(tmp_path / "a.tif")), exact)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_not_finite_are_refused(devkit, tmp_path, value):
    pixels = np.zeros((48, 60), np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(BadFileError, match=r"a\.tif: expected an image file.*not finite.*skip-bad"):
        read(devkit, tmp_path / "a.tif", (60, 48))


def png(path, pixels):
    """A PNG of 16 bits a channel in colour, which Pillow does not write."""
    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
            for tag, data in chunks
        )
    )


def test_colour_of_sixteen_bits_is_scaled(tmp_path):
    pixels = noise(dtype=np.uint16)
    png(tmp_path / "a.png", pixels)
    got = np.asarray(open_picture(tmp_path / "a.png"))
    assert np.abs(got - pixels / 257).max() < 1.01


# Other modes


def over_white(colour, alpha):
    return colour * (alpha / 255) + 255 * (1 - alpha / 255)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_on_white(devkit, tmp_path, mode):
    pixels = noise(channels=len(mode))
    pixels[:5, :, -1], pixels[5:9, :, -1] = 0, 255
    Image.fromarray(pixels, mode).save(tmp_path / "a.png")
    got = read(devkit, tmp_path / "a.png", (60, 48))
    expected = over_white(pixels[..., :-1].astype(float), pixels[..., -1:])
    assert np.abs(got - expected).max() <= 1
    assert (got[:5] == 255).all() and (got[5:9] == pixels[5:9, :, :-1]).all()


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palettes(tmp_path, suffix):
    palette = noise(1, 4)[0]
    numbers = np.random.default_rng().integers(0, 4, (48, 60), np.uint8)
    image = Image.fromarray(numbers)
    image.putpalette(palette.tobytes())
    image.save(tmp_path / f"a{suffix}")
    assert np.array_equal(open_picture(tmp_path / f"a{suffix}"), palette[numbers])
    image.save(tmp_path / f"b{suffix}", transparency=2)
    palette[2] = 255
    assert np.array_equal(open_picture(tmp_path / f"b{suffix}"), palette[numbers])


def test_palettes_with_alpha(tmp_path):
    palette, numbers = noise(1, 4)[0], np.arange(4, dtype=np.uint8)[None].repeat(3, 0)
    image = Image.fromarray(numbers)
    image.putpalette(palette.tobytes())
    alpha = np.array([0, 100, 200, 255], np.uint8)
    image.save(tmp_path / "a.png", transparency=alpha.tobytes())
    got = np.asarray(open_picture(tmp_path / "a.png"))
    assert np.abs(got - over_white(palette.astype(float), alpha[:, None])).max() <= 1


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_colour_that_stands_for_transparency(tmp_path, mode):
    image = Image.new(mode, (2, 1), "black")
    image.putpixel((0, 0), (1, 2, 3) if mode == "RGB" else 7)
    image.save(tmp_path / "a.png", transparency=(1, 2, 3) if mode == "RGB" else 7)
    assert np.asarray(open_picture(tmp_path / "a.png")).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk(tmp_path, suffix):
    for ink, colour in {
        (0, 0, 0, 0): (255, 255, 255),
        (0, 0, 0, 255): (0, 0, 0),
        (255, 0, 0, 0): (0, 255, 255),
        (0, 100, 200, 51): (204, 124, 44),
    }.items():
        Image.new("CMYK", (16, 16), ink).save(tmp_path / f"a{suffix}")
        got = np.asarray(open_picture(tmp_path / f"a{suffix}"))
        assert got.shape == (16, 16, 3) and np.abs(got - np.array(colour)).max() <= 2


def test_bilevel_pictures(tmp_path):
    Image.fromarray(np.eye(9, dtype=bool)).save(tmp_path / "a.png")
    assert np.array_equal(grey(open_picture(tmp_path / "a.png")), 255 * np.eye(9))


# Who opens them


def test_networks_see_images_of_every_kind():
    network = Network(nn.Identity(), "none", ("background", "a"), detector=True)
    pixels = noise(dtype=np.uint16, channels=0)
    expected = torch.from_numpy(np.rint(pixels / 257) / 255).float().expand(3, -1, -1)
    torch.testing.assert_close(network.see(Image.fromarray(pixels)), expected)
    torch.testing.assert_close(network.see(to_rgb(Image.fromarray(pixels))), expected)


def test_cam_draws_what_viewers_show(tmp_path):
    """The very picture that is drawn of the same pixels, stored upright in RGB of 8 bits."""
    torch.manual_seed(0)
    network = Network(models.resnet18().eval(), "ResNet", tuple(map(str, range(1000))), False)
    kinds = ("plain", "turned", "deep", "transparent")
    paths = {kind: tmp_path / kind / "a $^$.png" for kind in kinds}  # no formula in its title
    for path in paths.values():
        path.parent.mkdir()
    pixels = noise()
    pixels[..., 1:] = pixels[..., :1]
    pixels[:20] = 255
    alpha = np.repeat(np.uint8([0, 255]), [20, 28])[:, None, None]
    hidden = np.where(alpha == 0, np.uint8(7), pixels)
    turned(paths["turned"], np.ascontiguousarray(np.rot90(pixels)), 6)
    Image.fromarray(pixels[..., 0] * np.uint16(257)).save(paths["deep"])
    Image.fromarray(np.dstack([hidden, alpha.repeat(60, 1)])).save(paths["transparent"])
    Image.fromarray(pixels).save(paths["plain"])
    drawings = []
    for path in paths.values():
        draw_comparison([path], [network], tmp_path / "out.png", label="3")
        drawings.append((tmp_path / "out.png").read_bytes())
    assert len(set(drawings)) == 1


def test_cam_names_what_it_cannot_read(tmp_path):
    turned(tmp_path / "a.jpg", noise(), 6)
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-300])
    with pytest.raises(ValueError, match=r"a\.jpg: expected an image file, got one that"):
        draw_comparison([tmp_path / "a.jpg"], [], tmp_path / "out.png")
    with pytest.raises(FileNotFoundError, match=r"b\.jpg: there is no such file"):
        draw_comparison([tmp_path / "b.jpg"], [], tmp_path / "out.png")


KINDS = [".jpg", ".png", ".gif", ".tif", ".bmp", ".webp", ".jp2", ".pgm"]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("suffix", KINDS)
def test_broken_pictures_are_named(tmp_path, suffix, monkeypatch):
    """Whatever the damage: a picture, or one error that names the file."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)  # for speed
    draw = np.random.default_rng(0)
    path = tmp_path / f"a{suffix}"
    Image.fromarray(noise()).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    message = f"{path}: expected an image file, got one that cannot be read"
    with pytest.raises(ValueError, match=re.escape(message)):
        open_picture(path)
    for _ in range(20):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[draw.integers(min(len(damaged), 200))] = draw.integers(256)
        path.write_bytes(bytes(damaged))
        try:
            fine = open_picture(path).mode == "RGB"
        except ValueError as error:
            fine = str(error).startswith(message)
        assert fine
