from __future__ import annotations

import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_packing.files import OpenFiles, tar_member


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


@pytest.mark.parametrize(("name", "size"), [("a.json", 0), ("ä-1.0.jpg", 512), ("b.1.png", 8**9)])
def test_a_header_says_name_and_size_as_tarfile_does(name: str, size: int) -> None:
    data = header(name, size)
    known = tarfile.TarInfo.frombuf(data, "utf-8", "strict")
    assert tar_member(data) == (known.name, known.size) == (name, size)


def test_damaged_and_other_headers_are_refused() -> None:
    good = header("a.json", 100)
    for damaged in (b"", good[:511], bytes(512), b"b" + good[1:], good[:150] + b"9" + good[151:]):
        with pytest.raises(ValueError):
            tar_member(damaged)
    for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE):
        with pytest.raises(ValueError, match="no plain file"):
            tar_member(header("a", 0, kind))
    with pytest.raises(ValueError, match="no plain file"):
        tar_member(header("f" * 90 + "/" + "n" * 90, 1))


def test_many_threads_read_many_files_with_few_open(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / str(number)).write_bytes(bytes([number]) * 5000)
    files = OpenFiles(most=8)
    before = len(os.listdir("/proc/self/fd"))
    places = [(number * 7 % 40, number % 100) for number in range(4000)]

    def right(place: tuple[int, int]) -> bool:
        number, offset = place
        return files.read(tmp_path / str(number), offset, 4000) == bytes([number]) * 4000

    with ThreadPoolExecutor(16) as pool:
        assert all(pool.map(right, places))
    assert len(os.listdir("/proc/self/fd")) <= before + 8 + 16
    files.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert files.read(tmp_path / "3", 0, 2) == b"\3\3"
    files.close()
