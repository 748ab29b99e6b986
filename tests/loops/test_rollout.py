"""Sampling, and reading the log-probabilities of what was sampled back, padded and packed."""

from __future__ import annotations

import pytest
import torch
from rlkern_loops import model
from rlkern_loops.options import RunConfig
from rlkern_loops.rollout import (
    completion_logprobs,
    end_tokens,
    in_batches,
    join,
    keep_top_p,
    sample,
)

PROMPTS = ["07+85=", "1+1="]  # of different lengths: padding must change nothing


@pytest.fixture(params=["gpt2", "llama", "qwen"])
def any_policy(request, policy, folders):
    if request.param == "gpt2":
        return policy
    return model.load(folders[request.param], RunConfig(), "cpu")


@torch.no_grad()
def alone(policy, prompt_ids, ids, temperature):
    """Log-probabilities of one completion, from the model's own logits without any padding."""
    logits = policy(torch.cat([prompt_ids, ids])[None]).logits[0, len(prompt_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, ids[:, None]).squeeze(-1)


def test_log_probabilities_are_those_without_padding(any_policy, tokenizer):
    torch.manual_seed(0)
    written = sample(
        any_policy, tokenizer, PROMPTS, max_new_tokens=6, temperature=0.8, group_size=8
    )
    assert written.ids.shape[0] == 16
    with torch.no_grad():
        logprobs = completion_logprobs(any_policy, written, temperature=0.8)
    for row in range(16):
        prompt = written.prompt_ids[row][written.prompt_mask[row].bool()]
        assert tokenizer.decode(prompt) == PROMPTS[row // 8]
        ids = written.ids[row][written.mask[row]]
        # fp32 sums of 16 terms in another order, four layers deep: some 1e-6 of logits about 10.
        torch.testing.assert_close(
            alone(any_policy, prompt, ids, 0.8), logprobs[row, : len(ids)], rtol=1e-4, atol=1e-4
        )
    assert not logprobs[~written.mask].any()


def test_packed_sequences_read_as_padded_ones(any_policy, tokenizer):
    torch.manual_seed(0)
    written = sample(
        any_policy, tokenizer, PROMPTS, max_new_tokens=6, temperature=1.5, group_size=4
    )
    ids, stands = written.sequences()
    trunk = model.backbone(any_policy)
    with torch.no_grad(), model.evaluating(any_policy):
        padded, packed = model._padded(trunk, ids, stands), model._packed(trunk, ids, stands)
    assert not stands.all()  # there is something to pack
    torch.testing.assert_close(packed[stands.bool()], padded[stands.bool()], rtol=1e-4, atol=1e-4)


def test_draws_follow_the_softmax(any_policy, tokenizer):
    torch.manual_seed(0)
    count = 4000
    written = sample(
        any_policy, tokenizer, ["1+1="], max_new_tokens=1, temperature=0.7, group_size=count
    )
    prompt = tokenizer("1+1=", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        probs = (any_policy(prompt).logits[0, -1] / 0.7).softmax(-1)
    found = torch.bincount(written.ids[:, 0], minlength=len(probs)) / count
    # Five standard deviations of a share of 4000 draws, the widest one.
    assert (found - probs).abs().max() < 5 * (0.25 / count) ** 0.5


def test_top_p_keeps_the_fewest_tokens_that_hold_it():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.97, 0.01, 0.01, 0.01]])
    assert (keep_top_p(probs, 0.65) > 0).tolist() == [
        [False, True, False, True], [True, False, False, False]
    ]  # fmt: skip
    assert (keep_top_p(probs, 0.75) > 0).tolist()[0] == [False, True, True, True]
    assert (keep_top_p(probs, 1e-6) > 0).sum(1).tolist() == [1, 1]


def test_a_tiny_top_p_is_greedy(policy, tokenizer):
    drawn = sample(policy, tokenizer, PROMPTS, max_new_tokens=4, temperature=1.0, top_p=1e-6)
    best = sample(policy, tokenizer, PROMPTS, max_new_tokens=4, temperature=0.0)
    assert torch.equal(drawn.ids, best.ids)
    prompt = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    assert best.ids[1, 0].item() == policy(prompt).logits[0, -1].argmax().item()


def test_the_mask_ends_with_the_end_token(policy, tokenizer):
    torch.manual_seed(0)
    written = sample(
        policy, tokenizer, ["07+85="], max_new_tokens=30, temperature=1.0, group_size=32
    )
    for ids, mask, finished in zip(written.ids, written.mask, written.finished, strict=True):
        ends = (ids == tokenizer.eos_token_id).nonzero()
        length = int(ends[0]) + 1 if finished else 30
        assert mask.sum() == length and mask[:length].all()
        assert bool(len(ends)) == bool(finished)
    assert written.finished.any()


def test_any_of_several_end_tokens_ends(policy, tokenizer):
    five = tokenizer("5")["input_ids"][0]
    policy.generation_config.eos_token_id = [tokenizer.eos_token_id, five]
    assert end_tokens(policy, tokenizer) == sorted([tokenizer.eos_token_id, five])
    torch.manual_seed(0)
    written = sample(policy, tokenizer, ["1+1="], max_new_tokens=30, temperature=1.0, group_size=32)
    last = written.ids.gather(1, written.mask.sum(1, keepdim=True) - 1)[:, 0]
    assert (last[written.finished] == five).any()
    assert ((written.ids == five) & written.mask).sum() == (last == five).sum()


def test_batches_of_a_batch(policy, tokenizer):
    torch.manual_seed(0)
    written = sample(
        policy, tokenizer, PROMPTS * 3, max_new_tokens=8, temperature=1.0, group_size=4,
        batch_size=8,
    )  # fmt: skip
    assert written.ids.shape[0] == 24
    prompts = tokenizer.batch_decode(written.prompt_ids, skip_special_tokens=True)
    assert prompts == [p for p in PROMPTS * 3 for _ in range(4)]
    short, long = written.select(torch.arange(4, 8)), written.select(torch.arange(0, 4))
    assert short.prompt_ids.shape[1] == 4 and long.prompt_ids.shape[1] == 6
    joined = join([long, short], tokenizer.pad_token_id)
    assert joined.texts(tokenizer) == written.select(torch.arange(8)).texts(tokenizer)

    def read(part):
        return (completion_logprobs(policy, part),)

    (whole,), (parts,) = in_batches(read, written, 0), in_batches(read, written, 5)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
