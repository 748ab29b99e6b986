"""Who computes a loss or log-probabilities from hidden states and an lm_head.

All take hidden [sequences, length, width] and weight [vocab, width]; eager's lines say what. Peers
get the options that were fastest for them at 4 sequences of 256 tokens, width 1024 and a vocabulary
of 32768 in bf16 on two Zen 5 cores.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.objective import CLIP_HIGH, CLIP_LOW, objective

#: Columns of the vocabulary that TRL's trainers work on at a time.
TRL_TILE = 32768


def chosen(logits, token_ids):
    return logits.log_softmax(-1).gather(-1, token_ids[..., None]).squeeze(-1)


def token_logprobs(hidden, weight, token_ids):
    return chosen((hidden @ weight.t()).float(), token_ids)


def eager(hidden, weight, token_ids, old_logprobs, advantages):
    return objective(token_logprobs(hidden, weight, token_ids), old_logprobs, advantages)


def eager_counting_rows(hidden, weight, token_ids, old_logprobs, advantages):
    """Sequences at zero advantage add nothing to the mean but their number of tokens."""
    some = advantages != 0
    loss = eager(hidden[some], weight, token_ids[some], old_logprobs[some], advantages[some])
    return loss * (some.sum() / len(some))


def compiled(function):
    return lambda: torch.compile(function, dynamic=False)


def floor_rows(count: int) -> int:
    """Rows that a bare product takes for `count` of them: a multiple of 16, and never more.

    Some odd numbers cost oneDNN a sixth more time, which whoever pads them avoids.
    """
    return count // 16 * 16


def build_products():
    """The matrix products alone, of as many rows as the last argument says.

    Which rows does not change the time, so none are gathered: whoever leaves some out need not have
    written them.
    """

    def run(hidden, weight, *given):
        flat = hidden.detach().flatten(0, 1)
        of_logits, of_gradients = map(floor_rows, given[-1])
        logits = flat[:of_logits] @ weight.detach().t()
        found = []
        if hidden.requires_grad:
            found.append(logits[:of_gradients] @ weight.detach())
        if weight.requires_grad:
            found.append(logits[:of_gradients].t() @ flat[:of_gradients])
        return None, found

    return run


def build_rlkern(metrics: bool = True, backend: str = "native"):
    import rlkern

    loss = rlkern.PolicyLoss.preset("dapo")

    def run(hidden, weight, token_ids, old_logprobs, advantages):
        with rlkern.use_backend(backend):
            return loss.from_hidden(
                hidden, weight, token_ids, advantages, old_logprobs=old_logprobs, metrics=metrics
            ).loss

    return run


def build_liger_loss():
    """Number of sequences -> Liger's loss with all of them in one chunk.

    A chunk converts the weight and adds its gradient as a whole, so one is faster than two or four;
    `compiled` made no difference, and stays as it is by default.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    @functools.cache
    def loss(sequences):
        return LigerFusedLinearGRPOLoss(
            beta=0.0, use_ref_model=False, epsilon_low=CLIP_LOW, epsilon_high=CLIP_HIGH,
            loss_type="dapo", chunk_size=sequences,
        )  # fmt: skip

    return loss


def build_liger(chunk: int | None = None):
    """`chunk`: sequences at a time; None: all."""
    loss = build_liger_loss()

    def run(hidden, weight, token_ids, old_logprobs, advantages):
        mask = torch.ones_like(token_ids)
        return loss(chunk or len(hidden))(
            hidden, weight, token_ids, mask, advantages, old_per_token_logps=old_logprobs
        )[0]

    return run


def build_rlkern_logprobs(backend: str = "native"):
    import rlkern

    def run(*args):
        with rlkern.use_backend(backend):
            return rlkern.linear_token_logprobs(*args)

    return run


def build_torch(chunked: bool = False):
    """torch's linear_cross_entropy, whose results have the dtype of the hidden states.

    Chunked: 256 rows and "accurate", which takes sums in the dtype of the inputs unless told
    otherwise. By itself it takes 32 rows and sums in fp32, by products that are slow on a CPU: ten
    times the time.
    """
    function = torch.nn.functional.linear_cross_entropy
    options = None
    if chunked:
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=256, chunking_method=None, acc_policy="accurate"
        )

    def run(hidden, weight, token_ids):
        flat, ids = hidden.flatten(0, -2), token_ids.flatten()
        loss = function(flat, weight, ids, reduction="none", options=options)
        return -loss.view(token_ids.shape)

    return run


def build_trl():
    from trl.kernels import ChunkedLogProbFunction

    def run(hidden, weight, token_ids):
        found = ChunkedLogProbFunction.apply(
            hidden.flatten(0, 1), weight, None, token_ids.flatten(), 1.0, TRL_TILE, None, 1.0, ()
        )
        return found[0].view(token_ids.shape)

    return run


#: Log-probabilities by name; a policy loss is each of them and the objective.
LOGPROBS = {
    "eager": lambda: token_logprobs,
    "torch.compile": compiled(token_logprobs),
    "linear_cross_entropy": build_torch,
    "linear_cross_entropy, chunked": lambda: build_torch(chunked=True),
    "TRL": build_trl,
}


def with_objective(build):
    def build_loss():
        function = build()

        def run(hidden, weight, token_ids, old_logprobs, advantages):
            return objective(function(hidden, weight, token_ids), old_logprobs, advantages)

        return run

    return build_loss


LOSSES = {
    "rlkern": build_rlkern,
    "eager": lambda: eager,
    "torch.compile": compiled(eager),
    "Liger": build_liger,
    "linear_cross_entropy": with_objective(build_torch),
    "linear_cross_entropy, chunked": with_objective(LOGPROBS["linear_cross_entropy, chunked"]),
}


def with_gradients(build):
    """A loss and its gradients; the last argument is for the bare products."""

    def build_task():
        function = build()

        def run(hidden, weight, *given):
            loss = function(hidden, weight, *given[:-1])
            wanted = [factor for factor in (hidden, weight) if factor.requires_grad]
            return loss, torch.autograd.grad(loss, wanted)

        return run

    return build_task


def with_upstream(build):
    def build_task():
        function = build()

        def run(hidden, weight, token_ids, upstream, rows):
            logprobs = function(hidden, weight, token_ids)
            wanted = (hidden, weight)
            return logprobs, torch.autograd.grad(logprobs, wanted, upstream.to(logprobs.dtype))

        return run

    return build_task


def without_gradients(build):
    def build_task():
        function = build()

        def run(hidden, weight, token_ids, rows):
            with torch.no_grad():
                return function(hidden, weight, token_ids)

        return run

    return build_task
