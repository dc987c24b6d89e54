"""Losses on the tokens that are due, alone and beside the text, against their definition."""

import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig

from mka.data.recall import NOT_ASKED, RecallBatch
from mka.models import build_model
from mka.training import answers_and_text_loss, answers_loss

VOCAB = 32


def test_the_losses_are_what_they_say():
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=VOCAB,
    )
    model = build_model(config, "mha", 0).double()
    tokens = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(0))
    targets = torch.full_like(tokens, NOT_ASKED)
    targets[0, -2:], targets[2, 5] = torch.tensor([3, 4]), 7
    batch = RecallBatch(tokens, targets)
    logits = model(tokens, use_cache=False).logits

    answers = torch.stack(
        [-logits[row, t].log_softmax(-1)[token] for row, t, token in due(targets)]
    ).mean()
    text = cross_entropy(logits[:, :-1].reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
    torch.testing.assert_close(answers_loss(model, batch), answers, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        answers_and_text_loss(model, batch), answers + text, rtol=1e-12, atol=1e-12
    )


def due(targets: torch.Tensor) -> list[tuple[int, int, int]]:
    """Row, position and token of every answer."""
    rows, places = torch.where(targets != NOT_ASKED)
    return [(int(r), int(t), int(targets[r, t])) for r, t in zip(rows, places, strict=True)]
