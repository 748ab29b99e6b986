"""One training step of a small Qwen2 by different losses: forward, loss, backward, optimizer.

So that nobody reads a kernel's speed-up as a step's: the model's own work is the same for all, and
"without a loss", which takes the bare products of the lm_head of the rows that count and nothing
else, is what no loss can beat. The objective is GRPO with dapo's mean over tokens, on tokens of an
older policy of which a fifth are clipped; all weights are trained in bf16.

A fifth of the tokens is masked, and masked rows need no logits. Eager is the lines that trainers
carry, over all positions; "eager, counting rows only" drops the masked ones before the lm_head, and
so do torch.compile, TRL's selective_log_softmax and linear_cross_entropy here, which all take flat
rows. TRL's fused head gets labels of -100 there, as it documents, and Liger the mask.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from benchmarks import bench_token_logprobs as logits_level
from benchmarks import linear_contestants as heads
from benchmarks.case import Case, Contestant, Plan
from benchmarks.objective import draw_ratios, learns, surrogate

TASK = "step"
SHAPE = {"sequences": 2, "tokens": 256, "vocab": 151936, "width": 512, "layers": 4}
QUICK_SHAPE = {"sequences": 2, "tokens": 32, "vocab": 4096, "width": 64, "layers": 2}
#: A step takes seconds, and little of it is noise.
PLAN = Plan(processes=2, rounds=3, seconds=4, least=2)
# Of the gradients in the 2-norm, and of the loss over the mean of |A|. bf16 rounds activations and
# gradients by 2^-9, forward and backward in some 60 products in a row: sqrt(60) * 2^-9 = 1.5e-2.
# Eager, TRL and linear_cross_entropy round log-probabilities near -12 to bf16, and some of them the
# log-sum-exp before, by up to 1/32: 2.6e-2 in the mean square. It is the error of a ratio and so of
# a row's gradient, 3.0e-2 with the other, and a sixth more is allowed as rows are few. In the loss
# these errors meet with either sign: three sigma of the quick shape's 36 rows are 1.3e-2.
TOLERANCE = {"loss": 1.3e-2, "lm_head": 3.5e-2, "rest": 3.5e-2, "no loss": 0.0}


def over_all(logprobs, batch):
    """The objective from log-probabilities of all positions."""
    per_token = surrogate(logprobs, batch.old, batch.advantages[:, None])
    return (per_token * batch.mask).sum() / batch.mask.sum()


def hidden_states(model, batch):
    return model.model(input_ids=batch.ids, use_cache=False).last_hidden_state


def from_logits(function):
    """Log-probabilities of the logits of all positions."""

    def loss(model, batch):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        return over_all(function(logits, batch.targets), batch)

    return loss


def from_counting_rows(function):
    """(hidden, weight, token_ids) -> log-probabilities, of the rows that the mask leaves."""

    def loss(model, batch):
        rows = hidden_states(model, batch)[batch.mask]
        logprobs = function(rows, model.lm_head.weight, batch.targets[batch.mask])
        advantages = batch.advantages[:, None].expand_as(batch.mask)[batch.mask]
        return surrogate(logprobs, batch.old[batch.mask], advantages).mean()

    return loss


def from_counting_logits(function):
    return from_counting_rows(lambda rows, weight, ids: function(rows @ weight.t(), ids))


class Without(torch.autograd.Function):
    """Infinity, which no one takes for a loss, and the logits as their own gradient.

    Logits of all rows; hidden and weight gradients of the first `learning`, which no clip holds.
    """

    @staticmethod
    def forward(ctx, rows, weight, learning):
        ctx.save_for_backward(rows, weight, rows @ weight.t())
        ctx.learning = learning
        return rows.new_full((), torch.inf)

    @staticmethod
    def backward(ctx, upstream):
        rows, weight, logits = ctx.saved_tensors
        n = ctx.learning
        of_rows = torch.zeros_like(rows)
        torch.mm(logits[:n], weight, out=of_rows[:n])
        return of_rows, logits[:n].t() @ rows[:n], None


def build_without():
    def loss(model, batch):
        order = batch.order[: heads.floor_rows(len(batch.order))]
        rows = hidden_states(model, batch).flatten(0, 1)[order]
        return Without.apply(rows, model.lm_head.weight, heads.floor_rows(batch.learning))

    return loss


def build_trl_head():
    from trl.trainer.utils import add_fused_lm_head

    patched: list[Any] = []

    def loss(model, batch):
        if not patched:
            # Other contestants' calls pass through to the model's own forward.
            add_fused_lm_head(model, outputs=("log_probs",))
            patched.append(model)
        labels = batch.targets.masked_fill(~batch.mask, -100)
        out = model(input_ids=batch.ids, shift_labels=labels, fused_lm_head=True)
        return over_all(out.log_probs, batch)

    return loss


def build_liger():
    liger = heads.build_liger_loss()

    def loss(model, batch):
        hidden, weight = hidden_states(model, batch), model.lm_head.weight
        return liger(len(hidden))(
            hidden, weight, batch.targets, batch.mask, batch.advantages,
            old_per_token_logps=batch.old,
        )[0]  # fmt: skip

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
            return policy(logprobs, batch.advantages, old_logprobs=batch.old, mask=batch.mask).loss

    return loss


def build_rlkern_logits():
    import rlkern

    policy = rlkern.PolicyLoss.preset("dapo")

    def loss(model, batch):
        logits = model(input_ids=batch.ids, use_cache=False).logits
        with rlkern.use_backend("native"):
            return policy.from_logits(
                logits, batch.targets, batch.advantages, old_logprobs=batch.old, mask=batch.mask,
                inplace=True,
            ).loss  # fmt: skip

    return loss


def build_rlkern_hidden():
    import rlkern

    policy = rlkern.PolicyLoss.preset("dapo")

    def loss(model, batch):
        hidden = hidden_states(model, batch)
        with rlkern.use_backend("native"):
            return policy.from_hidden(
                hidden, model.lm_head.weight, batch.targets, batch.advantages,
                old_logprobs=batch.old, mask=batch.mask,
            ).loss  # fmt: skip

    return loss


BUILDERS = {
    "rlkern from_hidden": build_rlkern_hidden,
    "rlkern from_logits": build_rlkern_logits,
    "rlkern token_logprobs": build_rlkern_logprobs,
    "eager": lambda: from_logits(logits_level.build_eager()),
    "eager, counting rows only": lambda: from_counting_logits(logits_level.build_eager()),
    "torch.compile": lambda: from_counting_logits(logits_level.build_compiled()),
    "linear_cross_entropy": lambda: from_counting_rows(heads.build_torch()),
    "linear_cross_entropy, chunked": lambda: from_counting_rows(heads.build_torch(chunked=True)),
    "TRL": lambda: from_counting_logits(logits_level.build_trl()),
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
        self.ratio = draw_ratios((sequences, tokens), generator)
        #: Set from the model's own log-probabilities.
        self.old = torch.empty(0)
        learning = self.mask & learns(self.ratio, self.advantages[:, None])
        #: Flat places of the rows that count, those with a gradient first, and how many these are.
        self.order = torch.cat(
            [x.flatten().nonzero()[:, 0] for x in (learning, self.mask & ~learning)]
        )
        self.learning = int(learning.sum())


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
        self.truth = self._exact()

    def prepare(self, task: str) -> tuple[Any, ...]:
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                value.copy_(self.pristine[name])
        # A call's gradients are part of its memory.
        self.optimizer.zero_grad(set_to_none=True)
        return self.model, self.batch, self.optimizer

    def _exact(self) -> tuple[float, torch.Tensor, torch.Tensor]:
        """Loss and gradients of the same weights in float64, kept in fp32, and on the way the old
        log-probabilities, for which each token's ratio is what the batch says."""
        wide = copy.deepcopy(self.model).double()
        logits = wide(input_ids=self.batch.ids, use_cache=False).logits
        logprobs = heads.chosen(logits, self.batch.targets)
        self.batch.old = (logprobs.detach() - self.batch.ratio.double().log()).float()
        loss = over_all(logprobs, self.batch)
        loss.backward()
        return loss.item(), *gradients(wide)

    @torch.no_grad()
    def errors(self, task: str, outputs: Any) -> dict[str, float]:
        """Errors against float64: of the loss, over the mean of |A|; of the gradients of the
        embedding, which is the lm_head too, and of all other weights together, in the 2-norm."""
        loss, model = outputs
        if loss.isinf():
            return {"no loss": 0.0}
        true_loss, *expected = self.truth
        size = self.batch.advantages[:, None].expand_as(self.batch.mask)[self.batch.mask].abs()
        return {"loss": abs(loss.item() - true_loss) / size.mean().item()} | {
            name: ((g - e).norm() / e.norm()).item()
            for name, g, e in zip(("lm_head", "rest"), gradients(model), expected, strict=True)
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
