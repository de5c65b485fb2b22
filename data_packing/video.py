"""Clips to images: a few frames, evenly spread, each kept as a JPEG file.

PyAV (the extra `video`) reads them. Only the containers named in CONTAINERS are opened: FFmpeg also
knows playlists, which would name other files and addresses.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from data_packing.document import Image
from data_packing.images import MAX_PIXELS, DocumentError

__all__ = ["EXTENSIONS", "FRAMES", "sample_frames"]

FRAMES = 8
"""How many frames of a clip become images, when nothing else is said."""

QUALITY = 90
EXTENSIONS = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"
_MISSING = "reading video needs PyAV: pip install 'mllm[video]'"


def sample_frames(
    clip: bytes | Path, frames: int = FRAMES, max_pixels: int = MAX_PIXELS
) -> list[Image]:
    """Return frames of a clip as JPEG images, in order: the middle of each of `frames` equal parts.

    A clip that has fewer frames gives all of them. Rotation noted in the file is applied.

    Raises:
        DocumentError: missing, broken, without pictures, too large, or PyAV is not installed.
        ValueError: `frames` is less than 1.
    """
    if frames < 1:
        raise ValueError(f"{frames} frames of a clip; take at least 1")
    try:
        import av
        from av.error import FFmpegError
    except ImportError:
        raise DocumentError(_MISSING) from None
    try:
        file = io.BytesIO(clip) if isinstance(clip, bytes) else open(clip, "rb")  # noqa: SIM115
    except OSError as error:
        raise DocumentError(error.strerror or str(error)) from error
    try:
        with file:
            if not file.read(1):
                raise DocumentError("empty video file (0 bytes)")
            file.seek(0)
            with av.open(file, options={"format_whitelist": CONTAINERS}) as container:
                pictures = list(_pictures(container, frames, max_pixels))
    except DocumentError:
        raise
    except (FFmpegError, OSError, ValueError, EOFError, MemoryError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DocumentError(f"not a video that can be read: {reason}") from error
    if not pictures:
        raise DocumentError("no frame of the video can be decoded")
    return [Image.from_bytes(_jpeg(pixels), max_pixels=max_pixels) for pixels in pictures]


def _pictures(container: Any, frames: int, max_pixels: int) -> Iterator[NDArray[np.uint8]]:
    if not container.streams.video:
        raise DocumentError("the video has no pictures (sound only?)")
    stream = container.streams.video[0]
    if stream.height * stream.width > max_pixels:  # before anything is decoded
        raise DocumentError(
            f"a video of {stream.height:,}x{stream.width:,} is {stream.height * stream.width:,} "
            f"pixels, above the limit of {max_pixels:,}"
        )
    times, keys = _times(container, stream)
    if not times:
        raise DocumentError("the video holds no frames")
    count = min(frames, len(times))
    wanted = [times[(2 * part + 1) * len(times) // (2 * count)] for part in range(count)]
    for frame in _frames_at(container, stream, wanted, keys):
        turns = round((getattr(frame, "rotation", 0) or 0) / 90)
        yield np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), turns))


def _times(container: Any, stream: Any) -> tuple[list[int], list[int]]:
    """When the frames are shown, and which of them can be jumped to; nothing is decoded."""
    times, keys = [], []
    for packet in container.demux(stream):
        if packet.pts is None or not packet.size:
            continue
        times.append(packet.pts)
        if packet.is_keyframe:
            keys.append(packet.pts)
    return sorted(times), sorted(keys)


def _frames_at(container: Any, stream: Any, wanted: list[int], keys: list[int]) -> Iterator[Any]:
    """The frames shown at the wanted times (rising), each jumped to where that saves decoding."""
    decoded: Iterator[Any] = iter(())
    reached: int | None = None
    for time in wanted:
        place = bisect_right(keys, time) - 1
        key = keys[place] if place >= 0 else None
        if reached is None or (key is not None and key > reached):
            container.seek(wanted[0] if key is None else key, stream=stream)
            decoded = container.decode(stream)
        for frame in decoded:
            if frame.pts is None:
                continue
            reached = frame.pts
            if frame.pts >= time:
                yield frame
                break
        else:
            raise DocumentError("the video is cut short: not all of its frames can be decoded")


def _jpeg(pixels: NDArray[np.uint8]) -> bytes:
    data: bytes = simplejpeg.encode_jpeg(pixels, quality=QUALITY, colorspace="RGB")
    return data
