"""Who writes completions. `LocalSampler` samples in this process; other engines have files of their own."""

from cispo.sampling.local import LocalSampler

__all__ = ["LocalSampler"]
