"""Loading models: what stands between hidden states and logits, and what cannot be used."""

from __future__ import annotations

import pytest
import torch
from rlkern_loops import model
from rlkern_loops.options import RunConfig
from rlkern_loops.rollout import completion_logprobs, sample

# Architectures, each for a thing of its own between hidden states and logits, or in its cache.
KINDS = {
    "gemma2": {"final_logit_softcapping": 2.0, "sliding_window": 4, "head_dim": 8},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
    "gpt_neox": {},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16, "dropout": 0.1},
    "mamba": {"state_size": 4},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_log_probabilities_are_the_models_own(make_model, tokenizer, kind):
    policy = model.load(make_model(kind, **KINDS[kind]), RunConfig(), "cpu")
    torch.manual_seed(0)
    written = sample(
        policy, tokenizer, ["07+85=", "1+1="], max_new_tokens=8, temperature=1.0, group_size=3
    )
    # In train(), as an update reads them: dropout would show.
    assert policy.training
    logprobs = completion_logprobs(policy, written)
    policy.eval()
    for row in range(6):
        prompt = written.prompt_ids[row][written.prompt_mask[row].bool()]
        ids = written.ids[row][written.mask[row]]
        logits = policy(torch.cat([prompt, ids])[None], use_cache=False).logits[0]
        own = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        # fp32 sums in another order, through two layers of logits up to 10.
        torch.testing.assert_close(logprobs[row, : len(ids)], own, rtol=1e-4, atol=1e-4)


def test_a_head_that_is_more_than_a_product_is_refused(make_model):
    folder = make_model("bert", is_decoder=True)
    with pytest.raises(model.ModelError, match="logits of .*bert' are not its lm_head times"):
        model.load(folder, RunConfig(), "cpu")


def test_a_model_that_reads_packed_sequences_as_one_is_refused(make_model, folders):
    whole = model.load(make_model("bloom", n_layer=2, n_head=2), RunConfig(), "cpu")
    with pytest.raises(model.ModelError, match="attention: .*expected sdpa"):
        model._check_packing(whole, "bloom")
    model._check_packing(model.load(folders["llama"], RunConfig(), "cpu"), "llama")


def test_what_cannot_be_loaded_is_named(tmp_path, folders):
    for load in (model.load_tokenizer, model.max_positions):
        with pytest.raises(model.ModelError, match=f"model: cannot load .*{tmp_path}"):
            load(str(tmp_path))
    trunk = model.load_backbone(folders["llama"], RunConfig(), "cpu")
    trunk.save_pretrained(tmp_path)  # without its lm_head
    with pytest.raises(model.ModelError, match="lacks weights of LlamaForCausalLM: lm_head.weight"):
        model.load(str(tmp_path), RunConfig(), "cpu")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(model.ModelError, match=f"model: cannot load '{tmp_path}': .*incomplete"):
        model.load(str(tmp_path), RunConfig(), "cpu")


def test_precision_and_freezing(folders):
    config = RunConfig(precision="bf16")
    trained, frozen = (model.load(folders["llama"], config, "cpu", frozen=f) for f in (0, 1))
    assert {p.dtype for p in trained.parameters()} == {torch.float32} and trained.training
    assert {p.dtype for p in frozen.parameters()} == {torch.bfloat16} and not frozen.training
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize(
    "wanted,precision,device,installed,expected",
    [
        ("auto", "bf16", "cuda", True, "flash_attention_2"),
        ("auto", "bf16", "cuda", False, None),
        ("auto", "bf16", "cpu", True, None),
        ("auto", "fp32", "cuda", True, None),
        ("flash", "bf16", "cuda", False, "flash_attention_2"),
        ("sdpa", "bf16", "cuda", True, "sdpa"),
    ],
)
def test_attention(monkeypatch, wanted, precision, device, installed, expected):
    monkeypatch.setattr(model.importlib.util, "find_spec", lambda name: installed or None)
    assert model.attention_name(wanted, precision, device) == expected
