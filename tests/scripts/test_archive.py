"""Reading packages: everything is found, nothing can point outside, damage is said."""

import io
import random
from pathlib import Path

import pytest

from scripts.quickstart.archive import members, safe_name
from tests.scripts.packages import deb, write


def test_members_come_in_order_with_their_content(tmp_path: Path) -> None:
    package = write(tmp_path / "a_1_all.deb", deb({"./b/two.txt": b"2", "./b/one.txt": b"1"}))
    found = [(str(path), content.read()) for path, content in members(package)]
    assert found == [("b/two.txt", b"2"), ("b/one.txt", b"1")]


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/etc/passwd", "a\\..\\evil", "a\0b"])
def test_names_that_point_outside_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="outside its archive"):
        safe_name(name)


def test_a_package_with_such_a_member_is_refused(tmp_path: Path) -> None:
    package = write(tmp_path / "a_1_all.deb", deb({"./fine": b"1", "./../evil": b"2"}))
    with pytest.raises(ValueError, match="outside its archive"):
        list(members(package))


def test_links_are_passed_over(tmp_path: Path) -> None:
    package = write(tmp_path / "a_1_all.deb", deb({"./fine": b"1"}, {"./link": "/etc/passwd"}))
    assert [str(path) for path, _ in members(package)] == ["fine"]


def test_a_beginning_is_enough_for_the_first_members() -> None:
    whole = deb({"./first": b"1", "./noise": random.Random(0).randbytes(1_000_000)})
    beginning = io.BytesIO(whole[: len(whole) // 2])
    path, content = next(iter(members(beginning)))
    assert (str(path), content.read()) == ("first", b"1")


@pytest.mark.parametrize("keep", [0, 40, 200, -2000])
def test_a_cut_package_is_an_error_for_people(tmp_path: Path, keep: int) -> None:
    whole = deb({f"./{n}": random.Random(n).randbytes(5000) for n in range(9)})
    package = write(tmp_path / "a_1_all.deb", whole[:keep])
    with pytest.raises(ValueError, match=r"Debian package|damaged or incomplete"):
        list(members(package))
