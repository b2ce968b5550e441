"""Counts a model's FLOPs, and holds the peak speeds of GPUs, to find how much of a GPU's speed a run uses.

Model FLOP utilisation (MFU, https://arxiv.org/abs/2204.02311, appendix B) is a quotient: the FLOPs that the
model needs for the tokens, divided by the FLOPs that the device could do in the same time at its peak.
Padding and recomputed activations do not count. CPUs have no published peak, so they have no MFU.

Letter: T tokens of a row.
"""

import math
import re

import torch

from minigpt.families.registry import LanguageModel, family_of

__all__ = ["model_flops", "peak_flops", "peaks"]

# Peak speeds by the device name in torch: (TFLOP/s, TB/s of memory). TFLOP/s are for matrix products
# with 16-bit inputs, float32 sums and no sparsity; data sheets often print twice as many (with sparsity).
# The rows for H100 (SXM), H200, A100 and L40S agree with tables that quote the data sheets. The other rows
# are not verified: compare them with the data sheets below before you publish an MFU.
# H200, H100: https://resources.nvidia.com/en-us-gpu-resources/h100-datasheet-24306
# A100: https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet.pdf
# L40S, L4, A10, T4, V100: https://www.nvidia.com/en-us/data-center/ followed by the name
# RTX 4090: https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
# RTX 3090: https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
_PEAKS = {
    r"NVIDIA H200": (989.0, 4.8),
    r"NVIDIA H200 NVL": (835.0, 4.8),
    r"NVIDIA H100 80GB HBM3": (989.0, 3.35),
    r"NVIDIA H100 NVL": (835.0, 3.9),
    r"NVIDIA H100 PCIe": (756.0, 2.0),
    r"NVIDIA A100-SXM4-80GB": (312.0, 2.039),
    r"NVIDIA A100 80GB PCIe": (312.0, 1.935),
    r"NVIDIA A100-(SXM4|PCIE)-40GB": (312.0, 1.555),
    r"NVIDIA L40S": (362.0, 0.864),
    r"NVIDIA L4": (121.0, 0.3),
    r"NVIDIA A10": (125.0, 0.6),
    r"NVIDIA GeForce RTX 4090": (165.0, 1.008),
    r"NVIDIA GeForce RTX 3090": (71.0, 0.936),
    r"Tesla V100-SXM2-.*": (125.0, 0.9),
    r"(NVIDIA|Tesla) (Tesla )?T4": (65.0, 0.32),
}


def peaks(device: torch.device) -> tuple[float, float]:
    """Return the device's peak FLOP/s of 16-bit products, and its memory's bytes/s; (nan, nan) if unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = (both for pattern, both in _PEAKS.items() if re.fullmatch(pattern, name))
    tera_flops, tera_bytes = next(found, (math.nan, math.nan))
    return tera_flops * 1e12, tera_bytes * 1e12


def peak_flops(device: torch.device, precision: str) -> float:
    """Return the device's peak FLOP/s of 16-bit products; nan for float32 or a device not in the table."""
    return math.nan if precision == "float32" else peaks(device)[0]


def model_flops(model: LanguageModel, tokens: float, counted: float, T: float) -> float:
    """Return the FLOPs of forward and backward pass. Family.flops has the formula.

    Args:
        model: the model.
        tokens: number of tokens, in rows of T tokens.
        counted: number of tokens that the loss counts.
        T: number of tokens of a row; the cost of attention depends on T.
    """
    if not hasattr(model, "lm_head"):  # a classifier's head needs very few FLOPs
        counted = 0
    return family_of(model.config).flops(model.config, tokens, counted, T)
