"""AdamW with moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861), by bitsandbytes.

A moment is one byte per weight, an index into 256 values, times the scale of its block of 256
weights. Blocks are cut from what is stepped, under ZeRO a rank's flat piece of many weights. So
beside each byte a checkpoint has the scale that goes with it, which fits any number of ranks: where
blocks are cut as before the bytes are taken as they are, and else they are made anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 256
CODES = ("state1", "state2")
"""The moments, as bitsandbytes calls them; in fp32 for vectors and embeddings."""

SCALES = ("scale1", "scale2")
"""Ours: the scale of every weight; they exist while a checkpoint is written or read."""

_MAPS = ("dynamic", "udynamic")  # the first moment has a sign


def optimizer(
    groups: list[dict[str, Any]], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    """AdamW whose groups have moments in 8 bits where their `eight_bit` says so.

    Raises:
        ValueError: bitsandbytes is missing.
    """
    try:
        from bitsandbytes.optim.adamw import AdamW8bit
    except ImportError:
        raise ValueError(
            "optimizer.name: adamw_8bit needs bitsandbytes: pip install bitsandbytes, or use adamw"
        ) from None

    class AdamW(AdamW8bit):
        """The bits are a group's own: under ZeRO a group is all that is left of its weights."""

        def get_config(self, gindex: int, pindex: int, group: dict[str, Any]) -> dict[str, Any]:
            config: dict[str, Any] = super().get_config(gindex, pindex, group)
            return config | {"optim_bits": 8 if group["eight_bit"] else 32}

    for group in groups:
        for parameter in group["params"]:
            parameter.kept = kept(group)
    made: torch.optim.Optimizer = AdamW(groups, betas=betas, eps=eps, min_8bit_size=0)
    return made


def kept(group: dict[str, Any]) -> tuple[str, ...]:
    """What a checkpoint has of each weight of a group."""
    return CODES + SCALES if group["eight_bit"] else CODES


def empty(optimizer: Any, piece: Tensor, group: dict[str, Any], step: int) -> dict[str, Any]:
    """The state of a piece, to be filled from a checkpoint."""
    if not group["eight_bit"]:
        return {"step": step} | {key: torch.zeros_like(piece) for key in CODES}
    if "dynamic" not in optimizer.name2qmap:
        optimizer.fill_qmap()
    state: dict[str, Any] = {"step": step}
    for number, (code, scale, kind) in enumerate(zip(CODES, SCALES, _MAPS, strict=True), 1):
        state[code] = torch.zeros_like(piece, dtype=torch.uint8)
        state[scale] = torch.zeros_like(piece)
        state[f"qmap{number}"] = optimizer.name2qmap[kind].to(piece.device)
    return state


def expand(state: dict[str, Any]) -> None:
    """Add the scale of every weight."""
    for number, (code, scale) in enumerate(zip(CODES, SCALES, strict=True), 1):
        absmax, codes = state.get(f"absmax{number}"), state[code]
        if absmax is not None:
            state[scale] = absmax.repeat_interleave(BLOCK)[: codes.numel()].view_as(codes)


def collapse(state: dict[str, Any]) -> None:
    """Take the scales of weights away; where blocks have none, quantise anew."""
    for number, (code, scale) in enumerate(zip(CODES, SCALES, strict=True), 1):
        if scale in state:
            state[f"absmax{number}"] = _blocks(
                state[code], state.pop(scale), state[f"qmap{number}"]
            )


def _blocks(codes: Tensor, scales: Tensor, values: Tensor) -> Tensor:
    """The scale of each block, [blocks]; where it was more than one, codes are changed in place.

    Args:
        codes: uint8, of any shape.
        scales: fp32, alike; zero behind the last weight.
        values: [256], rising, what codes stand for.
    """
    flat, count = codes.view(-1), -(-codes.numel() // BLOCK)
    padded = torch.zeros(count * BLOCK, device=codes.device)
    padded[: flat.numel()] = scales.reshape(-1)
    scales_NB = padded.view(count, BLOCK)
    absmax_N = scales_NB.amax(1)
    mixed = ((scales_NB != absmax_N[:, None]) & (scales_NB != 0)).any(1)
    if mixed.any():
        padded_codes = torch.zeros(count * BLOCK, dtype=torch.uint8, device=codes.device)
        padded_codes[: flat.numel()] = flat
        moments_MB = values[padded_codes.view(count, BLOCK)[mixed].long()] * scales_NB[mixed]
        absmax_N[mixed] = moments_MB.abs().amax(1)
        relative_MB = moments_MB / absmax_N[mixed][:, None].clamp_min(torch.finfo().tiny)
        between = (values[1:] + values[:-1]) / 2
        padded_codes.view(count, BLOCK)[mixed] = torch.bucketize(relative_MB, between).byte()
        flat.copy_(padded_codes[: flat.numel()])
    return absmax_N
