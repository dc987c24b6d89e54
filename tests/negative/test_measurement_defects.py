"""Planted in the measurement: the original's padded loss, evaluation on train, and memory never
reset."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import checks_training
from mka.data import TokenizedCorpus, TokenSplit, evaluation_batches
from mka.experiments.comparison import Comparison
from mka.training import memory

PAD = 0


def padded_gather(ids: np.ndarray, blocks: np.ndarray, sequence_length: int) -> Tensor:
    """Every row half full, padded to the block, and the padding scored."""
    places = blocks[:, None] * sequence_length + np.arange(sequence_length + 1)
    rows = torch.from_numpy(ids[places].astype(np.int64))
    rows[:, sequence_length // 2 :] = PAD
    return rows


def test_a_loss_over_padded_rows_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    model, split = checks_training.tiny_model().eval(), checks_training.held_out_split(150, low=1)
    torch.nn.init.normal_(model.get_parameter("transformer.wte.weight"), std=0.3)
    checks_training.assert_loss_is_of_the_text_alone(model, split)
    monkeypatch.setattr("mka.data.batches.gather", padded_gather)
    with pytest.raises(AssertionError, match="that of the text"):
        checks_training.assert_loss_is_of_the_text_alone(model, split)


def test_padding_is_what_made_the_perplexity_of_a_model_that_knows_nothing_look_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A model that has learnt to say padding and nothing else scores far below the vocabulary's
    perplexity."""

    class SaysPadding(checks_training.Recording):
        def forward(self, tokens: Tensor, use_cache: bool = False) -> object:
            output = super().forward(tokens)
            output.logits[..., PAD] = 8.0
            return output

    def perplexity() -> float:
        split = checks_training.held_out_split(150, low=1)
        batches = evaluation_batches(split, checks_training.LENGTH, 3)
        return checks_training.held_out_loss(SaysPadding(), batches, checks_training.CPU).perplexity

    honest = perplexity()
    monkeypatch.setattr("mka.data.batches.gather", padded_gather)
    assert honest > checks_training.VOCAB
    assert perplexity() < honest / 10


@pytest.mark.parametrize("split", ["train", "test"])
def test_evaluation_on_another_split_turns_red(split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Comparison.held_out

    def held_out(self: Comparison, max_tokens: int | None = None) -> Any:
        corpus = self.corpus
        wrong = corpus.splits | {
            "validation": TokenSplit(corpus.splits[split].ids, corpus.splits[split].token_bytes)
        }
        return real(
            replace(self, corpus=TokenizedCorpus(corpus.tokenizer, wrong, "", {})), max_tokens
        )

    checks_training.assert_evaluates_on_validation()
    monkeypatch.setattr(Comparison, "held_out", held_out)
    with pytest.raises(AssertionError, match=f"evaluation read the {split} split"):
        checks_training.assert_evaluates_on_validation()


@pytest.mark.skipif(not memory.can_reset_peak(), reason="no /proc/self/clear_refs or no glibc here")
def test_a_peak_that_is_never_reset_turns_red(monkeypatch: pytest.MonkeyPatch) -> None:
    checks_training.assert_earlier_memory_does_not_show()
    # 1 clears the referenced bits of the pages and leaves the peak alone.
    monkeypatch.setattr(memory, "RESET_PEAK", "1")
    with pytest.raises(AssertionError, match="MiB for 64"):
        checks_training.assert_earlier_memory_does_not_show()


def test_a_float16_step_that_is_taken_in_spite_of_an_overflow_turns_red() -> None:
    """The check of the precision tests, on a scaler that never looks."""
    model = checks_training.tiny_model()
    before = checks_training.weights_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.inf)
    optimizer.step()
    with pytest.raises(AssertionError):
        checks_training.assert_same_bytes(checks_training.weights_of(model), before)
