"""Pictures for tests."""

import io

from PIL import Image


def png(color: tuple[int, int, int], size: tuple[int, int] = (12, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def color_of(number: int) -> tuple[int, int, int]:
    return number % 256, number * 7 % 256, number * 13 % 256
