"""Grouped-query attention, and its two ends: multi-head (G = H) and multi-query (G = 1)
attention.

    q = x Wq    k = x Wk    v = x Wv    y = o Wo
    o_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s over s <= t

    query heads   0 1 2 3 4 5 6 7      mha: G = 8, each query head its own key/value head
                  |_| |_| |_| |_|      gqa: G = 4, shown here, two query heads share one
    kv heads       0   1   2   3       mqa: G = 1, all of them share one

Sources: arXiv 1706.03762, section 3.2.2 (mha); 1911.02150, section 3 (mqa); 2305.13245,
section 2.2 (gqa); sinks: 2309.17453. B rows, T tokens, C hidden size, H query heads, G
key/value heads, D head size (C / H unless given).
"""

from torch import Tensor

from mka.attention.base import Bias
from mka.attention.grouped import GroupedAttention
from mka.memory.state import State
from mka.ops.rotary import RotaryEmbedding


class GroupedQueryAttention(GroupedAttention):
    """H query heads share G key/value heads (arXiv 2305.13245): x (B, T, C) -> y (B, T,
    C).

    Args:
        hidden_size: C, channels of x.
        num_heads: H, query heads.
        num_kv_heads: G, key/value heads, which the cache holds; it must divide H.
            Default: 4.
        local_window: w, the latest tokens that a token attends to, itself included.
            Default: None, all.
        sink_tokens: first tokens of a row that every later token attends to, in
            addition to its window. Default: None, 4 or as many as fit; none without a
            window.
        max_distance: the largest distance, in tokens, between a query and a sink under
            rotary positions: sinks further away are read as if they were this far.
            Default: None, no limit.
        head_dim: D, channels per head. Default: None, C / H, so that H must divide C.
        bias: which projections have a bias: True (all), False (none), or "qkv" (all but
            the output projection). Default: False.
        rotary: the rotary embedding of queries and keys, of size D. Default: None,
            none.

    Raises ValueError for heads that do not divide, for sizes below 1, for sinks that do
    not fit the window, for a max_distance below local_window + sink_tokens, and for a
    rotary embedding of another size.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int = 4,
        *,
        local_window: int | None = None,
        sink_tokens: int | None = None,
        max_distance: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        # The order of arguments here is that of users, there that of `CausalAttention`.
        sinks = (sink_tokens, max_distance)
        super().__init__(
            hidden_size, num_heads, num_kv_heads, local_window, head_dim, bias, rotary, *sinks
        )

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """Project, attend within the window, project back; see
        `CausalAttention.mix`."""
        q, k, v = self.queries(x), self.keys(x), self.values(x)
        return self.o_proj(self.read_local(q, k, v, positions, state).values.flatten(2))


class MultiHeadAttention(GroupedQueryAttention):
    """Every query head has its own key/value head, G = H (arXiv 1706.03762, section
    3.2.2).

    Args:
        hidden_size: C, channels of x.
        num_heads: H, heads.
        local_window: w, the latest tokens that a token attends to, itself included.
            Default: None, all.
        sink_tokens: first tokens of a row that every later token attends to, in
            addition to its window. Default: None, 4 or as many as fit; none without a
            window.
        max_distance: the largest distance, in tokens, between a query and a sink under
            rotary positions: sinks further away are read as if they were this far.
            Default: None, no limit.
        head_dim: D, channels per head. Default: None, C / H, so that H must divide C.
        bias: which projections have a bias: True (all), False (none), or "qkv" (all but
            the output projection). Default: False.
        rotary: the rotary embedding of queries and keys, of size D. Default: None,
            none.

    Raises ValueError as `GroupedQueryAttention` does.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        local_window: int | None = None,
        sink_tokens: int | None = None,
        max_distance: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            num_heads,
            local_window=local_window,
            sink_tokens=sink_tokens,
            max_distance=max_distance,
            head_dim=head_dim,
            bias=bias,
            rotary=rotary,
        )


class MultiQueryAttention(GroupedQueryAttention):
    """All query heads share one key/value head, G = 1 (arXiv 1911.02150, section 3).

    Args:
        hidden_size: C, channels of x.
        num_heads: H, query heads.
        local_window: w, the latest tokens that a token attends to, itself included.
            Default: None, all.
        sink_tokens: first tokens of a row that every later token attends to, in
            addition to its window. Default: None, 4 or as many as fit; none without a
            window.
        max_distance: the largest distance, in tokens, between a query and a sink under
            rotary positions: sinks further away are read as if they were this far.
            Default: None, no limit.
        head_dim: D, channels per head. Default: None, C / H, so that H must divide C.
        bias: which projections have a bias: True (all), False (none), or "qkv" (all but
            the output projection). Default: False.
        rotary: the rotary embedding of queries and keys, of size D. Default: None,
            none.

    Raises ValueError as `GroupedQueryAttention` does.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        local_window: int | None = None,
        sink_tokens: int | None = None,
        max_distance: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_heads,
            1,
            local_window=local_window,
            sink_tokens=sink_tokens,
            max_distance=max_distance,
            head_dim=head_dim,
            bias=bias,
            rotary=rotary,
        )
