"""What people store as pictures, through every door: rotation, broken notes, profiles, masks, other formats."""

import io
import re
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from ldm.cli.__main__ import main
from ldm.data import colour, decode, jpeg
from ldm.data.decode import BadSample
from ldm.data.formats import IMAGES, UNREAD, passed_over

rng = np.random.default_rng(0)
SMOOTH = Image.fromarray(rng.integers(0, 255, (4, 6, 3), np.uint8)).resize((48, 32), Image.Resampling.BICUBIC)
HALVES = Image.new("RGB", (32, 16), (0, 0, 255))  # left red, right blue
HALVES.paste((255, 0, 0), (0, 0, 16, 16))


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def seen(data: bytes) -> np.ndarray:
    """The picture, the same through the fast door and the plain one."""
    fast, size = decode.upright(data)
    assert np.array_equal(fast, np.asarray(decode.picture(data)))
    assert size == decode.upright_size(data) == (fast.shape[1], fast.shape[0])
    return fast.astype(int)


def turned(number: int) -> np.ndarray:
    """What EXIF 2.3, table 6 means by an orientation, by indexing rows and columns."""
    a = np.asarray(HALVES).astype(int)
    rows = {1: a, 2: a[:, ::-1], 3: a[::-1, ::-1], 4: a[::-1]}
    flipped = a.transpose(1, 0, 2)
    return {**rows, 5: flipped, 6: flipped[:, ::-1], 7: flipped[::-1, ::-1], 8: flipped[::-1]}[number]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("number", range(1, 9))
def test_every_orientation_of_every_format(kind: str, number: int) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    exif = Image.Exif()
    exif[0x0112] = number
    data = saved(HALVES, kind, exif=exif, **({"quality": 100} if kind != "TIFF" else {}))
    shown, expected = seen(data), turned(number)
    assert shown.shape == expected.shape
    assert np.abs(shown - expected).mean() < 12


def test_sizes_of_pngs_are_told_without_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets ask a folder's headers; a rotation behind the pixels is found all the same."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(HALVES, "PNG")
    behind = data[:-12] + chunk(b"eXIf", exif.tobytes()[6:]) + data[-12:]
    assert decode.upright_size(behind) == (16, 32)
    assert seen(behind).shape == (32, 16, 3)
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    assert decode.upright_size(data) == (32, 16)


def jpeg_with(marker: int, body: bytes) -> bytes:
    plain = saved(HALVES, "JPEG", quality=95)
    return plain[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body + plain[2:]


def test_orientation_in_xmp_is_the_same_on_both_ways() -> None:
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>'
    assert seen(jpeg_with(0xE1, xmp % 6)).shape == (32, 16, 3)
    assert jpeg.header(jpeg_with(0xE1, xmp % 1)) is not None


def ifd(value: bytes, kind: int = 3, count: int = 1) -> bytes:
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x0112, kind, count) + value + b"\0\0\0\0"


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        (b"Exif\0\0" * 2 + ifd(b"\1\0\0\0"), (16, 32)),  # python-pillow/Pillow#8348
        (b"Exif\0\0" + ifd(b"abc\0", kind=2, count=4), (16, 32)),  # python-pillow/Pillow#4238
        (b"Exif\0\0" + ifd(b"\6\0\6\0", count=2), (32, 16)),
        (b"Exif\0\0" + ifd(b"\x09\0\0\0"), (16, 32)),
        (b"Exif\0\0" + ifd(b"\0\0\0\0"), (16, 32)),
        (b"Exif\0\0" + ifd(b"\6\0\0\0", kind=4), (32, 16)),
        (b"Exif\0\0" + ifd(b"\xff\xff\xff\x7f", kind=5, count=0x7FFFFFFF), (16, 32)),
        (b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01", (16, 32)),
        (b"Exif\0\0" + bytes(range(200)), (16, 32)),
        (b"Exif\0\0", (16, 32)),
    ],
)
def test_broken_exif_never_costs_the_picture(body: bytes, shape: tuple[int, int]) -> None:
    shown = seen(jpeg_with(0xE1, body))
    assert shown.shape[:2] == shape


def test_broken_exif_is_not_talked_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "odd.jpg"
    path.write_bytes(jpeg_with(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert main(["show", "noising", str(path), "--out", str(tmp_path / "out"), "--schedule", "linear"]) == 0
    assert [w for w in caught if "PIL" in w.filename] == []
    assert capsys.readouterr().err == ""


def chunk(name: bytes, body: bytes, *, broken: bool = False) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) ^ broken)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "note",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"a" * 3_000_000)),  # more than Pillow takes of a text
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(b" " * 3_000_000)),
        chunk(b"tEXt", b"Comment\0hello", broken=True),
        chunk(b"iCCP", b"icc\0\0" + b"no zlib"),
        chunk(b"eXIf", b"II*\0\xff\xff\xff\x7f"),
    ],
)
def test_broken_notes_never_cost_a_png(note: bytes, after: bool) -> None:
    data = saved(SMOOTH, "PNG")
    at = len(data) - 12 if after else 33
    spoiled = data[:at] + note + data[at:]
    assert np.array_equal(seen(spoiled), np.asarray(SMOOTH).astype(int))


def test_a_jpeg_whose_segments_are_broken_is_read_without_them() -> None:
    """IPTC and a preview that lie about themselves."""
    data = jpeg_with(0xED, b"Photoshop 3.0\0" + b"8BIM\x04\x04\xff" + bytes(7))
    assert np.abs(seen(data) - np.asarray(HALVES).astype(int)).mean() < 8


def adobe_rgb() -> bytes:
    """A matrix profile of Adobe RGB (1998)'s primaries and gamma 2.2 (ICC.1:2010, 8.3.3), built by hand."""

    def s15(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(v * 65536)) for v in values)

    xyz = lambda *v: b"XYZ \0\0\0\0" + s15(*v)  # noqa: E731
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.19921875 * 256)) + b"\0\0"
    red, green, blue = (0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)
    tags = [(b"desc", text), (b"wtpt", xyz(0.9642, 1.0, 0.8249)), (b"rXYZ", xyz(*red)), (b"gXYZ", xyz(*green))]
    tags += [(b"bXYZ", xyz(*blue)), (b"rTRC", curve), (b"gTRC", curve), (b"bTRC", curve), (b"cprt", text)]
    place, table, bodies = 128 + 4 + 12 * len(tags), b"", b""
    for name, body in tags:
        body += bytes(-len(body) % 4)
        table += name + struct.pack(">II", place + len(bodies), len(body))
        bodies += body
    size = place + len(bodies)
    head = struct.pack(">I4sI4s4s4s", size, b"lcms", 0x02400000, b"mntr", b"RGB ", b"XYZ ") + bytes(12) + b"acsp"
    head += bytes(28) + s15(0.9642, 1.0, 0.8249)
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + bodies


def to_srgb_by_formula(values: np.ndarray) -> np.ndarray:
    """Adobe RGB -> sRGB in float64 from the two standards' D50 matrices and curves (relative colorimetric)."""
    adobe = np.array([[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]])
    srgb = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])
    linear = (values / 255.0) ** 2.19921875 @ adobe.T @ np.linalg.inv(srgb).T
    linear = linear.clip(0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_profiles_become_srgb_by_the_standards_formulae() -> None:
    """A picture in Adobe RGB: what a viewer shows, also of a JPEG on the fast way."""
    values = rng.integers(60, 200, (16, 24, 3)).astype(np.uint8)
    image = Image.fromarray(values)
    expected = to_srgb_by_formula(values.astype(float))
    shown = seen(saved(image, "PNG", icc_profile=adobe_rgb()))
    assert np.abs(shown - expected).max() < 2.5
    assert np.abs(shown - values).mean() > 5  # it is not a profile that changes nothing
    flat = Image.new("RGB", (16, 16), (120, 150, 110))
    data = saved(flat, "JPEG", icc_profile=adobe_rgb(), quality=100, subsampling=0)
    assert jpeg.header(data) is None
    want = to_srgb_by_formula(np.array([120.0, 150.0, 110.0]))
    assert np.abs(seen(data)[8, 8] - want).max() < 4
    opaque = Image.fromarray(np.dstack([values, np.full((16, 24), 255, np.uint8)]))
    assert np.array_equal(seen(saved(opaque, "PNG", icc_profile=adobe_rgb())), shown)


def test_srgb_and_broken_profiles_change_nothing() -> None:
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert colour.is_srgb(own)
    assert not colour.is_srgb(adobe_rgb())
    data = saved(SMOOTH, "JPEG", quality=90, icc_profile=own)
    assert jpeg.header(data) is not None  # still the fast way
    for profile in (own, b"garbage", adobe_rgb()[:200]):
        assert np.array_equal(seen(saved(SMOOTH, "PNG", icc_profile=profile)), np.asarray(SMOOTH).astype(int))
    grey = Image.new("L", (8, 8), 90)  # a grey picture with a colour profile, as scanners write
    assert seen(saved(grey, "PNG", icc_profile=adobe_rgb()))[0, 0].tolist() == [90, 90, 90]


def test_deep_pictures_are_scaled_by_their_full_scale() -> None:
    ramp = np.linspace(0, 1, 256)[None].repeat(4, 0)
    for values, kind in (
        ((ramp * 65535).astype(np.uint16), "PNG"),
        ((ramp * 65535).astype(np.uint16), "TIFF"),
        ((ramp * 65535).astype(np.int32), "TIFF"),
        ((ramp * (2**31 - 1)).astype(np.int32), "TIFF"),
        (ramp.astype(np.float32), "TIFF"),
        ((ramp * 255).astype(np.float32), "TIFF"),
        ((ramp * 255).astype(np.int32), "TIFF"),
        ((ramp * 65535).astype(np.float32), "TIFF"),
    ):
        shown = seen(saved(Image.fromarray(values), kind))[0, :, 0]
        assert np.abs(shown - np.arange(256)).max() <= 1, (values.dtype, values.max(), kind)
    keyed = seen(saved(Image.fromarray(np.array([[300, 60_000]], np.uint16)), "PNG", transparency=300))
    assert keyed[0, :, 0].tolist() == [255, 233]
    dark = saved(Image.fromarray(np.full((4, 4), 200, np.uint16)), "PNG")  # 200 of 65535 is black
    assert seen(dark).max() <= 1


def png16(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel, (H, W, 3), which Pillow reads and does not write."""
    raw = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_sixteen_bits_of_colour_are_scaled() -> None:
    values = rng.integers(0, 65536, (8, 9, 3)).astype(np.uint16)
    assert np.abs(seen(png16(values)) - values / 257.0).max() <= 1


def test_masks_are_brightness_times_opacity() -> None:
    """What is not painted is black: transparent white (Mikubill/sd-webui-controlnet#3079), black, grey, any mode."""
    alpha = np.zeros((16, 16), np.uint8)
    alpha[4:12, 4:12] = 255
    white, black = np.full((16, 16), 255, np.uint8), np.zeros((16, 16), np.uint8)
    painted = Image.fromarray(alpha)
    rgba = Image.merge("RGBA", [Image.fromarray(white)] * 3 + [painted])
    exif = Image.Exif()
    exif[0x0112] = 6
    corner = np.zeros((16, 32), np.uint8)
    corner[:8, :8] = 255  # upper left, stored; upper right when turned clockwise
    forms = {
        "rgba": (saved(rgba, "PNG"), alpha),
        "webp": (saved(rgba, "WEBP", lossless=True), alpha),
        "la": (saved(Image.merge("LA", [Image.fromarray(white), painted]), "PNG"), alpha),
        "black under it": (saved(Image.merge("RGBA", [painted] * 3 + [painted]), "PNG"), alpha),
        "opaque": (saved(Image.merge("RGBA", [painted] * 3 + [Image.fromarray(white)]), "PNG"), alpha),
        "black paint": (saved(Image.merge("RGBA", [Image.fromarray(black)] * 3 + [painted]), "PNG"), black),
        "grey": (saved(painted, "PNG"), alpha),
        "one bit": (saved(painted.convert("1"), "PNG"), alpha),
        "palette": (saved(painted.convert("P"), "PNG"), alpha),
        "palette and transparency": (saved(rgba.quantize(8), "PNG"), alpha),
        "rgb": (saved(painted.convert("RGB"), "PNG"), alpha),
        "16 bit": (saved(Image.fromarray(alpha.astype(np.uint16) * 257), "PNG"), alpha),
        "turned": (saved(Image.fromarray(corner), "PNG", exif=exif), np.rot90(corner, -1)),
    }
    for name, (data, expected) in forms.items():
        found = decode.mask(data)
        assert found.mode == "L"
        assert np.abs(np.asarray(found, int) - expected.astype(int)).max() <= 1, name
    half = Image.merge("RGBA", [Image.new("L", (4, 4), 200)] * 3 + [Image.new("L", (4, 4), 128)])
    assert abs(int(np.asarray(decode.mask(saved(half, "PNG")))[0, 0]) - 200 * 128 / 255) <= 1


def test_a_white_stencil_stands_on_black_where_it_is_asked_for(tmp_path: Path) -> None:
    shape = Image.new("L", (8, 8), 0)
    shape.paste(255, (2, 2, 6, 6))
    path = tmp_path / "stencil.png"
    Image.merge("RGBA", [Image.new("L", (8, 8), 255)] * 3 + [shape]).save(path)
    assert np.asarray(decode.load(path)).min() == 255
    assert np.array_equal(np.asarray(decode.load(path, stencil=True).convert("L")), np.asarray(shape))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "JPEG XL"),
        (b"8BPS\0\1" + bytes(40), "Photoshop"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b"II*\0\x10\0\0\0CR\2\0" + bytes(40), "raw"),
        (b"\0\0\0\x18ftypqt  \0\0\0\0qt  ", "video"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "EPS"),
    ],
)
def test_formats_that_are_not_read_are_named(data: bytes, what: str) -> None:
    for door in (decode.picture, decode.upright, decode.upright_size, decode.mask, decode.decoded):
        with pytest.raises(BadSample, match=what) as info:
            door(data)
        assert info.value.reason == "unsupported"
        assert "convert it to PNG or JPEG" in info.value.detail


def test_what_a_sample_holds_instead_of_a_picture_is_said() -> None:
    with pytest.raises(BadSample, match="HEIC is not read here") as info:
        decode.image_member({"heic": b"x", "txt": b"y"})
    assert info.value.reason == "unsupported"
    with pytest.raises(BadSample) as info:
        decode.image_member({"txt": b"y"})
    assert info.value.reason == "no_picture"
    assert set(IMAGES).isdisjoint(UNREAD)


def test_animations_say_so_and_phones_double_pictures_do_not() -> None:
    frames = [Image.new("RGB", (8, 8), (c, 9, 9)) for c in (250, 20, 90)]
    for kind in ("GIF", "WEBP", "PNG"):
        found = decode.decoded(saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50))
        assert found.frames == 3
        assert not found.plain
    pages = decode.decoded(saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]))
    assert pages.frames == 3
    phone = decode.decoded(saved(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=95))
    assert phone.frames == 1
    assert decode.decoded(saved(SMOOTH, "JPEG")).plain
    assert not decode.decoded(saved(SMOOTH, "PNG", icc_profile=adobe_rgb())).plain


@pytest.mark.parametrize(
    ("name", "over"),
    [
        ("a.jpg", False),
        ("./a/b.jpg", False),
        ("a..b/c.jpg", False),
        (".a.jpg", True),
        ("x/._a.jpg", True),
        ("./._a.jpg", True),
        ("__MACOSX/x/a.jpg", True),
        ("x/__MACOSX/a.jpg", True),
        ("x/Thumbs.db", True),
        ("desktop.ini", True),
        (".DS_Store", True),
        ("@eaDir/a.jpg/SYNOPHOTO_THUMB_M.jpg", True),
        ("Icon\r", True),
    ],
)
def test_what_systems_leave_is_no_sample(name: str, over: bool) -> None:
    assert passed_over(name) is over


def test_no_other_place_opens_pictures() -> None:
    """`Image.open`, and libraries' own readers, stand in the two rooms that decode."""
    root = Path(decode.__file__).parents[1]
    reads = re.compile(r"Image\.open|decode_image|read_image|io\.imread|decode_jpeg|Image import open")
    found = {p.relative_to(root).as_posix() for p in root.rglob("*.py") if reads.search(p.read_text("utf-8"))}
    assert found == {"data/decode.py", "data/jpeg.py"}
