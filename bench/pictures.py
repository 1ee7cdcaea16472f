"""What bench.data compares: JPEG decoders, and other packages' ways from shards to batches of the same pictures."""

from __future__ import annotations

import importlib
import importlib.util
import io
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
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


def by_hand(shards: Path, size: int, threads: int = 1) -> int:
    """The limit: each tar from start to end, decoded and resized the quickest way, to float; nothing else."""
    paths = sorted(shards.glob("*.tar"))
    if threads == 1:
        return sum(_tar_by_hand(path, size) for path in paths)
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(lambda path: _tar_by_hand(path, size), paths))


def _tar_by_hand(path: Path, size: int) -> int:
    done = 0
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name.endswith(".jpg") else None
            if file is not None:
                values, _ = decode.upright(file.read(), at_least=(size, size))
                _float(_cropped(fit_pixels(values, (size, size), "crop"), size))
                done += 1
    return done


def by_webdataset(shards: Path, size: int, workers: int = 0) -> Callable[[], int]:
    """One epoch of webdataset's own pipeline: its PIL decoding, resize, crop, to float, batches.

    Worker processes start with the first epoch and stay, so that their start is not counted.
    """
    urls = [str(p) for p in sorted(shards.glob("*.tar"))]
    data = WebDataset(urls, shardshuffle=False).shuffle(256).decode("pilrgb").to_tuple("jpg", "txt")
    data = data.map_tuple(partial(_transform, size=size), None).batched(16)
    batches = _loading(data, workers) if workers else data
    return lambda: sum(len(batch[1]) for batch in batches)


def _loading(data: Any, workers: int) -> DataLoader[Any]:
    return DataLoader(data, batch_size=None, num_workers=workers, persistent_workers=True)


def streaming_problem() -> str | None:
    """Why MosaicML streaming cannot be imported; None if it can."""
    try:
        importlib.import_module("streaming")
    except Exception as error:  # whatever its import meets: it needs packages that it does not always bring
        return f"{type(error).__name__}: {error}"
    return None


def write_streaming(shards: Path, folder: Path) -> None:
    """The same pictures as MosaicML streaming's shards."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"jpg": "bytes", "txt": "str"}) as writer:
        for path in sorted(shards.glob("*.tar")):
            for sample in WebDataset(str(path), shardshuffle=False):
                writer.write({"jpg": sample["jpg"], "txt": sample["txt"].decode()})


def by_streaming(folder: Path, size: int, workers: int = 0) -> Callable[[], int]:
    """One epoch of MosaicML streaming's data set, with PIL decoding as its own vision sets do."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    data: Any = StreamingDataset(local=str(folder), shuffle=True, batch_size=16)
    if not workers:
        return lambda: sum(len(_collate(batch, size)) for batch in _in_batches(data, 16))
    loader: Any = DataLoader(
        data, batch_size=16, num_workers=workers, persistent_workers=True, collate_fn=partial(_collate, size=size)
    )
    return lambda: sum(len(batch) for batch in loader)


def _collate(samples: list[Any], size: int) -> torch.Tensor:
    return torch.stack([_transform(Image.open(io.BytesIO(s["jpg"])).convert("RGB"), size) for s in samples])


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
    planes = np.ascontiguousarray(values.transpose(2, 0, 1))
    return torch.from_numpy(planes).float().mul_(2 / 255).sub_(1)
