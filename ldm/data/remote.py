"""Reading from http(s), S3, GCS and whatever else fsspec knows: ranges, retries, time limits, a bounded local cache."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_BLOCK = 8 << 20
_EXTRAS = {"s3": "remote", "http": "remote", "https": "remote", "gs": "gcs", "gcs": "gcs"}


class RemoteError(OSError, ValueError):
    """A remote read that failed for good, with the address and what was tried: a sentence at the command line."""


class RemoteDamage(RemoteError):
    """A file that is not there, or not the one that it was: to ask again would not help."""


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """How remote shards are read.

    `cache` is a local folder for whole shards, at most `cache_bytes` of them; without it every read is a range request.
    `retries` follow with back-off doubling from `backoff` seconds; a read that gives nothing for `timeout` seconds
    counts as failed. `pipe` allows `pipe:COMMAND` shards, which run a shell command: only for manifests you wrote.
    """

    cache: str | None = None
    cache_bytes: int = 50 << 30
    retries: int = 6
    timeout: float = 60.0
    backoff: float = 0.5
    pipe: bool = False

    def __post_init__(self) -> None:
        if self.retries < 0 or self.timeout <= 0 or self.backoff < 0 or self.cache_bytes < 0:
            raise ValueError(
                f"retries {self.retries}, backoff {self.backoff} and cache_bytes {self.cache_bytes} must not be "
                f"negative, timeout {self.timeout} must be positive"
            )
        if self.pipe and self.cache is None:
            raise ValueError("pipe: needs a cache folder to put the command's output into")


def is_remote(path: str) -> bool:
    """Whether a path is an address."""
    return "://" in path or path.startswith("pipe:")


def join(folder: str, name: str) -> str:
    """A manifest's relative file name under its folder; an address of its own stays."""
    if is_remote(name) or os.path.isabs(name):
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else os.path.join(folder, name)


class Remote:
    """Reads ranges and whole files, tries again, and says what went wrong in the end. Threads may share it."""

    def __init__(self, config: RemoteConfig) -> None:
        self.config = config
        self._systems: dict[str, Any] = {}
        self._lock = threading.Lock()

    def read(self, address: str, start: int | None = None, end: int | None = None) -> bytes:
        """Bytes [start, end) of a file, or all of it. Raises RemoteError after the last retry."""

        def once() -> bytes:
            system, path = self._system(address)
            data: bytes = system.cat_file(path, start=start, end=end)
            if start is not None and end is not None and len(data) != end - start:
                raise RemoteError(f"{len(data)} bytes came instead of {end - start} from offset {start}")
            return data

        return self._again(address, once)

    def size(self, address: str) -> int | None:
        """Bytes of a file, None where the server does not tell. Raises RemoteError after the last retry."""

        def once() -> int | None:
            system, path = self._system(address)
            return system.info(path).get("size")

        return self._again(address, once)

    def find(self, address: str) -> list[str]:
        """The addresses of all files below a folder that the server lists. Raises RemoteError after the last retry."""
        scheme = address.split("://", 1)[0]

        def once() -> list[str]:
            system, path = self._system(address)
            return [a if "://" in a else f"{scheme}://{a.lstrip('/')}" for a in system.find(path)]

        return self._again(address, once)

    def copy(self, address: str, target: Path) -> None:
        """Write a whole file of which nothing is known. Raises RemoteError after the last retry of a stretch."""
        size = self.size(address)
        if size is None:
            target.write_bytes(self.read(address))
            return
        with target.open("wb") as file:
            for start in range(0, size, _BLOCK):
                file.write(self.read(address, start, min(start + _BLOCK, size)))

    def download(self, address: str, target: Path, size: int, sha256: str) -> None:
        """Write a whole file, checking its size and hash; a stretch that fails is asked for again."""
        if address.startswith("pipe:"):
            self._again(address, lambda: self._run(address[5:], target), limited=False)
        else:
            try:
                with target.open("wb") as file:
                    for start in range(0, size, _BLOCK):
                        file.write(self.read(address, start, min(start + _BLOCK, size)))
            except RemoteError as error:
                have = self.size(address)
                if have is None or have == size:
                    raise
                raise RemoteDamage(f"{address}: {have} bytes, the manifest says {size}") from error
        have = target.stat().st_size
        if have != size:
            raise RemoteDamage(f"{address}: {have} bytes, the manifest says {size}")
        digest = hashlib.sha256()
        with target.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != sha256:
            raise RemoteDamage(f"{address}: its SHA-256 is not the manifest's; the file was changed or spoiled")

    def _run(self, command: str, target: Path) -> None:
        if not self.config.pipe:
            raise ValueError(f"pipe:{command}: commands run only with data.remote.pipe=true")
        with target.open("wb") as file:
            subprocess.run(command, shell=True, stdout=file, check=True)

    def _system(self, address: str) -> tuple[Any, str]:
        scheme = address.split("://", 1)[0]
        with self._lock:
            if scheme not in self._systems:
                import fsspec

                try:
                    self._systems[scheme] = fsspec.filesystem(scheme)
                except (ImportError, ValueError) as error:
                    extra = _EXTRAS.get(scheme)
                    how = f"; pip install 'ldm[{extra}]'" if extra else ""
                    raise ValueError(f"{address}: fsspec cannot open {scheme}://: {error}{how}") from error
        system = self._systems[scheme]
        return system, system._strip_protocol(address)

    def _again(self, address: str, once: Callable[[], T], limited: bool = True) -> T:
        last: Exception | None = None
        for attempt in range(self.config.retries + 1):
            if attempt:
                time.sleep(min(self.config.backoff * 2 ** (attempt - 1), 60.0))
            try:
                return _within(once, self.config.timeout) if limited else once()
            except FileNotFoundError as error:
                raise RemoteDamage(f"{address}: {type(error).__name__}: {error}") from error
            except PermissionError as error:
                raise RemoteError(f"{address}: {type(error).__name__}: {error}") from error
            except RemoteError as error:
                last = error
            except ValueError:
                raise
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                last = error
            except Exception as error:  # each file system has errors of its own
                last = error
        tries = self.config.retries + 1
        raise RemoteError(f"{address}: failed {tries} times; the last: {type(last).__name__}: {last}") from last


def _within(once: Callable[[], T], seconds: float) -> T:
    """The result, or TimeoutError; a stalled read is left to a thread that dies with the process."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(once())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="ldm-remote").start()
    try:
        return future.result(seconds)
    except TimeoutError as error:
        if future.done():
            raise
        raise RemoteError(f"nothing came for {seconds:g} s") from error


class ShardCache:
    """Whole shards in a folder, least recently used removed beyond a bound; processes may share the folder."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, address: str, size: int, sha256: str, fetch: Callable[[Path], None]) -> int | None:
        """A descriptor of the cached file, fetched if absent; None if it has no room (bound or full disk)."""
        if size > self.limit:
            return None
        name = f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{sha256[:16]}.tar"
        try:
            return self._open(name, size, fetch)
        except OSError as error:  # also when the disk has no room for a lock
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                return None
            raise

    def _open(self, name: str, size: int, fetch: Callable[[Path], None]) -> int:
        path = self.folder / name
        with self._locked(name):
            try:
                descriptor = os.open(path, os.O_RDONLY)
                os.utime(path)
                return descriptor
            except FileNotFoundError:
                pass
            self._make_room(size)
            part = path.with_suffix(".part")
            try:
                fetch(part)
                os.replace(part, path)
                return os.open(path, os.O_RDONLY)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    @property
    def bytes(self) -> int:
        """What the cached shards take now."""
        return sum(size for _, size, _ in self._files())

    def _files(self) -> list[tuple[float, int, Path]]:
        found = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                found.append((status.st_mtime, status.st_size, path))
        return sorted(found)

    def _make_room(self, size: int) -> None:
        files = self._files()
        used = sum(s for _, s, _ in files)
        for _, old, path in files:
            if used + size <= self.limit:
                break
            path.unlink(missing_ok=True)
            used -= old

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """One process at a time fetches a shard; another process's lock on another shard does not wait."""
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
