"""What one step of a process costs: wall time, and peak memory where the system tells it apart from earlier steps."""

from __future__ import annotations

import time
from pathlib import Path


class Cost:
    """Measures from when it is made."""

    def __init__(self) -> None:
        try:  # Linux forgets the peak of earlier cells when asked to
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._reset = False
        else:
            self._reset = True
        self._started = time.perf_counter()

    def so_far(self) -> dict[str, float | None]:
        """Seconds, and MiB or None where the system only knows the peak of the whole process."""
        peak = None
        if self._reset:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
            peak = next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), None)
        return {"seconds": round(time.perf_counter() - self._started, 3), "peak_mib": peak and round(peak, 1)}
