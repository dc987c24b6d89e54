"""The module that takes the place of a backbone's attention, and how the backbone's
mask reaches it."""

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
"""Name of `padding_mask` among transformers' attention masks."""


def padding_mask(*, q_length: int, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """transformers' hook for attention masks: the padding (B, columns seen and new), or
    None if there is none."""
    # No causal mask, because the mechanisms are causal by themselves. A call without
    # past columns is not asked for its values, since that would wait for the device.
    if attention_mask is None or attention_mask.shape[1] == q_length:
        return attention_mask
    return None if bool(attention_mask.all()) else attention_mask


AttentionMaskInterface.register(PADDING_MASK, padding_mask)


class AttentionAdapter(nn.Module):
    """The attention of one layer: passes transformers' arguments to a mechanism, using
    nothing but the contract of `CausalAttention`.

    Args:
        attention: the mechanism.
        layer_idx: number of the layer, from 0, as transformers counts the layers of a
            cache. Default: 0.
        dropout: probability of dropout on the outputs in training. Default: 0.
    """

    def __init__(
        self, attention: CausalAttention, layer_idx: int = 0, dropout: float = 0.0
    ) -> None:
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
        """Attend, with the cache if there is one.

        Args:
            hidden_states: (B, T, C).
            attention_mask: (B, T), or (B, S + T) with the S columns of the cache in
                front; zeros at padding. Default: None, no padding.
            position_ids: (B or 1, T). Default: None, valid tokens counted from 0.
            others: whatever else the backbone passes; the cache among it is found by
                its class.

        Returns (B, T, C), and None in the place of attention weights.

        Raises ValueError for a mask of another form, for a mask that contradicts the
        one that the cache was filled with, and if a cache is asked for and none is
        given.
        """
        cache = cache_for_block(self, self.layer_idx, others)
        past, valid = columns_of_mask(hidden_states, attention_mask)
        layer = None
        # Only without a cache can one row hold several documents: a state continues one
        # of them.
        if cache is None:
            documents = packed_documents(position_ids, valid)
            if documents is not None:
                documents = documents.expand(hidden_states.shape[:2])
            y, _state = self.attention(
                hidden_states, positions=position_ids, valid=valid, documents=documents
            )
        else:
            layer = state_layer(cache, self.layer_idx)
            # A cache that offloads keeps a layer's state on the device only while it is
            # used.
            if cache.offloading:
                layer.prefetch()
            begin_call(cache, layer, hidden_states, valid, past)
            y = layer.attend(self.attention, hidden_states, position_ids, valid)
            if cache.offloading:
                layer.offload()
        # Weights are over valid tokens; transformers' are over columns, padding
        # included.
        if (shown := shown_here()) is not None:
            shown[-1] = in_columns(shown[-1], valid, layer)
        return self.dropout(y), None


def packed_documents(positions: Tensor | None, valid: Tensor | None) -> Tensor | None:
    """The number of each token's document (B or 1, T), where positions (B or 1, T)
    start again; None if every row is one document."""
    # A compiled model cannot look at values; `with_documents` has asserted that there
    # is one.
    if (
        positions is None
        or positions.dim() != 2
        or positions.shape[1] < 2
        or torch.compiler.is_compiling()
    ):
        return None
    return documents_of(positions, valid)


def columns_of_mask(x: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """A mask (B, S + T) split into (B, S) for columns of the cache and (B, T) for those
    of x.

    x (B, T, C). Both are bool, False for padding; None if the mask says nothing about
    them, or if all columns of x are valid. Raises ValueError for a mask of another
    form.
    """
    if mask is None:
        return None, None
    rows, tokens = x.shape[:2]
    if mask.dim() != 2 or mask.shape[0] != rows or mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask is {tuple(mask.shape)}; it must be (rows, columns), zeros at "
            f"padding, with {rows} rows"
        )
    if mask.shape[1] == tokens:
        return None, mask.bool()
    past, valid = mask.bool().split([mask.shape[1] - tokens, tokens], dim=1)
    return past, None if bool(valid.all()) else valid


def in_columns(weights: Tensor, valid: Tensor | None, layer: StateLayer | None) -> Tensor:
    """Weights (B, H, T, N) over a row's N tokens as weights (B, H, T, columns seen),
    zeros at padding, as transformers returns them.

    Args:
        weights: both queries and keys are tokens, padding left out.
        valid: (B, T), which of this call's columns are tokens. None: all.
        layer: of the cache, which knows the columns of earlier calls. None: no cache.
    """
    # Keys first, over all columns; then queries, over those of this call.
    weights = spread(weights, valid if layer is None else layer.valid_columns())
    return spread(weights.transpose(2, 3), valid).transpose(2, 3)


def spread(weights: Tensor, valid: Tensor | None) -> Tensor:
    """(B, ., ., tokens) -> (B, ., ., columns): the tokens in order where `valid` (B,
    columns) is True, zeros elsewhere."""
    if valid is None:
        return weights
    valid = valid[:, None, None].to(weights.device)
    # The index of each valid column among the tokens; clamped for padding in front of
    # the first.
    place = (valid.cumsum(3) - 1).clamp(min=0)
    return weights.gather(3, place.expand(*weights.shape[:3], -1)).masked_fill(~valid, 0)
