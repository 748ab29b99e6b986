"""Tiny models of transformers and a character tokenizer, made from nothing."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)


def char_tokenizer(alphabet: str, padding_side: str = "left") -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character of `alphabet`, besides padding and end.

    Args:
        alphabet: every character that prompts and answers are made of.
        padding_side: "left" for a language model, so that all completions of a batch start in one
            column; "right" for a classifier, whose learned positions count from the left.
    """
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", padding_side=padding_side
    )


def _config(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int, num_heads: int
) -> GPT2Config:
    return GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=hidden_size,
        n_layer=num_layers,
        n_head=num_heads,
        # GPT-2's own form of GELU in one operator, where "gelu_new" runs eight.
        activation_function="gelu_pytorch_tanh",
        # Dropout would make the ratio of new to old probabilities differ from 1 before any step.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        # GPT-2's 0.02 is meant for a width of 768; at this one it costs a long plateau.
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def tiny_gpt2(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int, num_heads: int
) -> GPT2LMHeadModel:
    """A randomly initialised GPT-2; the global generator of torch decides the weights.

    Learned positions, because the digit of an answer depends on digits at fixed places: a model
    with relative ones (Llama) needs two to three times the steps to find them.
    """
    return GPT2LMHeadModel(
        _config(tokenizer, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
    )


def tiny_classifier(
    tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, num_layers: int, num_heads: int
) -> GPT2ForSequenceClassification:
    """A randomly initialised GPT-2 that gives a text one score, read at its last token."""
    config = _config(tokenizer, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads)
    config.num_labels = 1
    return GPT2ForSequenceClassification(config)
