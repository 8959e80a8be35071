"""The language-model head fused with the objective: hidden states in, loss and gradients out, no `[T, V]` logits.

A token-local objective depends on the model only through the sampled tokens' log-probs. Autograd on that small vector
gives one coefficient c_t = d(Σ w·loss)/d(log π_t) per token, and the logits' gradient is then
`c_t / temperature · (onehot − softmax)`: three matrix products in all (logits, dHidden, dHead) for any objective.

`linear_policy_loss` is that one pass. `linear_logprobs` gives differentiable log-probs instead and recomputes the
logits in backward: for objectives that need a whole sequence's log-probs first (GSPO). Backends: `reference` (the
spec), `chunked` (any torch device), `triton` (CUDA). Left out on purpose: reductions (they are `weights_T`), shifting
of tokens and padding (the caller gives flat rows), and heads that are sharded over the vocabulary.

    python -m pytest tests/test_head.py
"""

from __future__ import annotations

from cispo.head.api import LinearPolicyLoss, linear_logprobs, linear_policy_loss

__all__ = ["LinearPolicyLoss", "linear_logprobs", "linear_policy_loss"]
