"""The language model: load, forward, export.

`Policy` is the FSDP root. Its forward computes backbone, head and log-probabilities in one call,
because a sharded weight must not be used outside the root's forward. The head runs on the scored
positions only, in chunks that are recomputed in backward, so that the full logits (tokens x
vocabulary) are never in memory (App. A: responses of up to 8,192 tokens, a vocabulary of 151k).

Parameters and AdamW state are fp32, compute is bf16. This departs from the authors' scripts, whose
parameters are bf16 (`--policy.parameters bfloat16`, preset official): at a learning rate of 1e-6
most updates of a bf16 weight round to zero.

A policy is made without memory, sharded, and then filled: each rank reads its own slices of the
files, so that no rank ever holds the whole model.

Shapes: B rows, T tokens of the longest row, N scored tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import create_selective_checkpoint_contexts
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from backend import packing, parallel
from backend.model_folder import weight_files, write_settings
from backend.packing import Batch, attention_arguments
from storage.files import fresh_folder
from storage.options import Count, Options


@dataclass(frozen=True)
class PolicyConfig(Options):
    prefix: ClassVar[str] = "policy."

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type (App. E: bf16)."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained parameters and of AdamW's state. bfloat16 as in the authors' scripts:
    most updates at the paper's learning rates round to zero."""
    shared_prefix: Annotated[bool, tyro.conf.arg(aliases=("--shared-prefix",))] = True
    """Compute a prompt that several rows share once (packing.py). Without it rows are padded to a
    rectangle. Does not change the gradient, only memory and time."""
    attn: Annotated[Literal["auto", "flash", "sdpa"], tyro.conf.arg(aliases=("--attn",))] = "auto"
    """Attention with --no-shared-prefix: flash-attn's kernels (auto: if CUDA and the package are
    available; not run), or PyTorch's scaled_dot_product_attention."""
    micro_batch_tokens: Count = 16384
    """Tokens of a micro-batch, padding included. Does not change the gradient, only memory and
    time."""
    head_tokens: Count = 2048
    """Scored tokens whose logits are in memory at once: 2,048 x 151k vocabulary is 0.6 GB in
    bf16."""
    gradient_checkpointing: bool = True
    """Recompute each layer in backward, all but its attention, instead of keeping its
    activations."""
    compile: bool = False
    """Compile each layer but its attention (torch.compile; a C++ compiler, on a GPU Triton too).
    Changes the rounding of norms and activations, memory and time."""


class Scored(NamedTuple):
    """Values per token of a micro-batch, laid out as Batch.scored; 0 where not scored."""

    logp: torch.Tensor  # (B, T) log-probability of the token at the given temperature
    entropy: torch.Tensor  # (B, T) entropy of the token's distribution at that temperature, in nats
    logp_t1: torch.Tensor  # (B, T) log-probability at temperature 1, without gradient


class HeadLogProbs(torch.autograd.Function):
    """hidden (N, D), weight (V, D), targets (N,) -> logp, entropy, logp_t1, each (N,) fp32.

    Logits are computed for `chunk` tokens at a time, in the compute type, in forward and again in
    backward. Everything derived from them is fp32, for `block` tokens at a time. With logits z,
    p = softmax(z / temperature) and target y:

        logp    = log p_y                  d logp / d z    = (onehot_y - p) / temperature
        entropy = -sum_v p_v log p_v       d entropy / d z = -p (log p + entropy) / temperature
    """

    @staticmethod
    def block(device_type: str) -> int:
        """Tokens that fit in a CPU's cache; on a GPU more, because each block starts some twenty
        kernels."""
        return 32 if device_type == "cpu" else 512

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        size = HeadLogProbs.block(hidden.device.type)
        # Rows: logp, entropy, logp_t1, log_sum (log-sum-exp of the logits / temperature).
        values = torch.empty(4, len(targets), device=hidden.device)
        for start in range(0, len(targets), chunk):
            logits = F.linear(hidden[start : start + chunk], weight)  # (n, V)
            parts = values[:, start : start + chunk].split(size, 1)
            y = targets[start : start + chunk].split(size)
            for block, t, out in zip(logits.split(size), y, parts, strict=True):
                z = block.float()  # (b, V)
                chosen = z.gather(1, t[:, None])[:, 0]  # (b,)
                largest = z.amax(1, keepdim=True)  # (b, 1)
                p = z.sub_(largest).exp()  # (b, V), not normalised
                out[2] = chosen - largest[:, 0] - p.sum(1).log()
                torch.exp(z.div_(temperature), out=p)
                total = p.sum(1)  # (b,)
                out[3] = largest[:, 0] / temperature + total.log()
                out[0] = chosen / temperature - out[3]
                out[1] = total.log() - torch.linalg.vecdot(p, z) / total
        logp, entropy, logp_t1, log_sum = values
        ctx.save_for_backward(hidden, weight, targets, log_sum, entropy)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(logp_t1)
        return logp, entropy, logp_t1

    @staticmethod
    def backward(ctx, d_logp, d_entropy, _):
        hidden, weight, targets, log_sum, entropy = ctx.saved_tensors
        per_token = torch.stack([log_sum, entropy, d_logp, d_entropy])[..., None]  # (4, N, 1)
        d_hidden = torch.empty_like(hidden)  # (N, D)
        d_weight = None  # (V, D), a sum of several chunks in fp32
        size = HeadLogProbs.block(hidden.device.type)
        for start in range(0, len(targets), ctx.chunk):
            hidden_chunk = hidden[start : start + ctx.chunk]  # (n, D)
            logits = F.linear(hidden_chunk, weight)  # (n, V); overwritten by their gradient below
            parts = per_token[:, start : start + ctx.chunk].split(size, 1)
            y = targets[start : start + ctx.chunk].split(size)
            for block, t, part in zip(logits.split(size), y, parts, strict=True):
                s, h, d_l, d_h = part  # (b, 1) each
                log_p = block.float().div_(ctx.temperature).sub_(s)  # (b, V)
                p = log_p.exp()  # (b, V)
                d = log_p.add_(h).mul_(d_h).add_(d_l).mul_(p).neg_()  # (b, V)
                d.scatter_add_(1, t[:, None], d_l)
                block.copy_(d.div_(ctx.temperature))
            d_hidden[start : start + ctx.chunk] = logits @ weight
            product = logits.T @ hidden_chunk
            if len(targets) > ctx.chunk:
                product = product.float() if d_weight is None else d_weight.add_(product)
            d_weight = product
        return d_hidden, d_weight.to(weight.dtype), None, None, None


class Policy(torch.nn.Module):
    """A causal language model that returns log-probabilities of the scored tokens."""

    def __init__(self, model: PreTrainedModel, head_tokens: int):
        super().__init__()
        self.model = model
        self.head_tokens = head_tokens

    def forward(self, batch: Batch, temperature: float = 1.0) -> Scored:
        """Forward of a micro-batch; logp_t1 carries no gradient."""
        pack_arguments = {}  # for packing.attend
        if batch.lengths is not None:
            c = self.model.config
            dtype = self.model.lm_head.weight.dtype  # the compute type: the weight is gathered here
            heads_per_key = c.num_attention_heads // c.num_key_value_heads
            pack_arguments = attention_arguments(batch, heads_per_key, dtype)
        # Causal attention over right-padded rows needs no mask: no real token attends to padding.
        output = self.model.model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **pack_arguments
        )
        hidden = output.last_hidden_state  # (1, L, D) or (B, T, D)
        predicting = hidden.flatten(0, 1)[batch.hidden_index]  # (N, D)
        weight = self.model.lm_head.weight  # (V, D)
        values = HeadLogProbs.apply(
            predicting, weight, batch.targets, temperature, self.head_tokens
        )
        # By an index: masked_scatter makes the host wait for the GPU in backward.
        zeros = torch.zeros(batch.scored.shape, device=hidden.device)  # (B, T)
        return Scored(*(zeros.put(batch.scored_index, value) for value in values))

    def full_weights(
        self, dtype: torch.dtype = torch.bfloat16
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, gathered tensor) of each parameter; a tied head is not listed
        separately. Collective: every rank must exhaust the iterator, even if it needs no tensor."""
        for name, parameter in self.model.named_parameters():
            yield name, parallel.full_tensor(parameter.detach().to(dtype))


# --------------------------------------------------------------------------------------------------
# Load and export


def attention(config: PolicyConfig) -> str:
    """transformers' name of the attention to train with. ValueError for --attn flash if it is not
    available."""
    if config.shared_prefix and config.attn != "auto":
        raise ValueError(f"--attn {config.attn} goes with --no-shared-prefix")
    if config.shared_prefix:
        return packing.ATTENTION_NAME
    requirements = {
        "a CUDA GPU": torch.cuda.is_available(),
        "the package flash-attn": is_flash_attn_2_available(),
        "--policy.dtype bfloat16": config.dtype == "bfloat16",
    }
    missing = [name for name, met in requirements.items() if not met]
    if config.attn == "flash" and missing:
        raise ValueError(f"--attn flash needs {' and '.join(missing)}; or leave it at auto")
    return "sdpa" if missing or config.attn == "sdpa" else "flash_attention_2"


def check_compiler(config: PolicyConfig) -> None:
    """Raises ValueError for --policy.compile where nothing can be compiled."""
    if not config.compile:
        return
    try:
        torch.compile(lambda x: x.exp() + 1)(torch.ones(8, device=parallel.device()))
    except Exception as error:  # of many kinds, with pages of text
        cause = next(line for line in str(error).splitlines() if line.strip())
        raise ValueError(
            f"--policy.compile: nothing can be compiled here ({cause[:200]}); install a C++ "
            "compiler and Python's headers, on a GPU Triton too, or leave the option out"
        ) from None


def load_model(
    folder: str | Path, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The full model, on CPU, without dropout."""
    disable_progress_bar()  # it would show one bar per rank and load
    return AutoModelForCausalLM.from_pretrained(
        folder,
        config=_without_dropout(folder),
        dtype=dtype,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )


def _without_dropout(folder: str | Path) -> PretrainedConfig:
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    for name in config.to_dict():
        if "dropout" in name or name.endswith("_pdrop"):
            setattr(config, name, 0.0)
    return config


def load_policy(folder: str | Path, config: PolicyConfig, trainable: bool = True) -> Policy:
    """A sharded policy, or with `trainable=False` a sharded KL reference: parameters in the compute
    type, no gradients. Each rank reads its own slices of the folder's files."""
    compute = getattr(torch, config.dtype)
    stored = getattr(torch, config.parameters) if trainable else compute
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            _without_dropout(folder),
            dtype=stored,
            attn_implementation=attention(config),
            trust_remote_code=False,
        )
    policy = Policy(model, config.head_tokens)
    policy.requires_grad_(trainable).train(trainable)
    if trainable and config.gradient_checkpointing:
        keep = partial(create_selective_checkpoint_contexts, packing.ATTENTION_KERNELS)
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": keep})
    if config.compile:
        for layer in model.model.layers:  # inside of recomputation and of FSDP's hooks
            layer.forward = torch.compile(layer.forward, dynamic=True)
    parallel.shard(policy, model.model.layers, compute, trainable)
    policy.to_empty(device=parallel.device())
    rotary = model.model.rotary_emb  # its tables are computed, not read
    model.model.rotary_emb = type(rotary)(config=model.config).to(parallel.device())
    _read_weights(model, Path(folder))
    return policy


@torch.no_grad()
def _read_weights(model: PreTrainedModel, folder: Path) -> None:
    """Fill this rank's shards. check_weights has compared names and shapes."""
    shards = {name: parallel.own_rows(p) for name, p in model.named_parameters()}
    for path in weight_files(folder):
        with safe_open(path, "pt") as f:
            for name in shards.keys() & f.keys():
                rows, start = shards.pop(name)
                rows.copy_(f.get_slice(name)[start : start + len(rows)])
    if shards:
        raise ValueError(f"model {folder}: its files lack {', '.join(sorted(shards))}")


def export(
    policy: Policy,
    source: Path,
    folder: Path,
    texts: Mapping[str, str] | None = None,
    saver: parallel.Saver | None = None,
) -> None:
    """Write a standard Hugging Face folder in bf16, which from_pretrained and vLLM can load;
    `source` is the folder that the model came from, `texts` are further files by name. Collective.
    Raises WriteError. With a saver the weights are gathered here and written by its thread."""
    weights = {}
    for name, tensor in policy.full_weights(torch.bfloat16):
        if parallel.rank() == 0:
            weights[name] = tensor.to("cpu", copy=saver is not None).contiguous()

    def write() -> None:
        with fresh_folder(folder) as temporary:
            try:
                save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
            except SafetensorError as error:
                raise OSError(str(error)) from None
            write_settings(source, temporary, type(policy.model).__name__)
            for name, text in (texts or {}).items():
                (temporary / name).write_text(text, encoding="utf-8")

    if saver is None:
        parallel.write_on_rank_0(folder, write)
    else:
        saver.start(partial(parallel.write_on_rank_0, folder, write))
