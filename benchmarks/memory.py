"""Peak extra memory of one call, from the resident high-water mark of this process.

Linux keeps the mark as VmHWM and sets it back to the present resident size when "5" is written to
/proc/self/clear_refs, so allocators, workspaces and page tables that Python never sees are all
counted. `getrusage` has the same mark but cannot be reset: what building the inputs once took would
hide the call's own peak.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def _resident(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"this system reports no {field}")


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Bytes by which the resident size rises above its present value while `run` runs.

    The result counts: a caller who asks for a gradient must hold it. Call `run` once before, or
    code pages and thread stacks that are touched only once are charged to it.

    Raises:
        OSError: The system keeps no such mark, or refuses to reset it.
    """
    gc.collect()
    # Memory that an earlier call freed but malloc kept would be reused unseen.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR.write_text("5")
    before = _resident("VmRSS")
    result = run()
    peak = _resident("VmHWM")
    del result
    return max(peak - before, 0)
