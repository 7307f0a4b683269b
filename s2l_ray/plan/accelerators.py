"""What accelerators can do, by their makers' data sheets, and bytes for people."""

from __future__ import annotations

# Makers' data sheets: dense peak rates in operations per second in bfloat16 (float16 on T4, V100) and in float32, and memory
# in bytes. A sheet's GB is taken as 1e9: most devices have more (an 80 GB one 85e9), A10G and T4 a hundredth less.
ACCELERATORS = {
    "B200": (2250e12, 80e12, 180e9),
    "H200": (989e12, 67e12, 141e9),
    "H100": (989e12, 67e12, 80e9),
    "A100": (312e12, 19.5e12, 80e9),
    "A100-40GB": (312e12, 19.5e12, 40e9),
    "L40S": (362e12, 91.6e12, 48e9),
    "A10G": (70e12, 35e12, 24e9),
    "L4": (121e12, 30e12, 24e9),
    "V100": (125e12, 15.7e12, 16e9),
    "T4": (65e12, 8.1e12, 16e9),
}
ACCELERATORS_PER_NODE = 8

# Share of the peak that training and scoring reach: what well-tuned runs report. An assumption, and printed as one.
UTILISATION = 0.35


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"
