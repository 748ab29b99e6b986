"""One training step of a small Qwen2 by different losses: forward, loss, backward, optimizer.

So that nobody reads a kernel's speed-up as a step's: the model's own work is the same for all, and
"without a loss", which takes the bare products of the lm_head and nothing else, is what no loss can
beat. The objective is on-policy GRPO with dapo's mean over tokens; all weights are trained in bf16.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks import bench_token_logprobs as logits_level
from benchmarks.case import Case, Contestant, Plan

TASK = "step"
SHAPE = {"sequences": 2, "tokens": 256, "vocab": 151936, "width": 512, "layers": 4}
QUICK_SHAPE = {"sequences": 2, "tokens": 32, "vocab": 4096, "width": 64, "layers": 2}
#: A step takes seconds, and little of it is noise.
PLAN = Plan(processes=2, rounds=3, seconds=4, least=2)
# Of the gradient in the 2-norm, and of the loss. bf16 rounds activations, logits and gradients by
# 2^-9, in some 10 products in a row: sqrt(10) * 2^-9 = 6e-3 where roundings are independent, which
# those of a residual stream are not; and eager rounds log-probabilities near -12 by 1/32.
TOLERANCE = 1e-1


def surrogate(logprobs, advantages, mask):
    """On-policy: the ratio is 1 and its gradient the log-probability's."""
    ratio = (logprobs - logprobs.detach()).exp()
    a = advantages[:, None]
    per_token = -torch.min(ratio * a, ratio.clamp(0.8, 1.28) * a)
    return (per_token * mask).sum() / mask.sum()


def from_logprobs(function):
    """Logits of all positions; the last one predicts nothing."""

    def loss(model, batch):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        logprobs = function(logits[:, :-1], batch.targets[:, :-1])
        return surrogate(logprobs.float(), batch.advantages, batch.mask[:, :-1])

    return loss


class Without(torch.autograd.Function):
    """Infinity, which no one takes for a loss, and the logits as their own gradient."""

    @staticmethod
    def forward(ctx, logits):
        ctx.save_for_backward(logits)
        return logits.new_full((), torch.inf)

    @staticmethod
    def backward(ctx, upstream):
        return ctx.saved_tensors[0]


def build_without():
    def loss(model, batch):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        return Without.apply(model.lm_head(hidden))

    return loss


def build_trl_head():
    from trl.trainer.utils import add_fused_lm_head

    patched: list[Any] = []

    def loss(model, batch):
        if not patched:
            # Other contestants' calls pass through to the model's own forward.
            add_fused_lm_head(model, outputs=("log_probs",))
            patched.append(model)
        out = model(input_ids=batch.ids, labels=batch.ids, fused_lm_head=True)
        return surrogate(out.log_probs.float(), batch.advantages, batch.mask[:, :-1])

    return loss


def build_liger():
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    fused = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=0.2, epsilon_high=0.28, loss_type="dapo"
    )

    def loss(model, batch):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        return fused(
            hidden[:, :-1], model.lm_head.weight, batch.targets[:, :-1], batch.mask[:, :-1],
            batch.advantages,
        )[0]  # fmt: skip

    return loss


def build_torch():
    """torch 2.13's linear_cross_entropy, whose values are the negative log-probabilities."""
    function = torch.nn.functional.linear_cross_entropy

    def loss(model, batch):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        flat, targets = hidden[:, :-1].flatten(0, 1), batch.targets[:, :-1].flatten()
        nll = function(flat, model.lm_head.weight, targets, reduction="none")
        logprobs = -nll.view(len(batch.ids), -1).float()
        return surrogate(logprobs, batch.advantages, batch.mask[:, :-1])

    return loss


def build_rlkern_logprobs():
    import rlkern

    policy = rlkern.PolicyLoss.preset("dapo")

    def loss(model, batch):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        with rlkern.use_backend("native"):
            logprobs = rlkern.token_logprobs(
                logits, batch.targets, mask=batch.mask, inplace_backward=True
            )
            return policy(logprobs, batch.advantages, mask=batch.mask).loss

    return loss


def build_rlkern_logits():
    import rlkern

    policy = rlkern.PolicyLoss.preset("dapo")

    def loss(model, batch):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        with rlkern.use_backend("native"):
            return policy.from_logits(
                logits, batch.targets, batch.advantages, mask=batch.mask, inplace=True
            ).loss

    return loss


def build_rlkern_hidden():
    import rlkern

    policy = rlkern.PolicyLoss.preset("dapo")

    def loss(model, batch):
        hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
        with rlkern.use_backend("native"):
            return policy.from_hidden(
                hidden, model.lm_head.weight, batch.targets, batch.advantages, mask=batch.mask
            ).loss

    return loss


BUILDERS = {
    "rlkern from_hidden": build_rlkern_hidden,
    "rlkern from_logits": build_rlkern_logits,
    "rlkern token_logprobs": build_rlkern_logprobs,
    "eager": lambda: from_logprobs(logits_level.build_eager()),
    "torch.compile": lambda: from_logprobs(logits_level.build_compiled()),
    "torch linear_cross_entropy": build_torch,
    "TRL": lambda: from_logprobs(logits_level.build_trl()),
    "TRL fused head": build_trl_head,
    "Liger": build_liger,
    "without a loss": build_without,
}


def with_step(build):
    """A contestant: its loss, around which everything is the same."""

    def build_task():
        function = build()

        def run(model, batch, optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss = function(model, batch)
            loss.backward()
            optimizer.step()
            return loss.detach(), model

        return run

    return build_task


class Batch:
    """Token ids, advantages and lengths; `targets` are the ids one place earlier."""

    def __init__(self, sequences: int, tokens: int, vocab: int, generator) -> None:
        self.ids = torch.randint(vocab, (sequences, tokens), generator=generator)
        self.targets = self.ids.roll(-1, 1)
        self.advantages = torch.randn(sequences, generator=generator)
        lengths = torch.randint(tokens // 2, tokens, (sequences, 1), generator=generator)
        self.mask = torch.arange(tokens) < lengths


class TrainingStep(Case):
    """A randomly made Qwen2 with a large vocabulary; the head shares the embedding's weight."""

    operator = "training_step"
    contestants = tuple(
        Contestant(TASK, name, with_step(build)) for name, build in BUILDERS.items()
    )
    bounds = {TASK: (f"{TASK}/without a loss",)}
    tolerance = TOLERANCE

    def __init__(self, sequences: int, tokens: int, vocab: int, width: int, layers: int) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=vocab, hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=layers, num_attention_heads=width // 32,
            num_key_value_heads=width // 64, tie_word_embeddings=True,
        )  # fmt: skip
        self.model = Qwen2ForCausalLM(config).bfloat16()
        self.batch = Batch(sequences, tokens, vocab, torch.Generator().manual_seed(0))
        self.pristine = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.bulk = self.model.lm_head.weight.detach()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        self.truth: tuple | None = None

    def prepare(self, task: str) -> tuple[Any, ...]:
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(self.pristine[name])
        # A call's gradients are part of its memory.
        self.optimizer.zero_grad(set_to_none=True)
        return self.model, self.batch, self.optimizer

    def _expected(self) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Loss and gradients of the same weights in float64, kept in fp32."""
        if self.truth is None:
            self.prepare(TASK)
            wide = copy.deepcopy(self.model).double()
            loss = from_logprobs(logits_level.eager)(wide, self.batch)
            loss.backward()
            self.truth = loss.item(), *gradients(wide)
        return self.truth

    @torch.no_grad()
    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64: of the loss, absolute; of the gradients of the embedding, which
        is the lm_head too, and of all other weights together, in the 2-norm."""
        loss, model = outputs
        if loss.isinf():
            return {"no loss": 0.0}
        mine = gradients(model)
        with torch.enable_grad():
            true_loss, *expected = self._expected()
        return {"loss": abs(loss.item() - true_loss)} | {
            name: ((g - e).norm() / e.norm()).item()
            for name, g, e in zip(("lm_head", "rest"), mine, expected, strict=True)
        }


def gradients(model) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the tied embedding, and of everything else in a row, in fp32."""
    head = model.lm_head.weight
    rest = [p.grad.float().flatten() for p in model.parameters() if p is not head]
    return head.grad.float(), torch.cat(rest)


@pytest.mark.parametrize("plan", [PLAN], ids=["small Qwen2"])
@pytest.mark.parametrize("contestant", [c.key for c in TrainingStep.contestants])
def test_training_step(contest, quick, plan, contestant):
    contest(TrainingStep, QUICK_SHAPE if quick else SHAPE, contestant, plan)
