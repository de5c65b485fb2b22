"""Pages of the manual: order kept, navigation and icons gone, a caption after its image."""

import json
from pathlib import Path

from scripts.quickstart.gimp import ROOT, Block, blocks, build, windows
from tests.scripts.packages import deb, png, write

PAGE = b"""<?xml version="1.0" encoding="UTF-8"?>
<html xmlns="http://www.w3.org/1999/xhtml"><body>
<div class="navheader"><img src="images/prev.png"/>Navigation words</div>
<h3 class="title">4.3. Move</h3>
<div class="figure"><p class="title"><b>Figure 14.125. The tool</b></p>
<div class="figure-contents"><img src="images/tool.png"/></div></div>
<p>Press the <img src="images/icon.png"/> icon <span>now</span>.</p>
<ul><li><p>First item</p></li></ul>
<p>Last words.</p></body></html>"""
SIZES = {"images/tool.png": (80, 72), "images/icon.png": (22, 22), "images/prev.png": (80, 80)}


def test_order_captions_and_what_is_left_out() -> None:
    assert [(block.text, block.image) for block in blocks(PAGE, SIZES)] == [
        ("Move", None),
        ("The tool", "images/tool.png"),
        ("Press the icon now.", None),
        ("First item", None),
        ("Last words.", None),
    ]


def test_windows_fit_and_keep_an_image_with_its_caption() -> None:
    page = [Block("word " * 200), Block("caption", "a.png"), Block("word " * 200)] * 4
    cut = list(windows(page, tokens=600))
    assert len(cut) > 1
    assert all(sum(block.tokens for block in window) <= 600 for window in cut)
    assert sum(block.image is not None for window in cut for block in window) == 4


def test_windows_without_images_are_dropped() -> None:
    page = [Block("word " * 500) for _ in range(8)]
    assert list(windows(page, tokens=600)) == []


def test_pages_that_say_a_held_out_caption_are_left_out(tmp_path: Path) -> None:
    words = b"<p>" + b"many words here " * 20 + b"</p></body>"
    files = {
        f"./{ROOT}a.html": PAGE.replace(b"</body>", words),
        f"./{ROOT}b.html": PAGE.replace(b"</body>", b"<p>The iron bed.</p>" + words),
        f"./{ROOT}images/tool.png": png("tool"),
    }
    package = write(tmp_path / "g_1_all.deb", deb(files))
    (tmp_path / "out").mkdir()
    counts = build(package, 1.0, {"iron bed"}, tmp_path / "out", lambda done, total: None)
    lines = (tmp_path / "out" / "pages.jsonl").read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["gimp-a-0"]
    assert (counts["pages"], counts["left out"]) == (1, 1)
