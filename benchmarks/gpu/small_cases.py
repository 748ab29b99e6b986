"""Small calls of every kernel, for compute-sanitizer: every path, few blocks."""

from __future__ import annotations

import torch

import rlkern


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for vocab in (1, 7, 1003, 33001):
            for softcap, entropy in ((None, False), (30.0, True)):
                whole = torch.randn(2, 4, vocab, device=device).to(dtype).requires_grad_()
                ids = torch.randint(vocab, (2, 3), device=device)
                mask = torch.tensor([[True, True, False], [False, True, True]], device=device)
                # A slice: rows at every alignment, gradients at another.
                with rlkern.use_backend("native"):
                    out = rlkern.token_logprobs(
                        whole[:, 1:], ids, mask=mask, softcap=softcap, return_entropy=True,
                        temperature=torch.rand(2, 3, device=device) + 0.5,
                    )  # fmt: skip
                loss = out.logprobs.sum() + (out.entropy.sum() if entropy else 0.0)
                loss.backward()
                assert whole.grad is not None and whole.grad.isfinite().all()
                with rlkern.use_backend("native"):
                    made = whole * 1
                    rlkern.token_logprobs(
                        made, torch.zeros(2, 4, dtype=torch.long, device=device),
                        inplace_backward=True,
                    ).sum().backward()  # fmt: skip
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"small cases ran on {device}")


if __name__ == "__main__":
    main()
