"""The training side of one RL step against TRL's: reference, forward and backward, optimiser.

    python bench/grpo_step.py --model models/smollm2-135m
    python bench/grpo_step.py --model DIR --rollouts runs/NAME/rollouts/cycle_01.jsonl

One prompt with eight responses; the same model, loss, KL, clip, entropy bonus and optimiser on
both sides: AdamW with fp32 parameters, bf16 compute, activations recomputed in backward, which is
the default of both. Ours is grpo.rl_step under FSDP2 in a group of one; TRL's is GRPOTrainer's own
loss (`_compute_loss`, with its chunked head) in the order of its training step. Without --rollouts
the tokens are drawn at random: time does not depend on them. Seconds are medians of steps taken in
turn. Where a compiler is at hand TRL is compared a second time, with its `torch_compile`.

Tokens are what passes the layers in a forward pass; the ratio of the times is that of the tokens
times that of ms/token. FLOP/s are those of the products that the kernels are asked for. Gradients
in bf16 are compared with the same side's in fp32.

TRL's entropy bonus is a mean over the tokens of a micro-batch, ours a mean over responses: the same
where responses are of one length, or with --trl_rows 1.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from sides import Side, Stopwatch, alone, compare_and_print, matrix_rate

from backend.policy import PolicyConfig, check_compiler
from storage.record import read_rollouts

sys.path.insert(0, str(Path(__file__).parent.parent))
TEMPERATURE = 0.8


def drawn(prompt_tokens: int, responses: int, response_tokens: int) -> list[SimpleNamespace]:
    """A group of rollouts with random tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(10, 40_000, (n,), generator=generator).tolist())

    prompt = tokens(prompt_tokens)
    return [
        SimpleNamespace(
            prompt_ids=prompt, response_ids=tokens(response_tokens), reward=k / 10,
            sampled_logp=None, score_positions=None,
        )
        for k in range(responses)
    ]  # fmt: skip


def from_file(path: str) -> list:
    """The first group of a run's rollouts whose rewards differ."""

    groups: dict = {}
    for r in read_rollouts(Path(path)):
        groups.setdefault((r.step, r.prompt_id), []).append(r)
    return next(g for g in groups.values() if len({r.reward for r in g}) > 1)


class See:
    def __init__(self, model: str, rollouts: list, options: dict):
        import grpo
        from backend import packing, parallel, policy

        self.group = parallel.process_group()
        self.group.__enter__()
        self.grpo, self.parallel, self.rollouts = grpo, parallel, rollouts
        self.share_out = packing.share_out
        self.config = policy.PolicyConfig(
            dtype=options["dtype"],
            gradient_checkpointing=options["checkpointing"],
            shared_prefix=not options["plain"],
            compile=options["compile"],
        )
        self.policy = policy.load_policy(model, self.config)
        self.reference = policy.load_policy(model, self.config, trainable=False)
        self.optimizer = grpo.make_optimizer(self.policy, grpo.GRPOConfig())
        self.rows = [grpo.response_row(r.prompt_ids, r.response_ids) for r in rollouts]
        self.tokens = 0  # counted in a step
        self.vocabulary = self.policy.model.config.vocab_size

    def step(self) -> Stopwatch:
        watch, g, n = Stopwatch(), self.grpo, len(self.rollouts)
        with watch("reference"):
            c = self.config
            work = self.share_out(self.rows, [0] * n, c.micro_batch_tokens, c.shared_prefix)
            self.tokens = sum(batch.ids.numel() for batch in work.batches)
            refs = g.reference_logps(self.reference, work.batches, TEMPERATURE)
        with watch("update"):
            rewards = torch.tensor([r.reward for r in self.rollouts], dtype=torch.float64)
            g.rl_step(
                self.policy, self.optimizer, work, self.rollouts, g.group_advantages(rewards, n),
                refs, TEMPERATURE, g.GRPOConfig(),
            )  # fmt: skip
        return watch

    def close(self) -> None:
        self.group.__exit__(None, None, None)

    def gradients(self) -> dict[str, torch.Tensor]:
        """Of the first step, clipped as the optimiser gets them."""
        kept = {}

        def keep(*_):
            for name, p in self.policy.model.named_parameters():
                kept[name] = self.parallel.full_tensor(p.grad).float().clone()

        hook = self.optimizer.register_step_pre_hook(keep)
        self.step()
        hook.remove()
        return kept


class TRL:
    def __init__(self, model: str, rollouts: list, options: dict):
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer

        self.rows = options["trl_rows"] if len(rollouts) % options["trl_rows"] == 0 else 1
        arguments = GRPOConfig(
            output_dir=tempfile.mkdtemp(),
            use_cpu=not torch.cuda.is_available(),
            bf16=options["dtype"] != "float32",
            gradient_checkpointing=options["checkpointing"],
            beta=0.01,
            loss_type="grpo",
            use_bias_correction_kl=False,
            temperature=TEMPERATURE,
            epsilon=0.2,
            entropy_coef=0.001,
            num_generations=len(rollouts),
            per_device_train_batch_size=self.rows,
            gradient_accumulation_steps=len(rollouts) // self.rows,
            learning_rate=1e-6,
            weight_decay=0.01,
            max_grad_norm=1.0,
            model_init_kwargs={"dtype": "float32", "local_files_only": True},
            report_to=[],
            torch_compile=options["compiled"],
        )
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": ["x"] * len(rollouts)}),
            processing_class=AutoTokenizer.from_pretrained(model),
        )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = len(rollouts) // self.rows
        # As its training loop does: in bf16 under autocast, and compiled where asked for.
        self.trainer.model = self.trainer.accelerator.prepare_model(self.trainer.model).train()
        width = max(len(r.response_ids) for r in rollouts)
        ids = [[*r.response_ids, *[0] * (width - len(r.response_ids))] for r in rollouts]
        mask = [[1] * len(r.response_ids) + [0] * (width - len(r.response_ids)) for r in rollouts]
        rewards = torch.tensor([r.reward for r in rollouts])
        self.tokens = len(rollouts) * (len(rollouts[0].prompt_ids) + width)
        self.inputs = {
            "prompt_ids": torch.tensor([r.prompt_ids for r in rollouts]),
            "prompt_mask": torch.ones(len(rollouts), len(rollouts[0].prompt_ids), dtype=torch.long),
            "completion_ids": torch.tensor(ids),
            "completion_mask": torch.tensor(mask),
            "advantages": (rewards - rewards.mean()) / (rewards.std() + 1e-6),
        }
        self.inputs = {k: x.to(self.trainer.accelerator.device) for k, x in self.inputs.items()}

    def step(self, use=None) -> Stopwatch:
        watch, t, n = Stopwatch(), self.trainer, self.rows
        for start in range(0, len(self.inputs["advantages"]), n):
            x = {name: value[start : start + n] for name, value in self.inputs.items()}
            with watch("reference"), torch.no_grad():
                x["ref_per_token_logps"], _, _ = t._get_per_token_logps_and_entropies(
                    t.ref_model,
                    torch.cat([x["prompt_ids"], x["completion_ids"]], 1),
                    torch.cat([x["prompt_mask"], x["completion_mask"]], 1),
                    x["completion_ids"].shape[1],
                )
            with watch("update"):
                t.accelerator.backward(t._compute_loss(t.model, x))
        with watch("update"):
            torch.nn.utils.clip_grad_norm_(t.model.parameters(), t.args.max_grad_norm)
            if use:
                use()
            t.optimizer.step()
            t.optimizer.zero_grad()
        return watch

    def gradients(self) -> dict[str, torch.Tensor]:
        kept = {}
        self.step(lambda: kept.update(
            {n.removeprefix("_orig_mod."): p.grad.float().clone()
             for n, p in self.trainer.model.named_parameters()}
        ))  # fmt: skip
        return kept


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompt_tokens", type=int, nargs="+", default=[250, 1000, 2000])
    parser.add_argument("--responses", type=int, default=8, help="to the one prompt")
    parser.add_argument("--response_tokens", type=int, default=150)
    parser.add_argument("--rollouts", help="a run's rollouts; their first group, instead")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each side")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--trl_rows", type=int, default=4,
                        help="responses in a micro-batch of TRL's")  # fmt: skip
    parser.add_argument("--no_checkpointing", dest="checkpointing", action="store_false",
                        help="keep activations, on both sides")  # fmt: skip
    parser.add_argument("--plain", action="store_true",
                        help="our side without the shared prefix")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="our side's layers compiled")
    parser.add_argument("--no_trl_compiled", action="store_true", help="TRL as it is, only")
    args = parser.parse_args()
    if args.rollouts:
        works = {args.rollouts: from_file(args.rollouts)}
    else:
        works = {
            f"{n:,} prompt tokens": drawn(n, args.responses, args.response_tokens)
            for n in args.prompt_tokens
        }
    options = {k: getattr(args, k) for k in
               ("dtype", "checkpointing", "plain", "trl_rows", "compile")}  # fmt: skip
    theirs = {"TRL": {"compiled": False}, "TRL compiled": {"compiled": True}}
    if args.no_trl_compiled or not can_compile():
        del theirs["TRL compiled"]
    for work, rollouts in works.items():
        compare_sides(work, rollouts, args, options, theirs)


def compare_sides(
    work: str, rollouts: list, args: argparse.Namespace, options: dict, theirs: dict[str, dict]
) -> None:
    """Ours against each of `theirs`, in turn; more than two processes would not fit in memory."""

    def side(name: str, make, **changes) -> Side:
        return Side(name, make, args.threads, args.model, rollouts, options | changes)

    lengths = [len(r.response_ids) for r in rollouts]
    prompt, own = len(rollouts[0].prompt_ids), sum(lengths)
    print(f"\n{work}: {prompt:,} + {len(rollouts)} x {min(lengths)}-{max(lengths)} tokens, "
          f"{args.threads} threads, {args.dtype}; seconds")  # fmt: skip
    rate = matrix_rate(args.model, prompt + own, args.dtype, args.threads)
    plain = {"dtype": "float32", "compile": False, "compiled": False}
    exact = [alone(side(make.__name__, make, **plain)) for make in (See, TRL)]
    for name, changes in theirs.items():
        pair = [side("SEE", See), side(name, TRL, **changes)]
        compare_and_print(pair, exact, args.repeats, rate, args.dtype)


def can_compile() -> bool:
    try:
        check_compiler(PolicyConfig(compile=True))
    except ValueError as error:
        print(f"TRL compiled: not run ({error})")
        return False
    return True


if __name__ == "__main__":
    main()
