from __future__ import annotations

import io
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from format_toys import clip

from data_packing.images import DocumentError, decode
from data_packing.video import FRAMES, sample_frames

av = pytest.importorskip("av")


def brightness(frames: object) -> list[int]:
    return [round(decode(frame.data).mean() / 8) for frame in frames]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("codec", "container"), [("libx264", "mp4"), ("libvpx", "webm"), ("mpeg4", "avi")]
)
def test_frames_are_the_middles_of_equal_parts(codec: str, container: str, tmp_path: Path) -> None:
    data = clip(30, codec, container)
    (tmp_path / "clip").write_bytes(data)
    for frames, expected in ((1, [15]), (3, [5, 15, 25]), (4, [3, 11, 18, 26])):
        found = sample_frames(data, frames)
        assert brightness(found) == expected
        assert [(frame.height, frame.width) for frame in found] == [(48, 64)] * frames
        assert found[0].data.startswith(b"\xff\xd8")
        assert sample_frames(tmp_path / "clip", frames) == found
    assert len(sample_frames(data)) == FRAMES
    assert brightness(sample_frames(clip(3, codec, container), 8)) == [0, 1, 2]


def test_the_rotation_in_the_file_is_applied() -> None:
    buffer = io.BytesIO()
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[:, :32] = 255  # bright on the left
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    data = bytearray(buffer.getvalue())
    matrix = data.index(b"tkhd") + 4 + 40  # version 0: after times, layer, volume
    one = 1 << 16
    assert struct.unpack_from(">9i", data, matrix) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    struct.pack_into(">9i", data, matrix, 0, one, 0, -one, 0, 0, 0, 0, 1 << 30)  # a quarter right
    turned = sample_frames(bytes(data), 1)[0]
    assert (turned.height, turned.width) == (64, 48)
    pixels = decode(turned.data)
    assert pixels[:20].mean() > 200  # what was left is on top
    assert pixels[-20:].mean() < 50


def test_bad_clips_are_refused_with_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = clip()
    monkeypatch.chdir(tmp_path)
    sound = io.BytesIO()
    with av.open(sound, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    (tmp_path / "real.mp4").write_bytes(data)
    playlist = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{tmp_path}/real.mp4\n#EXT-X-ENDLIST\n"
    )
    joined = "ffconcat version 1.0\nfile real.mp4\n"
    for bad, reason in (
        (b"", "empty video file"),
        (data[: len(data) // 2], "not a video that can be read"),
        (b"<html>404</html>" * 50, "not a video that can be read"),
        (playlist.encode(), "not a video that can be read"),
        (joined.encode(), "not a video that can be read"),
        (clip(30, "mpeg4", "mpegts"), "not a video that can be read"),  # not among CONTAINERS
        (sound.getvalue(), "no pictures"),
        (tmp_path / "nowhere.mp4", "No such file"),
    ):
        with pytest.raises(DocumentError, match=reason):
            sample_frames(bad)
    with pytest.raises(DocumentError, match="a video of 48x64 is 3,072 pixels, above the limit"):
        sample_frames(data, max_pixels=1000)
    with pytest.raises(ValueError, match="take at least 1"):
        sample_frames(data, 0)


def test_a_clip_whose_end_is_missing_is_refused_or_shorter_never_filled_up() -> None:
    data = clip(30, "libvpx", "webm")
    frames = sample_frames(data[: len(data) * 2 // 3], 4)
    values = brightness(frames)
    assert values == sorted(set(values))
    assert max(values) < 26


def test_without_pyav_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DocumentError, match=r"pip install 'mllm\[video\]'"):
        sample_frames(b"anything")
