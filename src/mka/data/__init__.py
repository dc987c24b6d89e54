"""Text to batches: corpus -> tokens -> batches.

Importing it loads neither transformers nor datasets.
"""

from mka.data.batches import BlockBatches, evaluation_batches
from mka.data.corpus import Corpus, load_corpus
from mka.data.tokenizer import TextTokenizer, load_tokenizer
from mka.data.tokens import TokenizedCorpus, TokenSplit, prepare_tokens

__all__ = [
    "BlockBatches",
    "Corpus",
    "TextTokenizer",
    "TokenSplit",
    "TokenizedCorpus",
    "evaluation_batches",
    "load_corpus",
    "load_tokenizer",
    "prepare_tokens",
]
