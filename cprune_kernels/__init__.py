"""Operations on the experts of a Mixture-of-Experts layer: tensors in, tensors out. Knows no model, file or config.

Letters used in every shape: T tokens, K top-k (experts chosen per token), E experts, C experts kept, H hidden size,
I intermediate size, L layers.
"""

from __future__ import annotations

from cprune_kernels.layer import MergedExperts
from cprune_kernels.native import backend, use_large_pages

__all__ = ["MergedExperts", "backend", "use_large_pages"]
