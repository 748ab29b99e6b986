"""token_logprobs and linear_token_logprobs of a vocabulary spread over three processes, which
import this by its name. Without a group: the same of the whole."""

from __future__ import annotations

import torch
import torch.distributed as dist

import rlkern

WIDTHS = (40, 1, 62)
V, D, TOKENS = sum(WIDTHS), 12, 30
#: name -> dtype, backend and options of token_logprobs.
CASES = {
    "fp32": (torch.float32, "native", {}),
    "bf16": (torch.bfloat16, "native", {"temperature": 0.7}),
    "softcap": (torch.float32, "native", {"softcap": 5.0, "temperature": 1.3}),
    "in place": (torch.float32, "native", {"inplace_backward": True}),
    "eager": (torch.float32, "eager", {"softcap": 9.0}),
    "float64": (torch.float64, "eager", {}),
}


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs():
    """Logits, token ids, mask and upstream gradients; every rank has a chosen token."""
    logits, ids = 4 * random(TOKENS, V, seed=1), torch.arange(TOKENS) * 7 % V
    ids[:3] = torch.tensor([40, 0, V - 1])
    logits[3, 41:] = -torch.inf
    logits[4, :40] = -torch.inf
    logits[5] = -torch.inf
    logits[6, 50] = torch.nan
    # One token with all the mass, one competitor on another rank.
    logits[7], ids[7] = -80, 2
    logits[7, 2], logits[7, 99] = 20, 3
    logits[8, ids[8]] = -torch.inf
    logits[9] *= 1e4
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[10:13] = False
    logits[10], ids[11] = torch.nan, -100
    return logits, ids, mask, random(2, TOKENS, seed=2)


def logits_case(name, columns, group):
    dtype, backend, options = CASES[name]
    logits, ids, mask, upstream = inputs()
    leaf = logits[:, columns].to(dtype).requires_grad_()
    with rlkern.use_backend(backend):
        out = rlkern.token_logprobs(
            leaf * 1, ids, mask=mask, return_entropy=True, vocab_group=group, **options
        )
    g, h = upstream.to(out.logprobs.dtype)
    (out.logprobs * g + out.entropy * h).nan_to_num(neginf=0.0).sum().backward()
    return [out.logprobs.detach(), out.entropy.detach(), leaf.grad]


def hidden_case(columns, group):
    """In chunks of 64 tokens, with a trained head and a bias."""
    tokens = 150
    hidden = random(tokens, D, seed=3).float().requires_grad_()
    weight = random(V, D, seed=4).float()[columns].requires_grad_()
    bias = random(V, seed=5).float()[columns].requires_grad_()
    ids = torch.arange(tokens) * 5 % V
    mask = torch.arange(tokens) % 4 != 1
    out = rlkern.linear_token_logprobs(
        hidden, weight, ids, bias=bias, mask=mask, temperature=0.8, return_entropy=True,
        memory_budget=64 * V, vocab_group=group,
    )  # fmt: skip
    g, h = random(2, tokens, seed=6).float()
    grads = torch.autograd.grad((out.logprobs * g + out.entropy * h).sum(), (hidden, weight, bias))
    return [out.logprobs.detach(), out.entropy.detach(), *grads]


def refusal(columns, group):
    logits, ids, mask, _ = inputs()
    try:
        rlkern.token_logprobs(logits[:, columns], ids + V, mask=mask, vocab_group=group)
    except ValueError as error:
        return str(error)


def process(rank, file, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=3)
    begin = sum(WIDTHS[:rank])
    columns, group = slice(begin, begin + WIDTHS[rank]), dist.group.WORLD
    found = {name: logits_case(name, columns, group) for name in CASES}
    found["hidden"] = hidden_case(columns, group)
    found["refusal"] = refusal(columns, group)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
