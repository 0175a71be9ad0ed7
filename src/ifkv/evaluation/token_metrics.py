"""Metrics of two ways of computing the same answer's tokens, from their logits."""

from __future__ import annotations

from torch import Tensor


def divergence(truth: Tensor, logits: Tensor) -> float:
    """Return the mean over tokens of KL(truth || other), in nats.

    Args:
        truth: Logits ``[tokens, vocabulary]``.
        logits: Logits of the other, of the same shape.

    >>> import torch
    >>> logits = torch.tensor([[0.0, 1.0]])
    >>> divergence(logits, logits)
    0.0
    """
    p, q = truth.double().log_softmax(dim=-1), logits.double().log_softmax(dim=-1)
    return float((p.exp() * (p - q)).sum(dim=-1).mean().clamp(min=0))


def agreement(truth: Tensor, logits: Tensor) -> float:
    """Return the share of tokens with the same most likely next token; arguments as above."""
    return float((truth.argmax(dim=-1) == logits.argmax(dim=-1)).double().mean())


def negative_log_likelihood(logits: Tensor, token_ids: Tensor) -> float:
    """Return the mean over tokens of -log p(token), in nats.

    Args:
        logits: ``[tokens, vocabulary]``; row i predicts token i.
        token_ids: Long ``[tokens]``.

    >>> import torch
    >>> round(negative_log_likelihood(torch.zeros(2, 4), torch.tensor([0, 3])), 6)  # log 4
    1.386294
    """
    logs = logits.double().log_softmax(dim=-1)
    return float(-logs.gather(1, token_ids[:, None].to(logs.device)).mean())
