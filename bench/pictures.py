"""What bench.data compares: JPEG decoders, and other packages' ways from shards to batches of the same pictures."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from webdataset.compat import WebDataset

from ldm.data import decode, jpeg
from ldm.data.images import fit_pixels, resize

Pixels = NDArray[np.uint8]
PACKAGES = {"simplejpeg": "simplejpeg", "opencv": "cv2", "pyvips": "pyvips", "torchvision": "torchvision"}


def installed(module: str) -> bool:
    """Whether a package can be imported, without importing it."""
    return importlib.util.find_spec(module) is not None


def decoders(size: int) -> dict[str, Callable[[bytes], Pixels]]:
    """By name: JPEG bytes -> (H, W, 3) uint8 that covers size x size, each by its package's own quickest way."""

    def ours(name: jpeg.Decoder) -> Callable[[bytes], Pixels]:
        def run(data: bytes) -> Pixels:
            found = jpeg.header(data)
            assert found is not None
            scale = 1 if name == "torchvision" else jpeg.scale_for(found, (size, size))
            values = jpeg.pixels(data, found, scale, name)
            assert values is not None
            return fit_pixels(values, (size, size), "crop")

        return run

    found: dict[str, Callable[[bytes], Pixels]] = {
        "PIL, PIL's resize": lambda data: np.asarray(
            resize(decode.picture(data, at_least=(size, size)), (size, size), "crop")
        ),
        "PIL": ours("pil"),
        "chosen": lambda data: fit_pixels(decode.upright(data, at_least=(size, size))[0], (size, size), "crop"),
    }
    if installed("torchvision"):
        found["torchvision"] = ours("torchvision")
    if installed("simplejpeg"):
        found["simplejpeg"] = ours("simplejpeg")
    if installed("cv2"):
        found["opencv"] = _opencv(size)
    if installed("pyvips"):
        found["pyvips"] = _pyvips(size)
    return found


def _opencv(size: int) -> Callable[[bytes], Pixels]:
    import cv2

    cv2.setNumThreads(1)

    def run(data: bytes) -> Pixels:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        scale = size / min(image.shape[:2])
        return cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)

    return run


def _pyvips(size: int) -> Callable[[bytes], Pixels]:
    import pyvips

    def run(data: bytes) -> Pixels:
        return pyvips.Image.thumbnail_buffer(data, 1 << 15, height=size).numpy()

    return run


def by_hand(shards: Path, size: int) -> int:
    """The limit: each tar from start to end, decoded and resized the quickest way, to float; nothing else."""
    done = 0
    for path in sorted(shards.glob("*.tar")):
        for sample in WebDataset(str(path), shardshuffle=False):
            values, _ = decode.upright(sample["jpg"], at_least=(size, size))
            _float(_cropped(fit_pixels(values, (size, size), "crop"), size))
            done += 1
    return done


def by_webdataset(shards: Path, size: int) -> int:
    """webdataset's own pipeline: its PIL decoding, resize, crop, to float, batches."""
    urls = [str(p) for p in sorted(shards.glob("*.tar"))]
    data = WebDataset(urls, shardshuffle=False).shuffle(256).decode("pilrgb").to_tuple("jpg", "txt")
    batches = data.map_tuple(lambda image: _transform(image, size), None).batched(16)
    return sum(len(batch[1]) for batch in batches)


def write_streaming(shards: Path, folder: Path) -> bool:
    """The same pictures as MosaicML streaming's shards; False if the package is not there."""
    try:
        from streaming import MDSWriter
    except ImportError:
        return False
    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "txt": "str"}) as writer:
        for path in sorted(shards.glob("*.tar")):
            for sample in WebDataset(str(path), shardshuffle=False):
                writer.write({"jpg": sample["jpg"], "txt": sample["txt"].decode()})
    return True


def by_streaming(folder: Path, size: int) -> int:
    """MosaicML streaming's data set, with PIL decoding as its own vision sets do."""
    from streaming import StreamingDataset

    data: Any = StreamingDataset(local=str(folder), shuffle=True, batch_size=16)
    done = 0
    for batch in _in_batches(data, 16):
        torch.stack([_transform(Image.open(io.BytesIO(s["jpg"])).convert("RGB"), size) for s in batch])
        done += len(batch)
    return done


def _in_batches(samples: Any, size: int) -> Iterator[list[Any]]:
    batch: list[Any] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _transform(image: Image.Image, size: int) -> torch.Tensor:
    return _float(_cropped(np.asarray(resize(image, (size, size), "crop")), size))


def _cropped(values: Pixels, size: int) -> Pixels:
    top, left = (values.shape[0] - size) // 2, (values.shape[1] - size) // 2
    return values[top : top + size, left : left + size]


def _float(values: Pixels) -> torch.Tensor:
    return torch.from_numpy(values.copy()).permute(2, 0, 1).float().mul_(2 / 255).sub_(1)
