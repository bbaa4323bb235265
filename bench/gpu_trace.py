"""One rank of the paper's run on a GPU that is not there (fake_gpu.py) or on this machine's
(real_gpu.py), stage by stage.

Every stage calls what cycle.py and evaluate.py call. Replaced is what reads or writes weights,
which fake tensors do not have: files of weights, of state and of exports are not touched, but what
they would hold is compared with what is asked for. On a real GPU weights are drawn at random; there
are the stages up to "hand-over".
"""

import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import real_gpu  # noqa: E402
import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import sft_masked  # noqa: E402
from backend import parallel, policy, sampler  # noqa: E402
from backend.packing import Row, share_out  # noqa: E402
from backend.policy import PolicyConfig  # noqa: E402
from evaluation import digits  # noqa: E402
from grpo import GRPOConfig, make_optimizer, reference_logps, response_row, rl_step  # noqa: E402

TEMPERATURE = 0.8


class Stage(NamedTuple):
    """What a stage took of one rank's GPU."""

    peak: int  # bytes, with all that was there before
    after: int  # bytes
    flops: int
    moved: int  # bytes that kernels read and write
    kernels: int
    waits: dict[str, int]  # {"file.py function": how often the host waited}
    seconds: float | None  # on a real GPU


class Rank:
    """Rank `rank` of `ranks` with policy, reference and optimiser; `stages` are kept by name."""

    def __init__(self, gpu, folder: Path, config: PolicyConfig):
        self.gpu, self.folder, self.config = gpu, folder, config
        self.stages: dict[str, Stage] = {}
        with self.stage("load"):
            self.policy = policy.load_policy(folder, config)
            self.reference = policy.load_policy(folder, config, trainable=False)
        self.names = {p: name for name, p in self.policy.named_parameters()}
        parallel.copy_shards(self.policy, self.reference)

    @contextmanager
    def stage(self, name: str):
        self.gpu.reset()
        yield
        g = self.gpu
        g.stop()
        counts = g.peak, g.now, g.flops, g.moved, g.kernels, dict(g.waits)
        self.stages[name] = Stage(*counts, g.seconds)

    def rl_steps(self, prompt: int, responses: list[int], prompts: int, steps: int = 2) -> None:
        """`prompts` prompts over all ranks, each with responses of these lengths. The second step
        has AdamW's state. Stages "share", "reference" and "RL step"."""
        self.optimizer = make_optimizer(self.policy, GRPOConfig())
        rollouts = [
            SimpleNamespace(
                prompt_id=k, sample=i, prompt_ids=tuple(range(k, k + prompt)), response_ids=[7] * n,
                reward=float(i), sampled_logp=[-1.0] * n, score_positions=[n - 5, n - 4, n - 3],
            )
            for k in range(prompts)
            for i, n in enumerate(responses)
        ]  # fmt: skip
        rows = [response_row(r.prompt_ids, r.response_ids) for r in rollouts]
        groups = [r.prompt_id for r in rollouts]
        advantages = torch.tensor([r.reward for r in rollouts], dtype=torch.float64)
        config, grpo = self.config, GRPOConfig()
        for _ in range(steps):
            with self.stage("share"):
                work = share_out(rows, groups, config.micro_batch_tokens, config.shared_prefix)
            with self.stage("reference"):
                refs = reference_logps(self.reference, work.batches, TEMPERATURE)
            with self.stage("RL step"):
                rl_step(
                    self.policy, self.optimizer, work, rollouts, advantages, refs, TEMPERATURE, grpo
                )
            self.packs = len(work.batches)
            self.tokens = sum(batch.ids.numel() for batch in work.batches)

    def sft_steps(self, prefix: int, lengths: list[int]) -> None:
        """Two updates on rows of these lengths after a template. Stage "distillation"."""
        self.optimizer = None
        config = sft_masked.SFTConfig()
        optimizer = sft_masked.make_optimizer(self.policy, config)
        rows = [
            Row((*range(prefix), *[k] * n), [False] * (prefix + n - 5) + [True] * 5, f"row {k}")
            for k, n in enumerate(lengths)
        ]
        for _ in range(2):
            with self.stage("distillation"):
                update = sft_masked.Update(rows, 1e-6)
                sft_masked.sft_step(self.policy, optimizer, update, config, self.config)

    def hand_over(self) -> None:
        """Each gathered weight, one after the other."""
        with self.stage("hand-over"):
            for name, whole in self.policy.full_weights():
                assert whole.device == self.gpu.device and whole.dtype == torch.bfloat16, name

    def save_and_restore(self, folder: Path, with_optimizer: bool) -> None:
        """State as in cycle.Run: all of it lies on the device, and all that was saved comes
        back."""
        saved: dict[str, tuple] = {}

        def tensors(optimizer) -> dict[str, torch.Tensor]:
            found = {name: p.detach() for p, name in self.names.items()}
            if optimizer is not None:
                found |= parallel.optimizer_tensors(optimizer, self.names)
            for name, t in found.items():  # a CPU tensor without dimensions would pass elsewhere
                assert t.device == self.gpu.device, f"{name} is on {t.device}"
            return found

        def local(t):
            return t.to_local() if isinstance(t, torch.distributed.tensor.DTensor) else t

        def save(tensors, checkpoint_id, process_group):
            saved.update({name: (t.shape, t.dtype, local(t).cpu().shape)
                          for name, t in tensors.items()})  # fmt: skip

        def load(tensors, checkpoint_id):
            assert saved.keys() == tensors.keys()
            for name, t in tensors.items():
                assert saved[name] == (t.shape, t.dtype, local(t).shape), name
                local(t).copy_(torch.empty_like(local(t), device="cpu"))

        fake = mock.patch.multiple(parallel.dcp, save=save, load=load)
        with fake, self.stage("state with optimiser" if with_optimizer else "state"):
            optimizer = self.optimizer if with_optimizer else None
            parallel.save_state(folder / "cycle_001", tensors(optimizer), {})
            fresh = make_optimizer(self.policy, GRPOConfig()) if with_optimizer else None
            parallel.load_state(folder / "cycle_001", tensors(fresh))

    def sample(self, tokenizer, params: sampler.SamplingParams, prompts: list[list[int]]) -> list:
        """Two rollouts of each prompt by the transformers sampler, after a hand-over."""
        with self.stage("transformers sampler"):
            engine = sampler.TransformersSampler(
                sampler.load_model(self.folder, torch.bfloat16), tokenizer, 64
            )
            engine.load_weights(self.policy, "c1s0")
            requests = [sampler.Request(f"{ids}", k, ids, 0) for ids in prompts for k in (0, 1)]
            return list(engine.sample(requests, params))

    def read_digits(self, questions: list, rollouts: list = ()) -> list:
        """By evaluate.py's reader, which has a whole model of its own."""
        with self.stage("digits"):
            reader = digits.Reader(self.folder, "bfloat16")
            if rollouts:
                reader.own(rollouts)
            return reader.read(questions)

    def export(self, folder: Path) -> None:
        def save_file(weights, path, metadata):
            assert all(w.device.type == "cpu" and w.dtype == torch.bfloat16
                       for w in weights.values())  # fmt: skip
            path.write_text(" ".join(weights))

        with mock.patch.object(policy, "save_file", save_file), self.stage("export"):
            policy.export(self.policy, self.folder, folder)


@contextmanager
def rank(folder: Path, config: PolicyConfig, ranks: int = 4, number: int = 0, real: bool = False):
    """A Rank for a `with` block: number `number` of `ranks`. `real`: the only one, on this
    machine's GPU."""

    def whole_model(folder, dtype, attn_implementation="sdpa"):
        config = policy._without_dropout(folder)
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=attn_implementation
        )

    @torch.no_grad()
    def fill_shards(model, _) -> None:
        for name, p in model.named_parameters():
            rows, start = parallel.own_rows(p)
            assert rows.device == gpu.device and start + len(rows) <= p.shape[0], name
            gpu.fill(name, rows)
        for name, buffer in model.named_buffers():
            assert buffer.device == gpu.device, name

    with ExitStack() as stack:
        for owner, name, value in (
            (policy, "_read_weights", fill_shards),
            (sampler, "load_model", whole_model),
            (digits, "load_model", whole_model),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        if real:  # first, because it sets up CUDA's allocator
            stack.enter_context(parallel.process_group())
        gpu = stack.enter_context(real_gpu.on() if real else _fake(ranks, number))
        stack.enter_context(parallel.process_group())
        yield Rank(gpu, folder, config)


def _fake(ranks: int, number: int):
    import fake_gpu  # registers its device for good

    return fake_gpu.on(ranks, number)


# Qwen/Qwen3-4B-Base, the paper's model.
QWEN3_4B = dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], hidden_size=2560,
    intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=151936, max_position_embeddings=32768, rms_norm_eps=1e-6,
    rope_theta=1e6, tie_word_embeddings=True, attention_bias=False, torch_dtype="bfloat16",
)  # fmt: skip
