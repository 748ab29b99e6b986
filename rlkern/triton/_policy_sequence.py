"""policy_loss's walk over a sequence: its terms' gradients, and the sums for loss and metrics."""

from __future__ import annotations

import triton
import triton.language as tl

from rlkern.triton._math import (
    INF,
    clamped,
    exp,
    exp_and_expm1,
    expm1_less,
    product,
)
from rlkern.triton._policy_math import (
    BY_TOKEN,
    CISPO,
    CLIP,
    DPPO_KL,
    DPPO_TV,
    GEOMETRIC,
    GMPO,
    LOG_BOUND,
    SAPO,
    SEQUENCE,
    SEQUENCE_SUM,
    SEQUENCE_TOKEN,
    SEQUENCE_TOKEN_LOG_BOUND,
    TOKEN,
    UNCORRECTED,
    VESPO,
    VESPO_LOG_FLOOR,
    clip_term,
    correction_weight,
    dppo_keeps,
    gmpo_term,
    kl_estimate,
    or_zero,
    sapo_term,
    vespo_phi,
)
from rlkern.triton._policy_sums import sequence_sums
from rlkern.triton._policy_totals import COLUMNS, store_totals
from rlkern.triton._tokens import (
    counting,
    flags,
    floats,
    floats_or,
)

POINTERS = [
    "logprobs", "advantages", "mask", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy",
    "token_weights", "entropy_mask", "offsets", "grad_logprobs", "grad_entropy", "totals",
]  # fmt: skip
INTEGERS = [
    "length", "logprobs_row", "advantages_row", "mask_row", "old_row", "ref_row", "rollout_row",
    "entropy_row", "weights_row", "entropy_mask_row", "grad_row",
]  # fmt: skip


@triton.jit(do_not_specialize=INTEGERS, do_not_specialize_on_alignment=POINTERS)
def sequence_kernel(
    logprobs, advantages, mask, old_logprobs, ref_logprobs, rollout_logprobs, entropy,
    token_weights, entropy_mask, offsets, grad_logprobs, grad_entropy, totals,
    length, logprobs_row, advantages_row, mask_row, old_row, ref_row, rollout_row,
    entropy_row, weights_row, entropy_mask_row, grad_row,
    clip_low, clip_high, ratio_low, ratio_high, dual_clip, ratio_cap, log_ratio_clamp,
    least_ratio, largest_ratio, kl_coef, entropy_coef, off_policy_threshold,
    correction_low, correction_high, tau_pos, tau_neg, k_pos, lambda_pos, k_neg, lambda_neg,
    SURROGATE: tl.constexpr, LEVEL: tl.constexpr, DUAL: tl.constexpr,
    KL: tl.constexpr, ESTIMATOR: tl.constexpr, KL_BOUNDED: tl.constexpr,
    KL_WEIGHTED: tl.constexpr, BONUS: tl.constexpr, BONUS_SHARED: tl.constexpr,
    SHARED: tl.constexpr, OFF_POLICY: tl.constexpr, CORRECTION: tl.constexpr,
    CORRECTION_MASKS: tl.constexpr, ONE_ADVANTAGE: tl.constexpr,
    BLOCK: tl.constexpr, CHAIN: tl.constexpr,
):  # fmt: skip
    """The gradients of one sequence, without the batch's denominators, and its totals."""
    sequence = tl.program_id(0).to(tl.int64)
    if offsets is None:
        begin = sequence * 0
        size = begin + length
    else:
        begin = tl.load(offsets + sequence)
        size = tl.load(offsets + sequence + 1) - begin
    lane = tl.arange(0, BLOCK)
    zero = tl.full((), 0.0, tl.float64)
    BY_SEQUENCE: tl.constexpr = LEVEL == SEQUENCE
    COUPLED: tl.constexpr = LEVEL == SEQUENCE or LEVEL == SEQUENCE_SUM
    SEQUENCE_CORRECTION: tl.constexpr = CORRECTION > BY_TOKEN
    DPPO: tl.constexpr = SURROGATE == DPPO_TV or SURROGATE == DPPO_KL
    SUMS_D: tl.constexpr = LEVEL != TOKEN or SURROGATE == VESPO
    LOG_WEIGHTS: tl.constexpr = CORRECTION == BY_TOKEN and (SURROGATE == GMPO or SURROGATE == VESPO)
    CLIPS: tl.constexpr = SURROGATE == CLIP or SURROGATE == CISPO or SURROGATE == GMPO or DPPO
    THROUGH_RATIO: tl.constexpr = SURROGATE == CLIP or SURROGATE == SAPO
    THROUGH: tl.constexpr = THROUGH_RATIO or (KL and KL_WEIGHTED)
    # Whether a token has a gradient of its own beside the shared ratio's.
    OWN: tl.constexpr = KL or SURROGATE == CISPO

    one_advantage = 0.0
    if ONE_ADVANTAGE:
        one_advantage = tl.load(advantages + sequence)

    t_d, t_correction, t_drift, t_log_weight, t_clipped, t_weight, t_advantage, count = (
        sequence_sums(
            logprobs, advantages, mask, old_logprobs, rollout_logprobs, token_weights,
            sequence, begin, size, lane, one_advantage,
            logprobs_row, advantages_row, mask_row, old_row, rollout_row, weights_row,
            clip_low, clip_high, log_ratio_clamp, correction_low, correction_high,
            SURROGATE, SUMS_D, OFF_POLICY, SEQUENCE_CORRECTION, LOG_WEIGHTS, CORRECTION_MASKS,
            SHARED, ONE_ADVANTAGE, BLOCK, CHAIN,
        )
    )  # fmt: skip
    tokens = count.to(tl.float64)
    at_least_one = tl.where(tokens > 1, tokens, 1.0)
    # 1 or 0: where the interpreter spreads a scalar condition over a block, it makes a float of it.
    near = 1.0
    ratio_here = 1.0
    ratio_open = 1.0
    sequence_weight = 1.0
    phi_pos = 0.0
    phi_neg = 0.0
    gmpo_slope = 0.0
    gmpo_loss = zero
    if OFF_POLICY:
        drift = (t_drift / at_least_one).to(tl.float32)
        near = tl.where(drift > off_policy_threshold, 0.0, 1.0)
    if SEQUENCE_CORRECTION:
        log_weight64 = t_correction
        if CORRECTION == GEOMETRIC:
            log_weight64 = t_correction / at_least_one
        sequence_weight = correction_weight(
            log_weight64.to(tl.float32), correction_low, correction_high, CORRECTION_MASKS
        )
    if LEVEL != TOKEN:
        if LEVEL == SEQUENCE_SUM:
            log_ratio = t_d.to(tl.float32)
        else:
            log_ratio = (t_d / at_least_one).to(tl.float32)
        if LEVEL == SEQUENCE_TOKEN:
            ratio_open = tl.where(log_ratio <= SEQUENCE_TOKEN_LOG_BOUND, 1.0, 0.0)
            log_ratio = tl.where(
                log_ratio > SEQUENCE_TOKEN_LOG_BOUND, SEQUENCE_TOKEN_LOG_BOUND, log_ratio
            )
        ratio_here = exp(log_ratio)
    if SURROGATE == VESPO:
        log_w = clamped((t_d + t_log_weight).to(tl.float32), VESPO_LOG_FLOOR, LOG_BOUND)
        phi_pos = vespo_phi(log_w, k_pos, lambda_pos)
        phi_neg = vespo_phi(log_w, k_neg, lambda_neg)
    if SURROGATE == GMPO:
        weights = tl.where(t_weight > 1, t_weight, 1.0)
        mean_advantage = t_advantage / at_least_one
        geometric = exp((t_clipped / weights).to(tl.float32))
        if LOG_WEIGHTS:
            geometric = product(geometric, exp((t_log_weight / at_least_one).to(tl.float32)))
        if SEQUENCE_CORRECTION:
            geometric = product(geometric, sequence_weight)
        gmpo_loss = -product(mean_advantage, geometric.to(tl.float64))
        if OFF_POLICY:
            gmpo_loss = tl.where((mean_advantage >= 0) | (near > 0), gmpo_loss, zero)
        gmpo_slope = (gmpo_loss / weights).to(tl.float32)

    share = 1.0
    share64 = zero + 1.0
    if SHARED:
        share64 = 1.0 / at_least_one
        share = share64.to(tl.float32)

    # -- the terms --
    t_loss = zero
    t_kl = zero
    t_entropy = zero
    t_approx = zero
    t_low = zero
    t_high = zero
    t_extra = zero
    t_ratio = zero
    t_rollout = zero
    t_squared = zero
    t_kept = zero
    t_phi = zero
    t_through = zero
    t_bonus = zero
    t_chosen = zero
    ratio_max = tl.full([BLOCK], -INF, tl.float32)
    minus_ratio_min = tl.full([BLOCK], -INF, tl.float32)
    counted = tl.zeros([BLOCK], tl.int32)
    for chain in range(0, size, CHAIN * BLOCK):
        s_loss = tl.zeros([BLOCK], tl.float32)
        s_kl = tl.zeros([BLOCK], tl.float32)
        s_entropy = tl.zeros([BLOCK], tl.float32)
        s_approx = tl.zeros([BLOCK], tl.float32)
        s_low = tl.zeros([BLOCK], tl.float32)
        s_high = tl.zeros([BLOCK], tl.float32)
        s_extra = tl.zeros([BLOCK], tl.float32)
        s_ratio = tl.zeros([BLOCK], tl.float32)
        s_rollout = tl.zeros([BLOCK], tl.float32)
        s_squared = tl.zeros([BLOCK], tl.float32)
        s_kept = tl.zeros([BLOCK], tl.float32)
        s_phi = tl.zeros([BLOCK], tl.float32)
        s_through = tl.zeros([BLOCK], tl.float32)
        s_bonus = tl.zeros([BLOCK], tl.float32)
        s_chosen = tl.zeros([BLOCK], tl.float32)
        for start in range(chain, tl.minimum(chain + CHAIN * BLOCK, size), BLOCK):
            at = begin + start
            inside = lane < tl.minimum(size - start, BLOCK).to(tl.int32)
            counts = counting(mask, sequence * mask_row + at, lane, inside)
            if mask is not None:
                counted += counts.to(tl.int32)
            logprob = floats(logprobs, sequence * logprobs_row + at, lane, inside, counts)
            old = floats_or(old_logprobs, sequence * old_row + at, lane, inside, counts, logprob)
            if ONE_ADVANTAGE:
                a = tl.where(counts, one_advantage, 0.0)
            else:
                a = floats(advantages, sequence * advantages_row + at, lane, inside, counts)

            d = logprob - old
            exp_d, expm1_d = exp_and_expm1(d)
            s_approx += expm1_less(d, expm1_d)
            r = exp_d
            is_open = counts
            if LEVEL != TOKEN:
                r = tl.where(counts, ratio_here, 0.0)
                if LEVEL == SEQUENCE_TOKEN:
                    is_open = tl.where(counts, ratio_open, 0.0) > 0
            elif SURROGATE != GMPO:
                below = d < -log_ratio_clamp
                above = d > log_ratio_clamp
                r = tl.where(below, least_ratio, tl.where(above, largest_ratio, exp_d))
                is_open = ~(below | above)
            if not BY_SEQUENCE:
                s_ratio += tl.where(counts, r, 0.0)
                ratio_max = tl.where(counts & (r > ratio_max), r, ratio_max)
                minus_ratio_min = tl.where(counts & (-r > minus_ratio_min), -r, minus_ratio_min)

            # The policy term: its value, its derivative by log r and by logprob with r held.
            loss = tl.zeros([BLOCK], tl.float32)
            through = loss
            direct = loss
            if SURROGATE == CLIP:
                loss, through, low, high, dual = clip_term(
                    r, a, ratio_low, ratio_high, ratio_cap, dual_clip, DUAL
                )
                if DUAL:
                    s_extra += tl.where(counts & dual, 1.0, 0.0)
            elif SURROGATE == CISPO:
                direct = -product(clamped(r, ratio_low, ratio_high), a)
                low = r < ratio_low
                high = r > ratio_high
                s_extra += tl.where(high & (a > 0), 1.0, 0.0)
            elif SURROGATE == SAPO:
                loss, through = sapo_term(r, a, tau_pos, tau_neg)
            elif SURROGATE == GMPO:
                # The sequence's loss is added once, not per token; here is its derivative alone.
                is_free = gmpo_term(d, a, clip_low, clip_high)[1]
                direct = tl.where(is_free & counts, gmpo_slope, 0.0)
                low = (d < -clip_low) & (a < 0)
                high = (d > clip_high) & (a > 0)
            elif SURROGATE == VESPO:
                phi = tl.where(a >= 0, phi_pos, phi_neg)
                s_phi += tl.where(counts, phi, 0.0)
                direct = -product(phi, a)
            elif DPPO:
                keep = dppo_keeps(a, logprob, old, clip_low, clip_high, SURROGATE == DPPO_KL)
                capped = tl.where(r > ratio_cap, ratio_cap, r)
                direct = tl.where(keep, -product(capped, a), 0.0)
                low = ~keep & (a < 0)
                high = ~keep & (a > 0)
            else:
                direct = -a
            if CLIPS:
                s_low += tl.where(counts & low, 1.0, 0.0)
                s_high += tl.where(counts & high, 1.0, 0.0)
            if not (THROUGH_RATIO or SURROGATE == GMPO):
                loss = product(direct, logprob)

            rollout_weight = sequence_weight
            if CORRECTION != UNCORRECTED:
                if CORRECTION == BY_TOKEN:
                    rollout = floats(
                        rollout_logprobs, sequence * rollout_row + at, lane, inside, counts
                    )
                    rollout_weight = correction_weight(
                        or_zero(old - rollout), correction_low, correction_high, CORRECTION_MASKS
                    )
                rollout_weight = tl.where(counts, rollout_weight, 0.0)
                s_rollout += rollout_weight
                s_squared += rollout_weight * rollout_weight
            if OFF_POLICY:
                kept = (a >= 0) | (tl.where(counts, near, 0.0) > 0)
                s_kept += tl.where(counts & kept, 1.0, 0.0)
            # gmpo's weights are in its mean already.
            if SURROGATE == GMPO:
                if token_weights is not None:
                    weight = floats(
                        token_weights, sequence * weights_row + at, lane, inside, counts
                    )
                    direct = product(direct, weight)
            else:
                if OFF_POLICY:
                    loss = tl.where(kept, loss, 0.0)
                    through = tl.where(kept, through, 0.0)
                    direct = tl.where(kept, direct, 0.0)
                if token_weights is not None:
                    weight = floats(
                        token_weights, sequence * weights_row + at, lane, inside, counts
                    )
                    loss = product(loss, weight)
                    through = product(through, weight)
                    direct = product(direct, weight)
                if CORRECTION != UNCORRECTED and SURROGATE != VESPO:
                    loss = product(loss, rollout_weight)
                    through = product(through, rollout_weight)
                    direct = product(direct, rollout_weight)
                s_loss += loss
                if SHARED:
                    through *= share
                    direct *= share

            if ref_logprobs is not None:
                ref = floats(ref_logprobs, sequence * ref_row + at, lane, inside, counts)
                kl, kl_slope = kl_estimate(ref - logprob, ESTIMATOR, KL_BOUNDED)
                if KL_WEIGHTED:
                    kl = product(kl, r)
                    kl_slope = product(kl_slope, r)
                # Some estimators' slope is not 0 where zeros stand for a masked token.
                s_kl += tl.where(counts, kl, 0.0)
                if KL:
                    direct += tl.where(counts, kl_coef * share * kl_slope, 0.0)
                    if KL_WEIGHTED:
                        through += tl.where(counts, kl_coef * share * kl, 0.0)

            if grad_logprobs is not None:
                out = grad_logprobs + (sequence * grad_row + at) + lane
                if COUPLED:
                    if THROUGH:
                        s_through += through
                    if OWN:
                        tl.store(out, direct, mask=inside)
                else:
                    grad = direct
                    if THROUGH:
                        grad += tl.where(is_open, through, 0.0)
                    tl.store(out, tl.where(counts, grad, 0.0), mask=inside)
            if entropy is not None:
                h = floats(entropy, sequence * entropy_row + at, lane, inside, counts)
                s_entropy += h
                if BONUS:
                    chosen = counts
                    if entropy_mask is not None:
                        chosen = flags(entropy_mask, sequence * entropy_mask_row + at, lane, counts)
                    s_bonus += tl.where(chosen, h, 0.0)
                    s_chosen += tl.where(chosen, 1.0, 0.0)
                    if grad_entropy is not None:
                        each = -entropy_coef
                        if BONUS_SHARED:
                            each = -entropy_coef * share
                        out = grad_entropy + (sequence * grad_row + at) + lane
                        tl.store(out, tl.where(chosen, each, 0.0), mask=inside)

        t_approx += tl.sum(s_approx, 0).to(tl.float64)
        if SURROGATE != GMPO:
            t_loss += tl.sum(s_loss, 0).to(tl.float64)
        if not BY_SEQUENCE:
            t_ratio += tl.sum(s_ratio, 0).to(tl.float64)
        if CLIPS:
            t_low += tl.sum(s_low, 0).to(tl.float64)
            t_high += tl.sum(s_high, 0).to(tl.float64)
        if SURROGATE == CISPO or DUAL:
            t_extra += tl.sum(s_extra, 0).to(tl.float64)
        if SURROGATE == VESPO:
            t_phi += tl.sum(s_phi, 0).to(tl.float64)
        if CORRECTION != UNCORRECTED:
            t_rollout += tl.sum(s_rollout, 0).to(tl.float64)
            t_squared += tl.sum(s_squared, 0).to(tl.float64)
        if OFF_POLICY:
            t_kept += tl.sum(s_kept, 0).to(tl.float64)
        if ref_logprobs is not None:
            t_kl += tl.sum(s_kl, 0).to(tl.float64)
        if entropy is not None:
            t_entropy += tl.sum(s_entropy, 0).to(tl.float64)
            if BONUS:
                t_bonus += tl.sum(s_bonus, 0).to(tl.float64)
                t_chosen += tl.sum(s_chosen, 0).to(tl.float64)
        if COUPLED and grad_logprobs is not None:
            t_through += tl.sum(s_through, 0).to(tl.float64)

    if mask is not None:
        tokens = tl.sum(counted, 0).to(tl.float64)
        at_least_one = tl.where(tokens > 1, tokens, 1.0)

    # -- the shared ratio's gradient --
    if COUPLED and grad_logprobs is not None:
        through_each = t_through
        if BY_SEQUENCE:
            through_each = t_through / at_least_one
        each = through_each.to(tl.float32)
        # Another thread may have stored what this one is about to read.
        tl.debug_barrier()
        for start in range(0, size, BLOCK):
            at = begin + start
            inside = lane < tl.minimum(size - start, BLOCK).to(tl.int32)
            counts = counting(mask, sequence * mask_row + at, lane, inside)
            out = grad_logprobs + (sequence * grad_row + at) + lane
            grad = tl.where(counts, each, 0.0)
            if OWN:
                grad += tl.load(out, mask=counts, other=0.0)
            tl.store(out, grad, mask=inside)

    store_totals(
        totals + sequence * COLUMNS, tokens, at_least_one, ratio_here, ratio_max, minus_ratio_min,
        gmpo_loss, share64, t_loss, t_kl, t_entropy, t_approx, t_low, t_high, t_extra, t_ratio,
        t_rollout, t_squared, t_kept, t_phi, t_bonus, t_chosen,
        SURROGATE, BY_SEQUENCE, CORRECTION, OFF_POLICY, ONE_ADVANTAGE, BONUS_SHARED,
    )  # fmt: skip
