"""Where the numerical tests of this folder run: on a GPU, or in Triton's interpreter.

Without TRITON_INTERPRET=1 and without a GPU none can; test_interpreted.py runs each file in a
process of its own where the variable is set before Triton is imported.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not INTERPRETED and not torch.cuda.is_available(),
        reason="no GPU: test_interpreted.py runs this file in Triton's interpreter",
    ),
    # The interpreter computes in numpy, which warns of every inf and NaN.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
on_gpu = pytest.mark.skipif(INTERPRETED, reason="too many programs for Triton's interpreter")
