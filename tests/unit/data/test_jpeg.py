"""All decoders give the same pixels; what is not plain goes PIL's way; the fast resize is PIL's but for rounding."""

import importlib.util
import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data import decode, jpeg
from ldm.data.decode import BadSample
from ldm.data.images import Fit, fit_pixels, resize

INSTALLED = [d for d in ("simplejpeg", "torchvision") if importlib.util.find_spec(d)]


def picture(width: int, height: int, kind: str = "RGB", seed: int = 0, grain: int = 6) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (max(height // grain, 2), max(width // grain, 2), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(kind)


def saved(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def viewer(data: bytes, size: tuple[int, int] | None = None) -> np.ndarray:
    """PIL alone."""
    image = Image.open(io.BytesIO(data))
    if size is not None:
        image.draft("RGB", size)
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("decoder", [*INSTALLED, "pil"])
@pytest.mark.parametrize("options", [{"subsampling": s} for s in (0, 1, 2)] + [{"progressive": True}, {"quality": 30}])
@pytest.mark.parametrize("size", [(64, 48), (301, 203), (17, 9), (1, 1)])
def test_every_decoder_gives_pils_pixels(
    decoder: jpeg.Decoder, options: dict[str, object], size: tuple[int, int]
) -> None:
    data = saved(picture(*size), **options)
    found = jpeg.header(data)
    assert found == jpeg.Header(*size)
    assert np.array_equal(jpeg.pixels(data, found, 1, decoder), viewer(data))
    if decoder == "torchvision":
        return
    for scale in (2, 4, 8):
        if min(size) >= scale:
            expected = viewer(data, (size[0] // scale, size[1] // scale))
            assert expected.shape[:2] == found.scaled(scale)
            assert np.array_equal(jpeg.pixels(data, found, scale, decoder), expected)


def test_reduced_decoding_covers_the_target_and_stays_true() -> None:
    data = saved(picture(1000, 600, grain=24), quality=95)
    for target, size in (
        ((256, 256), (500, 300)),
        ((500, 300), (500, 300)),
        ((501, 300), (1000, 600)),
        ((60, 60), (125, 75)),
    ):
        values, whole = decode.upright(data, at_least=target)
        assert whole == (1000, 600)
        assert values.shape == (size[1], size[0], 3)
    values, _ = decode.upright(data, at_least=(256, 256))
    reduced = fit_pixels(values, (256, 256), "stretch").astype(float)
    exact = np.asarray(Image.fromarray(viewer(data)).resize((256, 256), Image.Resampling.BICUBIC), float)
    assert np.abs(reduced - exact).mean() < 0.6
    assert abs(reduced.std() - exact.std()) < 0.005 * exact.std()  # no blur


def test_what_is_not_plain_goes_pils_way() -> None:
    """Turned, CMYK, grey and RGB-coded pictures have no plain header, and come out as a viewer shows them."""
    turned = Image.Exif()
    turned[0x0112] = 6
    upright_exif = Image.Exif()
    upright_exif[0x0112], upright_exif[0x010F] = 1, "maker"
    assert jpeg.header(saved(picture(40, 20), exif=upright_exif)) == jpeg.Header(40, 20)
    for data in (
        saved(picture(40, 20), exif=turned),
        saved(picture(40, 20, "CMYK")),
        saved(picture(40, 20, "L")),
        saved(picture(40, 20), keep_rgb=True),
        b"",
        b"\xff\xd8",
        b"\xff\xd8\xff\xe1\xff\xff",
        b"\x89PNG",
    ):
        assert jpeg.header(data) is None
    values, size = decode.upright(saved(picture(40, 20), exif=turned))
    assert values.shape == (40, 20, 3)
    assert size == (20, 40)
    keep, _ = decode.upright(saved(picture(40, 20), keep_rgb=True, quality=95))
    assert np.abs(keep.astype(float) - np.asarray(picture(40, 20), float)).mean() < 4


@pytest.mark.parametrize("decoder", [*INSTALLED, "pil"])
def test_damage_is_found_by_every_decoder(decoder: jpeg.Decoder) -> None:
    data = saved(picture(300, 200))
    for part in (len(data) // 3, len(data) // 2, len(data) * 9 // 10):
        found = jpeg.header(data[:part])
        assert found is not None
        assert jpeg.pixels(data[:part], found, 1, decoder) is None
        with pytest.raises(BadSample) as info:
            decode.upright(data[:part])
        assert info.value.reason == "damaged"
    with pytest.raises(BadSample) as info:
        decode.upright(data, max_pixels=1000)
    assert info.value.reason == "huge"


@given(
    st.integers(1, 400),
    st.integers(1, 400),
    st.integers(1, 120),
    st.integers(1, 120),
    st.sampled_from(["crop", "pad", "stretch"]),
)
@settings(max_examples=40, deadline=None)
def test_the_fast_resize_is_pils_but_for_rounding(width: int, height: int, w: int, h: int, fit: Fit) -> None:
    image = picture(width, height, seed=width)
    ours = fit_pixels(np.asarray(image), (w, h), fit).astype(int)
    theirs = np.asarray(resize(image, (w, h), fit)).astype(int)
    assert ours.shape == theirs.shape
    assert (
        np.abs(ours - theirs).max(initial=0) <= 12
    )  # both passes round, with weights of 16 bits; 8 was the worst of 500
    assert np.abs(ours - theirs).mean() < 0.5


@pytest.mark.parametrize("height", [1, 2, 3, 7])
def test_a_column_one_pixel_wide_is_pils(height: int) -> None:
    """torch's own is up to 190 levels off there where it has no AVX2: set ATEN_CPU_CAPABILITY=default to see it."""
    image = picture(31, 42, seed=height)
    ours = fit_pixels(np.asarray(image), (1, height), "stretch").astype(int)
    assert np.abs(ours - np.asarray(resize(image, (1, height), "stretch")).astype(int)).max() <= 1
