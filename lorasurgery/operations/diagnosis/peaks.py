"""What makers say of their processors' memory: GB/s, by a part of the name that the driver reports."""

from __future__ import annotations

# the first that fits counts, so that the longer names come first
PEAKS = (
    ("GB200", 8000), ("B200", 8000), ("GH200", 4000), ("H200", 4800), ("H100 PCIe", 2000), ("H100 NVL", 3900),
    ("H100", 3350), ("H20", 4000), ("A100-SXM4-80GB", 2039), ("A100 80GB", 1935), ("A100", 1555),
    ("A40", 696), ("A30", 933), ("A10G", 600), ("A10", 600), ("L40S", 864), ("L40", 864), ("L4", 300), ("T4", 320),
    ("V100", 900), ("RTX 5090", 1792), ("RTX 4090", 1008), ("RTX 3090 Ti", 1008), ("RTX 3090", 936),
    ("RTX 6000 Ada", 960), ("RTX A6000", 768), ("MI300X", 5300), ("MI325X", 6000), ("MI250X", 3277),
)  # fmt: skip


def peak(device: str) -> float | None:
    """GB/s of the memory, where it is known; a laptop's part only shares its name."""
    if "Laptop" in device:
        return None
    return next((float(speed) for name, speed in PEAKS if _named(name, device)), None)


def _named(name: str, device: str) -> bool:
    """L4 is no part of L40."""
    words = device.replace("NVIDIA", " ").replace("-", " - ").split()
    parts = name.replace("-", " - ").split()
    return any(words[i : i + len(parts)] == parts for i in range(len(words)))
