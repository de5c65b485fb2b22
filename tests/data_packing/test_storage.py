"""Places that are not on this machine: a real S3-compatible server, http, and a bounded cache."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packing_toys import captions, cost, encode, image_cost
from upath import UPath

from data_packing import storage
from data_packing.index import Index, build_index
from data_packing.loader import Loader
from data_packing.plan import Plan
from data_packing.sharding import write_shards
from data_packing.shards import expand, read_document
from data_packing.storage import BLOCK, Blocks, place

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")

BUCKET = "corpus"


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """An S3 server on this machine, and an environment that leads to it."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    url = f"http://{host}:{port}"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", url)
        UPath(f"s3://{BUCKET}").fs.mkdir(BUCKET)
        yield url
    moto.stop()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("MLLM_CACHE", str(folder))
    monkeypatch.setenv("MLLM_CACHE_GB", "0.1")
    storage._shared.cache_clear()
    yield folder
    storage._shared.cache_clear()


def plan_of(index: Index) -> Plan:
    return Plan(
        [index],
        [1.0],
        processor_fingerprint="p",
        image_cost=image_cost,
        tokens=64,
        patches=512,
        tokens_per_step=128,
        seed=0,
        epochs=1,
    )


def packs_of(index: Index, workers: int) -> list[tuple[list[str], list[int]]]:
    loader = Loader(plan_of(index), encode, rank=0, world=1, workers=workers)
    return [(pack.keys, pack.input_ids.tolist()) for _, packs in loader for pack in packs]


def test_shards_in_a_bucket_train_like_local_ones(server: str, tmp_path: Path) -> None:
    documents = list(captions(30))
    local = write_shards(documents, tmp_path / "here", "toys", documents_per_shard=10)
    there = write_shards(documents, f"s3://{BUCKET}/train", "toys", documents_per_shard=10)
    assert [path.name for path in there.paths] == [path.name for path in local.paths]
    for pattern in ("toys-*.tar", "toys-{000000..000002}.tar", ""):
        assert expand(f"s3://{BUCKET}/train/{pattern}") == there.paths, pattern
    index = build_index(there.paths, cost, "f")
    assert index.fingerprint == build_index(local.paths, cost, "f").fingerprint
    assert read_document(there.paths[2], 3) == documents[23]
    assert index.key(23) == documents[23].key
    expected = packs_of(build_index(local.paths, cost, "f"), 0)
    assert packs_of(index, 0) == expected
    # in a process of its own: the fork server of this one may be older than the environment
    code = (
        "import test_storage as t, data_packing.shards as s, data_packing.index as i\n"
        "if __name__ == '__main__':\n"
        f"    index = i.build_index(s.expand('s3://{BUCKET}/train/'), t.cost, 'f')\n"
        "    print(t.packs_of(index, 1))"
    )
    script = tmp_path / "main.py"
    script.write_text(code)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    assert done.stdout.strip() == repr(expected), done.stderr[-3000:]


def test_token_counts_of_a_bucket_are_kept_on_this_machine(
    server: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = write_shards(captions(5), f"s3://{BUCKET}/kept", "toys")
    first = build_index(report.paths, cost, "f")
    assert list(cache.rglob("toys-000000.tokens-*.npz"))

    def never(_: object) -> None:
        raise AssertionError("counted again")

    again = build_index(report.paths, never, "f")  # type: ignore[arg-type]
    assert again.fingerprint == first.fingerprint


def test_new_shards_replace_the_old_ones_of_a_bucket(server: str) -> None:
    folder = f"s3://{BUCKET}/twice"
    write_shards(captions(6), folder, "toys", documents_per_shard=2)
    write_shards(captions(2, start=50), folder, "toys")
    (only,) = expand(f"{folder}/toys-*.tar")
    assert read_document(only, 0).key == next(captions(1, start=50)).key
    assert len(list(UPath(folder).iterdir())) == 2


def test_what_is_not_in_a_bucket_is_named(server: str) -> None:
    with pytest.raises(ValueError, match=r"no shard matches s3://corpus/none-\*\.tar"):
        expand(f"s3://{BUCKET}/none-*.tar")
    with pytest.raises(ValueError, match="no shard matches s3://corpus/none.tar"):
        expand(f"s3://{BUCKET}/none.tar")


def test_http_needs_its_switch(server: str) -> None:
    report = write_shards(captions(4), f"s3://{BUCKET}/web", "toys")
    url = f"{server}/{BUCKET}/web/toys-000000.tar"
    with pytest.raises(ValueError, match="over http:// is off"):
        expand(url)
    with pytest.raises(OSError, match=r"cannot be reached .*403"):
        expand(url, allow_http=True)  # nobody made it public
    files = report.paths[0].fs  # type: ignore[attr-defined]
    for file in files.ls(f"{BUCKET}/web"):
        files.chmod(file, "public-read")
    with pytest.raises(ValueError, match="cannot be listed over http"):
        expand(url.replace("000000", "*"), allow_http=True)
    (path,) = expand(url, allow_http=True)
    assert read_document(path, 3) == read_document(report.paths[0], 3)


def test_places_are_local_unless_they_are_urls() -> None:
    assert place("a/b.tar") == Path("a/b.tar")
    assert place("~/x") == Path.home() / "x"
    with pytest.raises(ValueError, match="fsspec knows no nosuch://"):
        place("nosuch://x/y.tar")


DATA = bytes(os.urandom(5 * BLOCK + 12345))


@pytest.fixture(scope="module")
def far() -> Path:
    path = UPath("memory://far/file.bin")
    path.write_bytes(DATA)
    return path  # type: ignore[return-value]


@given(st.lists(st.tuples(st.integers(0, len(DATA) + 9), st.integers(0, 3 * BLOCK)), max_size=12))
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_range_is_what_the_file_holds(
    far: Path, tmp_path: Path, reads: list[tuple[int, int]]
) -> None:
    for most in (0, 3 * BLOCK, 100 * BLOCK):
        blocks = Blocks(tmp_path / str(most), most)
        for offset, size in reads:
            assert blocks.read(far, offset, size) == DATA[offset : offset + size]


def test_the_cache_stays_in_its_bounds(far: Path, tmp_path: Path) -> None:
    blocks = Blocks(tmp_path, 3 * BLOCK)
    for number in range(6):
        blocks.read(far, number * BLOCK, 10)
        kept = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
        assert 0 < kept <= 3 * BLOCK


def test_a_file_is_fetched_once(far: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched: list[tuple[int, int]] = []
    fetch = Blocks._fetch

    def counted(path: Path, start: int, stop: int) -> bytes:
        fetched.append((start, stop))
        return fetch(path, start, stop)

    monkeypatch.setattr(Blocks, "_fetch", staticmethod(counted))
    for _ in range(2):
        blocks = Blocks(tmp_path, 100 * BLOCK)
        for offset in range(0, len(DATA), 100_000):
            blocks.read(far, offset, 100_000)
    assert sum(stop - start for start, stop in fetched) == len(DATA)
    assert len(fetched) < 4  # from front to back: in large steps


def test_a_damaged_block_is_fetched_again(far: Path, tmp_path: Path) -> None:
    Blocks(tmp_path, 100 * BLOCK).read(far, 0, len(DATA))
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    files[0].write_bytes(b"short")
    files[1].unlink()
    assert Blocks(tmp_path, 100 * BLOCK).read(far, 0, len(DATA)) == DATA


def test_a_changed_file_is_not_mixed_with_the_old_one(tmp_path: Path) -> None:
    path = UPath("memory://far/changing.bin")
    path.write_bytes(b"a" * 2000)
    assert Blocks(tmp_path, 10**8).read(path, 0, 5) == b"aaaaa"  # type: ignore[arg-type]
    path.write_bytes(b"b" * 2001)
    assert Blocks(tmp_path, 10**8).read(path, 0, 5) == b"bbbbb"  # type: ignore[arg-type]


def test_a_senseless_size_of_the_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLLM_CACHE_GB", "lots")
    storage._shared.cache_clear()
    with pytest.raises(ValueError, match="MLLM_CACHE_GB is 'lots'"):
        storage._shared()
