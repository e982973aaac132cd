"""What a figure was measured on."""

import os
import platform
from pathlib import Path

import torch


def machine():
    """The processor's name, the number of its cores and the version of torch, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, torch {torch.__version__}"
