"""Exchange the attention in a plain PyTorch block by changing one line.

python examples/attention_in_your_model.py
"""

import torch
from torch import Tensor, nn

from mka.attention import CausalAttention, build_attention


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, hidden_size: int, attention: CausalAttention) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attention = attention
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x (B, T, C), valid (B, T) bool, False for padding -> (B, T, C)."""
        # The state is for decoding; a whole row needs none.
        attended, _state = self.attention(self.norm_1(x), valid=valid)
        x = x + attended
        return x + self.mlp(self.norm_2(x))


def main() -> None:
    """Print what each mechanism costs, and check that padding does not change its output."""
    torch.manual_seed(0)
    x = torch.randn(2, 300, 256)
    valid = torch.ones(2, 300, dtype=torch.bool)
    # The second row is padded on the left; padding may be anywhere.
    valid[1, :100] = False

    # The last two columns are for a context of 8,192 tokens, where the mechanisms differ most.
    print(f"{'':5} {'parameters':>11} {'state bytes, 8K tokens':>23} {'FLOPs, token 8K':>16}")
    for kind, options in {
        "mha": {},
        "gqa": {"num_kv_heads": 2},
        "mla": {},
        "mka": {"num_kv_heads": 2, "local_window": 128},
        "fmka": {"num_kv_heads": 2, "local_window": 128},
    }.items():
        attention = build_attention(kind, hidden_size=256, num_heads=8, **options)
        costs = (
            attention.num_parameters,
            attention.state_nbytes(1, 8192),
            attention.flops_per_token(8192),
        )
        print(f"{kind:5} {costs[0]:11,} {costs[1]:23,} {costs[2]:16,}")
        y = Block(256, attention)(x, valid)
        y.square().mean().backward()
        # The same row without its padding must give the same output.
        alone = attention(x[1:, 100:])[0]
        torch.testing.assert_close(
            attention(x, valid=valid)[0][1:, 100:], alone, atol=1e-5, rtol=1e-5
        )
    print("Every mechanism gives the same output for a row with and without padding.")


if __name__ == "__main__":
    main()
