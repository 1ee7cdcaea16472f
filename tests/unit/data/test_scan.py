"""What is found in tars of strangers, against webdataset and against Python's tarfile."""

import bz2
import gzip
import lzma
import tarfile
from pathlib import Path

import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.data.offsets import Index
from ldm.data.scan import scan, split_name
from tests.unit.data.tarred import Member, link, pack, pairs

ODD = (
    "plain",
    "two words",
    "tab\tinside",
    "line\nbreak",
    "quote'\"`",
    "[brackets] (round) {curly}",
    "über/grüße ☃",
    "folder.with.dots/name",
    "./here",
    "a/./b",
    "../above",
    "/absolute",
    "back\\slash",
    "-dash",
    "#hash %20 ?query",
    "deep/" * 40 + "end",
    "n" * 150,
    "emoji 🍎",
    "e\u0301 decomposed",
    "\u00e9 composed",
    "trailing ",
)


def read(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Every sample by the index, after writing and reading it."""
    place = path.with_suffix(".index")
    scan(path).index.write(place)
    index, data = Index.read(place), path.read_bytes()
    found = []
    for i in range(len(index)):
        spans = {e: (int(index.offsets[m]), int(index.sizes[m])) for e, m in index.members(i).items()}
        found.append((index.key(i), {e: data[o : o + s] for e, (o, s) in spans.items()}))
    return found


def theirs(path: Path) -> list[tuple[str, dict[str, bytes]]]:
    """Every sample by webdataset."""
    samples = wds.WebDataset(str(path), shardshuffle=False, empty_check=False)
    return [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in samples]


def words(path: Path) -> dict[str, str]:
    return dict(scan(path).problems)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_are_read_as_webdataset_reads_them(tmp_path: Path, form: int) -> None:
    members: list[Member] = []
    for i, name in enumerate(ODD):
        members += [(f"{name}.png", bytes([i])), (f"{name}.seg.v2.PNG", b"mask"), (f"{name}.txt", f"{i}".encode())]
    path = pack(tmp_path / "odd.tar", members, form)
    assert read(path) == theirs(path)
    assert len(read(path)) == len(ODD)


def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    members: list[Member] = [("caf\u00e9.png", b"1"), ("caf\u00e9.txt", b"2"), ("\u00fc/\u00e4.png", b"3")]
    path = pack(tmp_path / "latin.tar", members, encoding="latin-1")
    assert read(path) == theirs(path)
    assert [k.encode("utf-8", "surrogateescape") for k, _ in read(path)] == [b"caf\xe9", b"\xfc/\xe4"]


names = st.text(st.characters(blacklist_characters="\0", blacklist_categories=("Cs",)), min_size=1, max_size=30)


@settings(max_examples=150, deadline=None)
@given(st.lists(names, min_size=1, max_size=6))
def test_the_rule_for_keys_is_webdatasets(found: list[str]) -> None:
    for name in found:
        key, extension = split_name(name)
        match = wds.tariterators.base_plus_ext(name)
        base = name.rsplit("/", 1)[-1]
        if base.startswith(".") or "." not in base or "\n" in name:  # hidden, no extension; their pattern stops there
            continue
        assert (key, extension) == (match[0], match[1].lower())


def test_kinds_do_not_multiply(tmp_path: Path) -> None:
    """A name of its own after the first dot each: a table of samples by kinds would take 128 MB."""
    count = 2000
    path = pack(tmp_path / "kinds.tar", [(f"{i:05d}.v{i}.of (final).png", b"x") for i in range(count)])
    found = scan(path).index
    found.write(tmp_path / "a.index")
    assert (tmp_path / "a.index").stat().st_size < 60 * count
    assert Index.read(tmp_path / "a.index").keys == found.keys
    assert found.members(7) == {"v7.of (final).png": 7}


def test_hidden_and_bookkeeping_members_do_not_count(tmp_path: Path) -> None:
    odd: list[Member] = [
        ("./._00000.png", b"\0\5\x16\7"),
        (".DS_Store", b"x"),
        ("a/.ipynb_checkpoints/b.png", b"x"),
        ("__index__/a.json", b"{}"),
        ("README", b"x"),
    ]
    path = pack(tmp_path / "mac.tar", [*odd[:3], *pairs(range(2)), *odd[3:]])
    assert [k for k, _ in read(path)] == ["00000", "00001"]
    assert words(path) == {"hidden": "hidden files left out: 3, such as './._00000.png'"}


def test_members_that_lie_apart_are_put_together(tmp_path: Path) -> None:
    members = pairs(range(5))
    apart = pack(tmp_path / "apart.tar", members[::2] + members[1::2])
    beside = pack(tmp_path / "beside.tar", members)
    assert read(apart) == read(beside) == theirs(beside)
    assert "members of 5 samples lie apart" in words(apart)["apart"]
    assert words(beside) == {}


def test_keys_that_come_again(tmp_path: Path) -> None:
    """Each stays a sample, with its own members, side by side or apart."""

    def sample(n: int, *kinds: str) -> list[Member]:
        return [(f"a.{k}", f"{k}{n}".encode()) for k in kinds]

    other: list[Member] = [("b.png", b"b"), ("b.txt", b"b")]
    first, second = ({"png": f"png{n}".encode(), "txt": f"txt{n}".encode()} for n in (1, 2))
    orders = {
        "side by side": [*sample(1, "png", "txt"), *sample(2, "png", "txt"), *other],
        "another between": [*sample(1, "png", "txt"), *other, *sample(2, "png", "txt")],
        "all pictures first": [
            *sample(1, "png"),
            other[0],
            *sample(2, "png"),
            *sample(1, "txt"),
            other[1],
            *sample(2, "txt"),
        ],
    }
    for name, members in orders.items():
        path = pack(tmp_path / "again.tar", members)
        assert [m for k, m in read(path) if k == "a"] == [first, second], name
        assert "come more than once" in words(path)["duplicate"]
    alone = pack(tmp_path / "alone.tar", [*sample(1, "png"), *sample(2, "png", "txt")])
    assert [m for _, m in read(alone)] == [{"png": b"png1"}, second]


def test_links_are_followed_inside_the_tar(tmp_path: Path) -> None:
    blob: Member = ("blobs/sha", b"stored without an extension")
    members: list[Member] = [
        *pairs(range(1)),
        blob,
        ("d/hard.png", b"", link(tarfile.LNKTYPE, "00000.png")),
        ("d/soft.png", b"", link(tarfile.SYMTYPE, "../00000.png")),
        ("d/chain.png", b"", link(tarfile.SYMTYPE, "soft.png")),
        ("early.png", b"", link(tarfile.SYMTYPE, "late.png")),
        ("late.png", b"late"),
        ("hub.png", b"", link(tarfile.SYMTYPE, "blobs/sha")),
        ("circle.png", b"", link(tarfile.SYMTYPE, "round.png")),
        ("round.png", b"", link(tarfile.SYMTYPE, "circle.png")),
        ("outside.png", b"", link(tarfile.SYMTYPE, "/etc/passwd")),
        ("dangling.png", b"", link(tarfile.LNKTYPE, "nowhere.png")),
    ]
    path = pack(tmp_path / "links.tar", members)
    found = dict(read(path))
    with tarfile.open(path) as tar:
        for key in ("d/hard", "d/soft", "d/chain", "early", "hub"):
            file = tar.extractfile(f"{key}.png")
            assert file is not None
            assert found[key]["png"] == file.read()
    assert not {"circle", "round", "outside", "dangling"} & found.keys()
    assert words(path)["link"] == "links to what is not in the tar: 4, such as 'circle.png'"


def test_sparse_members_are_named(tmp_path: Path) -> None:
    """As GNU tar --sparse writes them: the data in the tar is not the file's."""
    path = pack(tmp_path / "sparse.tar", pairs(range(2)))
    data = bytearray(path.read_bytes())
    header = tarfile.TarInfo("holes.png")
    header.size, header.type = 512, tarfile.GNUTYPE_SPARSE
    block = bytearray(header.tobuf(tarfile.GNU_FORMAT))
    block[386:410] = b"%011o\0%011o\0" % (4096, 512)  # one stretch of data behind a hole
    block[483:495] = b"%011o\0" % 4608
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path.write_bytes(bytes(block) + bytes([7]) * 512 + bytes(data))
    with tarfile.open(path) as tar:
        assert tar.getmember("holes.png").issparse()
    assert [k for k, _ in read(path)] == ["00000", "00001"]
    assert "sparse files" in words(path)["sparse"]


def test_a_cut_tar_keeps_its_whole_samples(tmp_path: Path) -> None:
    """Wherever it is cut, what is kept is whole, and all that is whole is kept."""
    whole = pack(tmp_path / "whole.tar", pairs(range(4)))
    everything, data = read(whole), whole.read_bytes()
    ends = [int((scan(whole).index.offsets + scan(whole).index.sizes)[2 * i + 1]) for i in range(4)]
    path = tmp_path / "cut.tar"
    for size in range(513, ends[-1] + 512, 257):
        path.write_bytes(data[:size])
        complete = sum(end <= size for end in ends)
        if complete:  # of a first sample alone nothing tells what it lacks
            assert read(path) == everything[:complete], size
        assert "truncated" in words(path), size
    path.write_bytes(data[: ends[-1] + 512])
    assert len(read(path)) == 4


def test_a_cut_tar_whose_members_lie_apart(tmp_path: Path) -> None:
    members = pairs(range(4))
    whole = pack(tmp_path / "whole.tar", members[::2] + members[1::2])
    everything, index = read(whole), scan(whole).index
    path = tmp_path / "cut.tar"
    third = index.members(2)["txt"]
    path.write_bytes(whole.read_bytes()[: int(index.offsets[third])])
    assert read(path) == everything[:2]


def test_past_damage_the_next_samples_are_read(tmp_path: Path) -> None:
    path = pack(tmp_path / "spoiled.tar", pairs(range(5)))
    everything, index = read(path), scan(path).index
    for spoil in (b"\xff" * 512, bytes(512)):
        data = bytearray(path.read_bytes())
        header = int(index.offsets[index.members(2)["png"]]) - 512
        data[header : header + 512] = spoil
        other = tmp_path / "other.tar"
        other.write_bytes(data)
        assert [s for s in read(other) if s[0] != "00002"] == [s for s in everything if s[0] != "00002"]
        assert words(other) == {"damaged": "damaged headers, whose members are left out: 1"}


def test_tars_laid_end_to_end(tmp_path: Path) -> None:
    one, two = pack(tmp_path / "1.tar", pairs(range(3))), pack(tmp_path / "2.tar", pairs(range(3, 6)))
    both = tmp_path / "both.tar"
    both.write_bytes(one.read_bytes() + two.read_bytes())
    assert read(both) == read(one) + read(two)
    assert words(both) == {}


def test_what_is_no_tar_says_what_it_is(tmp_path: Path) -> None:
    whole = pack(tmp_path / "whole.tar", pairs(range(2))).read_bytes()
    path = tmp_path / "x.tar"
    kinds = {
        "empty file": b"",
        "gzip": gzip.compress(whole),
        "bzip2": bz2.compress(whole),
        "xz": lzma.compress(whole),
        "zip file": b"PK\x03\x04" + bytes(600),
        "HTML": b"\n<!DOCTYPE html><html><title>404 Not Found</title></html>" + b" " * 600,
        "XML": b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>',
        "JSON": b'{"error": "Repository not found"}',
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
        "not a plain tar": b"junk" * 999,
    }
    for what, data in kinds.items():
        path.write_bytes(data)
        with pytest.raises(ValueError, match=rf"x\.tar' is not a plain tar: .*{what}|{what}"):
            scan(path)
    for data in (bytes(10240), whole[-1024:]):
        path.write_bytes(data)
        assert words(path) == {"empty": "no samples in it"}


def test_headers_that_lie_about_sizes_end(tmp_path: Path) -> None:
    """A negative size would send a reader back for ever, a huge one past the end."""
    info = tarfile.TarInfo("b.png")
    for size in (-1024, 1 << 60):
        path = pack(tmp_path / "lie.tar", pairs(range(2)))
        info.size = size
        lie = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        path.write_bytes(path.read_bytes()[:4096] + bytes(lie) + b"\1" * 512 + bytes(1024))
        assert [k for k, _ in read(path)] == ["00000", "00001"]
        assert words(path).keys() & {"damaged", "truncated"}


def test_old_plain_headers_are_read(tmp_path: Path) -> None:
    """Without the mark of 1988, as some tools still write them."""
    info = tarfile.TarInfo("<a>.png")
    info.size = 3
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[257:265] = bytes(8)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    path = tmp_path / "old.tar"
    path.write_bytes(bytes(block) + b"abc" + bytes(509) + bytes(1024))
    with tarfile.open(path) as tar:
        assert tar.getnames() == ["<a>.png"]
    assert read(path) == [("<a>", {"png": b"abc"})]


def test_empty_members_and_a_member_of_many_blocks(tmp_path: Path) -> None:
    path = pack(tmp_path / "sizes.tar", [("a.png", b""), ("a.txt", b""), ("b.png", bytes(5000)), ("b.txt", b"x" * 512)])
    assert read(path) == theirs(path)


def test_a_device_and_a_folder_are_no_samples(tmp_path: Path) -> None:
    def kind(value: bytes) -> Member:
        return ("odd.png", b"", lambda info: setattr(info, "type", value))

    members = [kind(tarfile.DIRTYPE), kind(tarfile.FIFOTYPE), kind(tarfile.CHRTYPE)]
    path = pack(tmp_path / "odd.tar", [*members, *pairs(range(1))])
    assert [k for k, _ in read(path)] == ["00000"]
