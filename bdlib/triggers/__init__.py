"""Triggers: functions that put the attacker's pattern on images, float32 (N, C, H, W) in [0, 1] in and out.

Here are those that need nothing but a seed; bdlib/attacks has what is crafted on a network or learned with one.
"""

from collections.abc import Callable

from bdlib.triggers.overlays import (
    TROJAN_3X3,
    added,
    blended,
    house,
    l2_inv,
    signal,
    signal_cbd,
    signal_rnp,
    trojan_square,
    trojan_watermark,
)
from bdlib.triggers.partial import two_at_once
from bdlib.triggers.patches import GRID_3, L0_INV, WHITE_3, WHITE_4, Trigger, corners, patch
from bdlib.triggers.warp import wanet

__all__ = ["TRIGGERS", "Trigger", "blended", "corners", "make", "patch", "signal", "wanet"]

# Name -> how to make the trigger.  Sources: BackdoorBench (white 3 x 3, Blended with alpha .2, sine wave, warp), ANP, RNP, CBD (grid),
# AWM and I-BAU (white 4 x 4, one pixel off the corner; Trojan square and watermark, L0-inv, L2-inv), ABL, RNP and CBD (Trojan 3 x 3),
# label-consistent attacks (corners), Adaptive-Blend and Adaptive-Patch (what they show at test time).
TRIGGERS: dict[str, Callable[[], Trigger]] = {
    "badnets": lambda: patch(WHITE_3),
    "badnets_grid": lambda: patch(GRID_3),
    "badnets_4x4": lambda: patch(WHITE_4, margin=1),
    "badnets_corners": lambda: corners(GRID_3),
    "l0_inv": lambda: patch(L0_INV),
    "trojan_3x3": lambda: added(TROJAN_3X3, bottom=4, right=4),
    "trojan_square": lambda: added(trojan_square(), bottom=2, right=2),
    "trojan_watermark": lambda: added(trojan_watermark()),
    "blended": blended,
    "blended_picture": lambda: blended(image=house()),
    "l2_inv": lambda: added(l2_inv()),
    "signal": signal,
    "signal_rnp": signal_rnp,
    "signal_cbd": signal_cbd,
    "wanet": wanet,
    "adaptive_blend": blended,
    "adaptive_patch": lambda: two_at_once,
}


def make(name: str) -> Trigger:
    """The trigger of this name.  `blended:FILE` blends that picture.  Raises ValueError if there is no such trigger."""
    kind, colon, picture = name.partition(":")
    if kind not in TRIGGERS or (colon and TRIGGERS[kind] is not blended):
        raise ValueError(f"trigger must be one of {', '.join(TRIGGERS)}, or blended:FILE, got {name!r}")
    return blended(image=picture) if colon else TRIGGERS[kind]()
