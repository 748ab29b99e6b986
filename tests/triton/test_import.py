"""What importing rlkern costs: neither triton nor transformers."""

from __future__ import annotations

import subprocess
import sys


def test_import_leaves_triton_and_transformers_alone():
    # A torch built for CUDA may import triton by itself.
    program = (
        "import sys, torch; before = set(sys.modules); import rlkern; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "assert not new & {'triton', 'transformers'}, new; "
        "assert 'rlkern.triton.token_logprobs' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
