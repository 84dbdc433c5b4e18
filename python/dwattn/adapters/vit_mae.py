"""transformers' ViT-MAE shuffles its patches; a grid needs them in raster order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dwattn.errors import UnsupportedAttentionError


class IdentityMasking:
    """Takes the place of ``ViTMAEEmbeddings.random_masking`` on one instance: nothing masked,
    nothing moved.

    The original sorts random noise even with ``mask_ratio=0``: the patches come out complete, but
    in a random order, on which no 3x3 neighbourhood exists. The function computed is the same
    either way, because attention does not depend on the order and ``ids_restore`` undoes it.
    """

    attribute = "random_masking"

    def __init__(self, config: Any) -> None:
        self.config = config

    @staticmethod
    def of(embeddings: nn.Module) -> tuple[nn.Module, IdentityMasking] | None:
        """``(embeddings, override)`` for ViT-MAE embeddings, None for others.

        Raises:
            UnsupportedAttentionError: the model drops patches (``mask_ratio > 0``).
        """
        if not hasattr(embeddings, IdentityMasking.attribute):
            return None
        config: Any = embeddings.config
        _check_ratio(config)
        return embeddings, IdentityMasking(config)

    def __call__(
        self, sequence: Tensor, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``sequence (B, N, D)`` unchanged, a mask ``(B, N)`` of zeros, and the identity order
        ``(B, N)``.
        """
        _check_ratio(self.config)
        if noise is not None:
            raise UnsupportedAttentionError(
                "ViTMAE was called with noise=...: a replaced layer needs the patches in raster "
                "order. Call it without noise, or dwattn.restore(model) first."
            )
        batch, tokens = sequence.shape[:2]
        order = torch.arange(tokens, device=sequence.device).expand(batch, tokens)
        return sequence, torch.zeros(batch, tokens, device=sequence.device), order


def _check_ratio(config: Any) -> None:
    if config.mask_ratio != 0:
        raise UnsupportedAttentionError(
            f"ViTMAE drops patches at random (config.mask_ratio={config.mask_ratio}), which leaves "
            "no grid to aggregate on. Set model.config.mask_ratio = 0.0 to use it as an encoder of "
            "whole images."
        )
