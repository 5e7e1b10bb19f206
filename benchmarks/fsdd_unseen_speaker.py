"""The spoken digits with one speaker held out whole: how well is a new voice understood?

    ecqx-onnx quantize models/kws_dscnn.py:kws_dscnn \\
        --data benchmarks/fsdd_unseen_speaker.py:fsdd_unseen_speaker ...

Six speakers, 500 clips each.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ecqx_onnx.data.npz import read_npz

FSDD = Path(__file__).resolve().parents[2] / "shared" / "data" / "fsdd.npz"
HELD_OUT = "theo"


def fsdd_unseen_speaker() -> dict[str, np.ndarray]:
    """x int16 [3000, 8000], y [3000], is_test bool [3000]: the 500 clips of HELD_OUT are for
    testing."""
    arrays = read_npz(FSDD, wanted=("x", "y", "speaker"))
    return {"x": arrays["x"], "y": arrays["y"], "is_test": arrays["speaker"] == HELD_OUT}
