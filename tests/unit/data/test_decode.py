"""Every odd picture strangers store, against what a viewer would show."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm.data.captions import captions_of
from ldm.data.decode import BadSample, picture
from ldm.data.images import resize, to_float, to_uint8


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def reason(data: bytes, **options: int) -> str:
    with pytest.raises(BadSample) as info:
        picture(data, **options)
    return info.value.reason


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 48, 3), np.uint8))


def test_bad_bytes_have_reasons() -> None:
    jpeg, png = saved(NOISE, "JPEG"), saved(NOISE, "PNG")
    assert reason(b"") == "empty"
    assert reason(b"<html>not found</html>") == "unknown_format"
    assert reason(jpeg[: len(jpeg) // 2]) == "damaged"
    assert reason(png[: len(png) // 2]) == "damaged"
    spoiled = bytearray(png)
    spoiled[len(png) // 2] ^= 0xFF
    assert reason(bytes(spoiled)) == "damaged"
    assert reason(png[:20]) in ("damaged", "unknown_format")


def test_bombs_are_refused_before_they_are_decoded() -> None:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    def bomb(side: int) -> bytes:
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")

    assert reason(bomb(20_000)) == "huge"
    assert reason(bomb(2000), max_pixels=1_000_000) == "huge"


def test_cmyk_and_grey() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = np.asarray(picture(saved(cmyk, "JPEG")))[4, 4]
    assert red[0] > 200
    assert max(red[1], red[2]) < 60
    assert np.asarray(picture(saved(Image.new("L", (8, 8), 77), "PNG")))[0, 0].tolist() == [77, 77, 77]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    shown = np.asarray(picture(saved(Image.fromarray(ramp), "PNG")))[0, :, 0].astype(int)
    assert np.abs(shown - np.arange(256)).max() <= 1


def test_transparency_is_white() -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 1), 1)
    shown = np.asarray(picture(saved(palette, "PNG", transparency=0)))
    assert shown[0, 0].tolist() == [255, 255, 255]
    assert shown[1, 1].tolist() == [0, 0, 255]
    half = np.asarray(picture(saved(Image.new("RGBA", (4, 4), (0, 0, 0, 128)), "PNG")))[0, 0]
    assert abs(int(half[0]) - 127) <= 1
    grey = np.asarray(picture(saved(Image.new("LA", (4, 4), (0, 0)), "PNG")))[0, 0]
    assert grey.tolist() == [255, 255, 255]
    keyed = np.asarray(picture(saved(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3))))[0, 0]
    assert keyed.tolist() == [255, 255, 255]


def test_exif_rotation_is_applied() -> None:
    wide = Image.new("RGB", (32, 16), (255, 255, 255))
    wide.paste((255, 0, 0), (0, 0, 16, 16))  # left half red
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    shown = picture(saved(wide, "JPEG", exif=exif, quality=95))
    assert shown.size == (16, 32)
    assert np.asarray(shown)[4, 8, 1] < 40  # red is on top now
    assert np.asarray(shown)[28, 8, 1] > 215


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), c) for c in ((250, 0, 0), (0, 250, 0))]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    shown = np.asarray(picture(data))[4, 4]
    assert shown[0] > 200
    assert shown[1] < 60


def test_one_pixel_and_extreme_shapes_become_squares() -> None:
    for size in ((1, 1), (1, 500), (2000, 3)):
        image = picture(saved(Image.new("RGB", size, (10, 200, 30)), "PNG"))
        for fit in ("crop", "pad", "stretch"):
            out = resize(image, (16, 16), fit)
            assert out.width >= 16
            assert out.height >= 16
            if fit != "crop":
                assert out.size == (16, 16)
            if fit != "pad" or size[0] == size[1]:
                assert np.asarray(out)[out.height // 2, out.width // 2].tolist() == [10, 200, 30]


def test_a_line_of_twenty_thousand_pixels_stays_small() -> None:
    """Covering 512 x 512 with it would take 512 x 10 million pixels; its middle is enough."""
    values = np.zeros((1, 20_000, 3), np.uint8)
    values[:, 9_000:11_000] = (0, 200, 0)
    line = Image.fromarray(values)
    for image, size in ((line, (512, 512)), (line.transpose(Image.Transpose.ROTATE_90), (64, 128))):
        out = resize(picture(saved(image, "PNG")), size, "crop")
        assert out.width >= size[0]
        assert out.height >= size[1]
        assert out.width * out.height <= 17 * size[0] * size[1]
        assert np.asarray(out)[out.height // 2, out.width // 2].tolist() == [0, 200, 0]
    wide = Image.new("RGB", (10_000, 650), (9, 9, 9))
    assert resize(picture(saved(wide, "PNG")), (8, 8), "crop").size == (123, 8)  # an ordinary strip is whole


def test_draft_keeps_the_target_covered() -> None:
    smooth = Image.linear_gradient("L").resize((1024, 512)).convert("RGB")
    data = saved(smooth, "JPEG", quality=95)
    small = picture(data, at_least=(64, 64))
    assert min(small.size) >= 64
    assert small.width < 1024
    a = np.asarray(resize(small, (64, 64), "stretch"), float)
    b = np.asarray(resize(picture(data), (64, 64), "stretch"), float)
    assert np.abs(a - b).max() < 4


def test_float_range_round_trips() -> None:
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, 3)
    images = to_float(values)
    assert images.min() == -1
    assert images.max() == 1
    assert (to_uint8(images) == values).all()


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"txt": b"a dog \n"}, "a dog"),
        ({"json": b'{"caption": "x", "url": "y"}', "txt": b"z"}, "x"),
        ({"json": b'{"caption": null}', "txt": "caf\u00e9".encode()}, "café"),
        ({"json": b'{"captions": ["p", ["q", 2]]}'}, "p"),
    ],
)
def test_captions_are_found(members: dict[str, bytes], expected: str) -> None:
    assert captions_of(members)[0].texts[0] == expected


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({}, "no_caption"),
        ({"txt": b"  "}, "no_caption"),
        ({"txt": b"caf\xe9"}, "not_utf8"),
        ({"json": b"{"}, "bad_json"),
        ({"json": b"[1]"}, "bad_json"),
        ({"json": b'{"captions": [1]}'}, "bad_json"),
    ],
)
def test_bad_captions_have_reasons(members: dict[str, bytes], why: str) -> None:
    with pytest.raises(BadSample) as info:
        captions_of(members)
    assert info.value.reason == why
