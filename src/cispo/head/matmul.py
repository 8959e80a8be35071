"""Float32 matrix products on CPU at the speed that the hardware has, at the same precision.

torch's CPU wheels multiply float32 matrices with MKL, which on CPUs not made by Intel leaves more than half of the
speed unused (AMD Zen 5, 512 × 512 × 32768: MKL 87 ms, oneDNN 36 ms, equal error 4e-7). The same wheels carry oneDNN,
and torch gives it the product once it is allowed to use bf16 inside. On a CPU without AMX oneDNN has no faster bf16
path for float32 operands and computes in full float32; this module turns the switch only after it has checked that.

Left out on purpose: speed probes. The choice must be the same in every run, or a resumed run would differ in bits.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def _intel() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return not cpuinfo.exists() or "GenuineIntel" in cpuinfo.read_text().partition("\n\n")[0]


@functools.cache
def onednn_is_better() -> bool:
    """Whether oneDNN multiplies float32 matrices here in full float32 and faster than torch's default library."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(matmul, "fp32_precision") or not torch.backends.mkl.is_available() or _intel():
        return False
    generator = torch.Generator().manual_seed(0)
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "bf16"
        for M, K, N in ((64, 512, 2048), (512, 64, 256), (1, 1024, 1024)):
            a_MK, b_KN = torch.randn(M, K, generator=generator), torch.randn(K, N, generator=generator)
            exact_MN = a_MK.double() @ b_KN.double()
            if ((a_MK @ b_KN) - exact_MN).norm() > 2e-6 * exact_MN.norm():
                return False  # bf16 was used inside: errors are near 2e-3
    finally:
        matmul.fp32_precision = before
    return True


@contextmanager
def fast_float32_matmul() -> Iterator[None]:
    """Within it, float32 products of CPU tensors run on the faster library. Process-wide, as torch's switch is."""
    if not onednn_is_better():
        yield
        return
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
