"""What stands where a backbone has its attention, and how the backbone's mask reaches it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface

from mka.attention import CausalAttention
from mka.memory.local import shown_here
from mka.models.cache import StateLayer, begin_call, state_layer
from mka.models.versions import cache_for_block
from mka.ops.packing import documents_of

PADDING_MASK = "mka_padding_mask"


def padding_mask(*, q_length: int, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """transformers' hook for attention masks: (B, columns seen and new), or None where nothing of it is padding.

    The mechanisms are causal by themselves.
    """
    if attention_mask is None or attention_mask.shape[1] == q_length:
        return attention_mask
    return None if bool(attention_mask.all()) else attention_mask


AttentionMaskInterface.register(PADDING_MASK, padding_mask)


class AttentionAdapter(nn.Module):
    """Speaks to a mechanism by the contract alone."""

    def __init__(self, attention: CausalAttention, layer_idx: int = 0, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = attention
        self.layer_idx = layer_idx
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, T, C), attention_mask (B, T) or with the columns of the cache before them (B, S + T),
        position_ids (B or 1, T) -> (y (B, T, C), None).

        `others`: what a block hands on; the cache among them is found by its class. Raises ValueError for a mask of
        another form or that takes back what it said of the cache's columns, and where a cache is asked for and none is
        given.
        """
        cache = cache_for_block(self, self.layer_idx, others)
        past, valid = columns_of_mask(hidden_states, attention_mask)
        layer = None
        if cache is None:
            documents = packed_documents(position_ids, valid)
            if documents is not None:
                documents = documents.expand(hidden_states.shape[:2])
            y, _state = self.attention(hidden_states, positions=position_ids, valid=valid, documents=documents)
        else:
            layer = state_layer(cache, self.layer_idx)
            if cache.offloading:
                layer.prefetch()
            begin_call(cache, layer, hidden_states, valid, past)
            y = layer.attend(self.attention, hidden_states, position_ids, valid)
            if cache.offloading:
                layer.offload()
        if (shown := shown_here()) is not None:
            shown[-1] = in_columns(shown[-1], valid, layer)
        return self.dropout(y), None


def packed_documents(positions: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """The documents of each row, told by positions (B or 1, T) that start again; None where there is one in each."""
    if positions is None or positions.dim() != 2 or positions.shape[1] < 2 or torch.compiler.is_compiling():
        return None  # a compiled model has asserted that there are none (`with_cache`)
    return documents_of(positions, valid)


def columns_of_mask(x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """What a mask says of the columns before those of x (B, T, C), and of these: (B, S) and (B, T) bool, or None."""
    if mask is None:
        return None, None
    rows, tokens = x.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; it must be (rows, columns), zeros at padding, with {rows} rows"
        )
    if mask.shape[1] == tokens:
        return None, mask.bool()
    past, valid = mask.bool().split([mask.shape[1] - tokens, tokens], dim=1)
    return past, None if bool(valid.all()) else valid


def in_columns(weights: Tensor, valid: Tensor | None, layer: StateLayer | None) -> Tensor:
    """Weights (B, H, T, N) over a row's tokens -> (B, H, T, columns seen), zeros at padding, as transformers has them.

    `valid` (B, T) are the tokens of this call's columns, None: all; `layer` knows those of the calls before.
    """
    weights = spread(weights, valid if layer is None else layer.valid_columns())
    return spread(weights.transpose(2, 3), valid).transpose(2, 3)


def spread(weights: Tensor, valid: Tensor | None) -> Tensor:
    """(..., tokens) -> (..., columns): each token's number where `valid` (B, columns) has it, zeros at padding."""
    if valid is None:
        return weights
    valid = valid[:, None, None].to(weights.device)
    place = (valid.cumsum(3) - 1).clamp(min=0)
    return weights.gather(3, place.expand(*weights.shape[:3], -1)).masked_fill(~valid, 0)
