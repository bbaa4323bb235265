"""A distillation step (phase 2) against the same step written the usual way.

    python bench/sft_step.py --model models/smollm2-135m

32 different prompts behind one template, five scored tokens at the end of each row (Table 5, Sec.
3.2). Ours is sft_masked.sft_step with the template read once; the usual way is a padded
batch, full logits and labels of -100, by transformers' own loss, with the same fp32 parameters and
bf16 autocast. Both recompute activations in backward. Seconds are medians of steps taken in turn;
tokens, FLOP/s and gradients as in grpo_step.py.
"""

import argparse
import sys
from pathlib import Path

import torch
from sides import Side, Stopwatch, alone, compare_and_print, matrix_rate

sys.path.insert(0, str(Path(__file__).parent.parent))


def drawn(rows: int, template: int, own: int) -> list[tuple[list[int], list[bool]]]:
    """Random ids and masks; what is a row's own varies by a third, as prompts and answers do."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(10, 40_000, (n,), generator=generator).tolist()

    shared, found = tokens(template), []
    for k in range(rows):
        length = own * (5 + k % 3) // 6
        mask = [False] * (template + length)
        for t in range(5):
            mask[-8 - 10 * t] = True
        found.append(([*shared, *tokens(length)], mask))
    return found


class See:
    def __init__(self, model: str, rows: list, options: dict):
        import sft_masked
        from backend import packing, parallel, policy

        self.group = parallel.process_group()
        self.group.__enter__()
        self.parallel, self.sft = parallel, sft_masked
        self.config = policy.PolicyConfig(**options)
        self.policy = policy.load_policy(model, self.config)
        self.rows = [packing.Row(*row) for row in rows]
        self.optimizer = sft_masked.make_optimizer(self.policy, sft_masked.SFTConfig())
        c = self.config
        work = packing.share_out(self.rows, [0] * len(rows), c.micro_batch_tokens, c.shared_prefix)
        self.tokens = sum(batch.ids.numel() for batch in work.batches)

    def step(self, use=None) -> Stopwatch:
        watch, rows, c = Stopwatch(), self.rows, self.config
        with watch("update"):
            update = self.sft.Update(rows, lr=2e-6)
            hook = self.optimizer.register_step_pre_hook(lambda *_: use()) if use else None
            self.sft.sft_step(self.policy, self.optimizer, update, self.sft.SFTConfig(), c)
            if hook:
                hook.remove()
        return watch

    def gradients(self) -> dict[str, torch.Tensor]:
        kept = {}
        named = self.policy.model.named_parameters
        self.step(lambda: kept.update(
            {n: self.parallel.full_tensor(p.grad).float().clone() for n, p in named()}
        ))  # fmt: skip
        return kept


class Usual:
    def __init__(self, model: str, rows: list, options: dict):
        from transformers import AutoModelForCausalLM

        self.bf16 = options["dtype"] == "bfloat16"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, local_files_only=True
        )
        self.model.to(self.device).train()
        if options["gradient_checkpointing"]:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        width = max(len(ids) for ids, _ in rows)
        fill = [width - len(ids) for ids, _ in rows]
        self.ids = torch.tensor([[*i, *[0] * n] for (i, _), n in zip(rows, fill, strict=True)])
        self.seen = torch.tensor([[1] * (width - n) + [0] * n for n in fill])
        mask = torch.tensor([[*m, *[False] * n] for (_, m), n in zip(rows, fill, strict=True)])
        self.labels = self.ids.masked_fill(~mask, -100).to(self.device)
        self.ids, self.seen = self.ids.to(self.device), self.seen.to(self.device)
        self.size, self.tokens = options["micro_batch_rows"], self.ids.numel()
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=2e-6, weight_decay=0.0, fused=True
        )

    def step(self, use=None) -> Stopwatch:
        watch = Stopwatch()
        with watch("update"):
            for i in range(0, len(self.ids), self.size):
                at = slice(i, i + self.size)
                with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
                    out = self.model(
                        input_ids=self.ids[at], attention_mask=self.seen[at], labels=self.labels[at]
                    )
                (out.loss * len(self.ids[at]) / len(self.ids)).backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            if use:
                use()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return watch

    def gradients(self) -> dict[str, torch.Tensor]:
        kept = {}
        named = self.model.named_parameters
        self.step(lambda: kept.update({n: p.grad.float().clone() for n, p in named()}))
        return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--template", type=int, default=1000, help="tokens that all rows share")
    parser.add_argument("--own", type=int, default=180, help="tokens of prompt and answer, mean")
    parser.add_argument("--micro_batch_rows", type=int, default=4,
                        help="rows that the usual way takes at once")  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--compile", action="store_true", help="our side's layers compiled")
    args = parser.parse_args()
    rows = drawn(args.rows, args.template, args.own)
    lengths = [len(ids) for ids, _ in rows]
    print(f"{args.rows} rows of {min(lengths):,} to {max(lengths):,} tokens, {args.template:,} of "
          f"them shared, {args.threads} threads, {args.dtype}; seconds")  # fmt: skip
    own = sum(len(ids) - args.template for ids, _ in rows)
    rate = matrix_rate(args.model, args.template + own, args.dtype, args.threads)

    def sides(dtype: str, compiled: bool) -> list[Side]:
        common = {"dtype": dtype, "gradient_checkpointing": True}
        theirs = common | {"micro_batch_rows": args.micro_batch_rows}
        ours = common | {"compile": compiled}
        return [
            Side("SEE", See, args.threads, args.model, rows, ours),
            Side("usual", Usual, args.threads, args.model, rows, theirs),
        ]

    exact = [alone(side) for side in sides("float32", False)]
    pair = sides(args.dtype, args.compile)
    compare_and_print(pair, exact, args.repeats, rate, args.dtype)


if __name__ == "__main__":
    main()
