"""Grouped-query attention, and its two ends: multi-head (G = H) and multi-query (G = 1) attention.

    q = x Wq    k = x Wk    v = x Wv        o_t = sum_s softmax_s(q_t . k_s / sqrt(D)) v_s over s <= t        y = o Wo

    query heads   0 1 2 3 4 5 6 7      mha: G = 8, each query head its own key/value head
                  |_| |_| |_| |_|      gqa: G = 4, shown here, two query heads share one
    kv heads       0   1   2   3       mqa: G = 1, all of them share one

Sources: arXiv 1706.03762 (mha), 1911.02150 (mqa), 2305.13245 (gqa). B rows, T tokens, C hidden size, H query heads,
G key/value heads, D = C / H.
"""

from torch import Tensor

from mka.attention.base import Bias
from mka.attention.grouped import GroupedAttention
from mka.memory.state import State
from mka.ops.rotary import RotaryEmbedding


class GroupedQueryAttention(GroupedAttention):
    """H query heads share G key/value heads.

    With a window the first `sink_tokens` tokens are read by all (None: 4, or as many as fit), no further away than
    `max_distance` where positions are rotary (None: wherever they are).
    Raises ValueError where H does not divide C or G does not divide H, and for sinks that do not fit.
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
        sinks = (sink_tokens, max_distance)
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, head_dim, bias, rotary, *sinks)

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        q, k, v = self.queries(x), self.keys(x), self.values(x)
        return self.o_proj(self.read_local(q, k, v, positions, state).values.flatten(2))


class MultiHeadAttention(GroupedQueryAttention):
    """Every query head has its own key/value head: G = H."""

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
    """All query heads share one key/value head: G = 1."""

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
