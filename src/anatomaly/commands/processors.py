"""How many processors a container allows: torch asks which ones it may run on, not for how much of their time."""

from __future__ import annotations

import math
import os
from pathlib import Path

#: Where Linux says so: (quota, period) of version 2 in one file, of version 1 in two.
_LIMITS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))


def limit_threads(root: Path = Path("/sys/fs/cgroup")) -> None:
    """Start no more threads than the container has processors, unless OMP_NUM_THREADS says how many.

    Args:
        root: Where the limits stand.  Libraries that are loaded already have their threads.
    """
    for names in _LIMITS:
        try:
            quota, period = (float(word) for name in names for word in (root / name).read_text().split())
        except (OSError, ValueError):  # another system, or "max"
            continue
        if quota > 0 and period > 0:
            os.environ.setdefault("OMP_NUM_THREADS", str(min(math.ceil(quota / period), os.cpu_count() or 1)))
