"""The index of a tar: what is written comes back, whatever the names; older forms and spoiled files."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from ldm.data.offsets import Index, index_of
from ldm.data.scan import scan
from tests.unit.data.tarred import pack, pairs

text = st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=12)
raw = st.binary(min_size=1, max_size=8).map(lambda b: b.decode("utf-8", "surrogateescape"))
rows = st.lists(
    st.tuples(text | raw, st.dictionaries(text | raw, st.tuples(st.integers(0, 1 << 45), st.integers(0, 1 << 33)))),
    max_size=8,
)


@settings(max_examples=100, deadline=None)
@given(rows, st.data())
def test_what_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, found: list, data: st.DataObject) -> None:  # type: ignore[type-arg]
    place = tmp_path_factory.mktemp("index") / "a.index"
    index = index_of(found)
    index.write(place)
    again = Index.read(place)

    def told(one: Index) -> list[tuple[str, dict[str, tuple[int, int]]]]:
        return [
            (one.key(i), {e: (one.offsets.item(m), one.sizes.item(m)) for e, m in one.members(i).items()})
            for i in range(len(one))
        ]

    assert told(again) == told(index) == found
    assert again.digest() == index.digest()
    chosen = data.draw(st.lists(st.integers(0, len(found) - 1), max_size=5)) if found else []
    part = index.take(chosen)
    assert told(part) == [found[i] for i in chosen]
    assert part.digest() == index_of([found[i] for i in chosen]).digest()
    extensions = {e for _, members in found for e in members}
    for extension in list(extensions)[:3]:
        assert index.having([extension]).tolist() == [extension in members for _, members in found]


def test_the_digest_tells_samples_order_and_members_apart() -> None:
    a, b = ("a", {"png": (512, 3), "txt": (1536, 2)}), ("b", {"png": (2560, 3)})
    others = [
        [b, a],
        [a],
        [("a2", a[1]), b],
        [("a", {"png": (512, 3)}), b],
        [("a", {**a[1], "txt": (1536, 1)}), b],
        [("a", {"jpg": (512, 3), "txt": (1536, 2)}), b],
        [("a", {}), ("ab", b[1])],
    ]
    digests = [index_of(rows).digest() for rows in ([a, b], *others)]
    assert len(set(digests)) == len(digests)


def first_form(keys: list[str], extensions: list[str], offsets: list[list[int]], sizes: list[list[int]]) -> bytes:
    """As version 0.1.0 wrote it."""
    tensors = {
        "offsets": np.array(offsets, np.int64).reshape(len(keys), len(extensions)),
        "sizes": np.array(sizes, np.int64).reshape(len(keys), len(extensions)),
        "keys": np.frombuffer("\n".join(keys).encode() or b"\n", np.uint8),
    }
    return save(tensors, metadata={"extensions": " ".join(extensions)})


def test_indexes_of_older_versions_are_read() -> None:
    data = first_form(["a", "ü b"], ["json", "png"], [[512, 1536], [-1, 2560]], [[3, 4], [-1, 5]])
    same = index_of([("a", {"json": (512, 3), "png": (1536, 4)}), ("ü b", {"png": (2560, 5)})])
    assert Index.parse(data, "old").digest() == same.digest()
    assert len(Index.parse(first_form([], [], [], []), "old")) == 0
    for spoiled in (
        first_form(["a"], ["png", "0 (x).png"], [[1, 2]], [[1, 2]]),  # a space in a kind
        first_form(["a\nb"], ["png"], [[1]], [[1]]),
        data[:-3],
        b"",
        b"\0" * 64,
    ):
        with pytest.raises(ValueError, match=r"'old' cannot be read.*`ldm data index` makes it anew"):
            Index.parse(spoiled, "old")


def test_parts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    index_of([("a", {"png": (512, 3)}), ("b", {"png": (1536, 3)})]).write(tmp_path / "a.index")
    data = (tmp_path / "a.index").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    start = 8 + int.from_bytes(data[:8], "little")
    for name in ("starts", "kinds", "name_ends"):
        first, last = header[name]["data_offsets"]
        spoiled = bytearray(data)
        spoiled[start + first : start + last] = b"\xf0" * (last - first)
        with pytest.raises(ValueError, match="do not fit together"):
            Index.parse(bytes(spoiled), "x")


def test_it_grows_with_the_samples(tmp_path: Path) -> None:
    sizes = []
    for count in (200, 400):
        scan(pack(tmp_path / "a.tar", pairs(range(count)))).index.write(tmp_path / "a.index")
        sizes.append((tmp_path / "a.index").stat().st_size)
    assert sizes[1] - sizes[0] < 200 * 32
