"""The language model: load, forward, micro-batches, export.

`Policy` is the FSDP root. Its forward does backbone, head and log-probabilities in one call,
because a sharded weight must not be touched outside the root's forward. The head runs on the scored
positions only, in chunks that are recomputed in backward, so that logits of (tokens x vocabulary)
never exist whole (App. A: responses of up to 8,192 tokens, a vocabulary of 151k).

Parameters and AdamW are fp32, compute is bf16. This departs from the authors' scripts, whose
parameters are bf16 (`--policy.parameters bfloat16`, preset official): at a learning rate of 1e-6
most updates of a bf16 weight round to nothing.

Shapes: B rows, T tokens of the longest row, N scored tokens, D hidden size, V vocabulary.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from backend import packing, parallel
from backend.packing import Batch, attention_calls
from storage.files import fresh_folder

# Dense, logits = head(norm(hidden)) without scaling: what we tested.
MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class PolicyConfig:
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type (App. E: bf16)."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained parameters and of AdamW's state. bfloat16 as in the authors' scripts:
    most updates at the paper's learning rates round to nothing."""
    shared_prefix: Annotated[bool, tyro.conf.arg(aliases=("--shared-prefix",))] = True
    """Read a prompt that rows share once (packing.py). Without it rows are padded to a rectangle.
    Does not change the gradient, only memory and time."""
    attn: Annotated[Literal["auto", "flash", "sdpa"], tyro.conf.arg(aliases=("--attn",))] = "auto"
    """Attention where no prefix is shared: flash-attn's kernels (auto: where CUDA and the package
    are there; not run), or PyTorch's scaled_dot_product_attention."""
    micro_batch_tokens: int = 16384
    """Tokens of a micro-batch, padding included. Does not change the gradient, only memory and
    time."""
    head_tokens: int = 2048
    """Scored tokens whose logits exist at once: 2,048 x 151k vocabulary is 0.6 GB in bf16."""
    gradient_checkpointing: bool = True
    """Recompute each layer in backward instead of keeping its activations."""


class Scored(NamedTuple):
    """Per token of a micro-batch's grid (see packing.Batch), 0 where not scored."""

    logp: torch.Tensor  # (B, T) log-probability of the token at the given temperature
    entropy: torch.Tensor  # (B, T) in nats, of the distribution it was drawn from, same temperature
    logp_t1: torch.Tensor  # (B, T) log-probability at temperature 1, without gradient


class HeadLogProbs(torch.autograd.Function):
    """hidden (N, D), weight (V, D), targets (N,) -> logp, entropy, logp_t1, each (N,) fp32.

    Logits exist for `chunk` tokens at a time, in the compute type, in forward and again in
    backward. What is computed from them is fp32, for BLOCK tokens at a time, which stay in a CPU's
    cache. With logits z, p = softmax(z / temperature) and target y:

        logp    = log p_y                  d logp / d z    = (onehot_y - p) / temperature
        entropy = -sum_v p_v log p_v       d entropy / d z = -p (log p + entropy) / temperature
    """

    BLOCK = 32

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        values = torch.empty(4, len(targets), device=hidden.device)  # the three and log_sum, (N,)
        for at in range(0, len(targets), chunk):
            logits = F.linear(hidden[at : at + chunk], weight)  # (n, V)
            parts = values[:, at : at + chunk].split(HeadLogProbs.BLOCK, 1)
            y = targets[at : at + chunk].split(HeadLogProbs.BLOCK)
            for block, t, out in zip(logits.split(HeadLogProbs.BLOCK), y, parts, strict=True):
                z = block.float()  # (b, V)
                chosen = z.gather(1, t[:, None])[:, 0]  # (b,)
                largest = z.amax(1, keepdim=True)  # (b, 1)
                p = z.sub_(largest).exp()  # (b, V), not yet divided by its sum
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
        d_weight = None  # (V, D)
        for at in range(0, len(targets), ctx.chunk):
            here = hidden[at : at + ctx.chunk]  # (n, D)
            logits = F.linear(here, weight)  # (n, V); each block becomes its own gradient
            parts = per_token[:, at : at + ctx.chunk].split(HeadLogProbs.BLOCK, 1)
            y = targets[at : at + ctx.chunk].split(HeadLogProbs.BLOCK)
            for block, t, part in zip(logits.split(HeadLogProbs.BLOCK), y, parts, strict=True):
                s, h, d_l, d_h = part  # (b, 1) each
                log_p = block.float().div_(ctx.temperature).sub_(s)  # (b, V)
                p = log_p.exp()  # (b, V)
                d = log_p.add_(h).mul_(d_h).add_(d_l).mul_(p).neg_()  # (b, V)
                d.scatter_add_(1, t[:, None], d_l)
                block.copy_(d.div_(ctx.temperature))
            d_hidden[at : at + ctx.chunk] = logits @ weight
            product = logits.T @ here
            d_weight = product if d_weight is None else d_weight.float().add_(product)
        return d_hidden, d_weight.to(weight.dtype), None, None, None


class Policy(torch.nn.Module):
    """A causal language model that returns log-probabilities of chosen tokens."""

    def __init__(self, model: PreTrainedModel, head_tokens: int):
        super().__init__()
        self.model = model
        self.head_tokens = head_tokens

    def forward(self, batch: Batch, temperature: float = 1.0) -> Scored:
        """Forward of a micro-batch; with gradient except for logp_t1."""
        shared = {}
        if batch.lengths is not None:
            c = self.model.config
            dtype = self.model.lm_head.weight.dtype  # gathered, in the compute type
            calls = attention_calls(batch, c.num_attention_heads // c.num_key_value_heads, dtype)
            shared = {"prefix": batch.prefix, "calls": calls}
        # Causal attention over right-padded rows needs no mask: no real token sees a padded one.
        hidden = self.model.model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, **shared
        ).last_hidden_state  # (1, L, D) or (B, T, D)
        before = hidden.flatten(0, 1)[batch.before]  # (N, D)
        weight = self.model.lm_head.weight  # (V, D)
        values = HeadLogProbs.apply(before, weight, batch.targets, temperature, self.head_tokens)
        empty = torch.zeros(batch.scored.shape, device=hidden.device)  # (B, T)
        return Scored(*(empty.masked_scatter(batch.scored, value) for value in values))

    def full_weights(
        self, dtype: torch.dtype = torch.bfloat16
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, whole tensor) of each parameter; a tied head has no name of its own.
        Collective: every rank must run the whole iterator, whatever it does with the tensors."""
        for name, parameter in self.model.named_parameters():
            yield name, parallel.full_tensor(parameter.detach().to(dtype))


# --------------------------------------------------------------------------------------------------
# Load and export


def check_model_folder(folder: str | Path, longest: int) -> None:
    """Raise ValueError if the model cannot be used for rows of `longest` tokens. Loads no
    weights."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model {folder}: no config.json; --model must be a Hugging Face model folder"
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"model {folder}: type {config.get('model_type')!r} is not supported; its head may "
            "scale or cap logits in ways policy.py does not know. Supported: "
            f"{', '.join(MODEL_TYPES)}"
        )
    if config.get("use_sliding_window"):
        raise ValueError(
            f"model {folder} attends in a sliding window, which packing.py does not know"
        )
    if longest > config["max_position_embeddings"]:
        raise ValueError(
            f"model {folder} reads {config['max_position_embeddings']} tokens, fewer than "
            f"prompt_tokens + sampling.max_tokens = {longest}; lower one of them"
        )


def weight_names(folder: str | Path) -> set[str]:
    """Names in the folder's safetensors files; old files also hold rotary tables, which are no
    weights."""
    names: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            names |= set(f.keys())
    return {name for name in names if not name.endswith("rotary_emb.inv_freq")}


class Size(NamedTuple):
    """What memory depends on, in numbers (not bytes)."""

    kind: str
    parameters: int  # a tied head counted once
    layers: int
    per_layer: int  # parameters of one decoder layer
    hidden: int
    vocabulary: int
    activations: int  # kept for backward by one layer, numbers per token
    kv_per_token: int  # keys and values of one token, all layers
    heads_per_key: int
    tied: bool


def model_size(folder: str | Path) -> Size:
    """From the folder's config.json alone; the weights need not be there."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    # Inputs and outputs of every linear layer; the norms' inputs and fp32 copies; rotated heads.
    linear = sum(
        m.in_features + m.out_features for m in layer.modules() if isinstance(m, torch.nn.Linear)
    )
    return Size(
        kind=config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        per_layer=sum(p.numel() for p in layer.parameters()),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        activations=linear + 6 * config.hidden_size,
        kv_per_token=config.num_hidden_layers
        * (layer.self_attn.k_proj.out_features + layer.self_attn.v_proj.out_features),
        heads_per_key=config.num_attention_heads // config.num_key_value_heads,
        tied=config.tie_word_embeddings,
    )


def generation_config(folder: str | Path) -> GenerationConfig:
    if (Path(folder) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )


def load_tokenizer(folder: str | Path):
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def attention(config: PolicyConfig) -> str:
    """transformers' name of the attention to train with. ValueError if flash is asked for and
    cannot be had."""
    if config.shared_prefix and config.attn != "auto":
        raise ValueError(f"--attn {config.attn} goes with --no-shared-prefix")
    if config.shared_prefix:
        return packing.NAME
    missing = [
        what
        for what, there in (
            ("a CUDA GPU", torch.cuda.is_available()),
            ("the package flash-attn", is_flash_attn_2_available()),
            ("--policy.dtype bfloat16", config.dtype == "bfloat16"),
        )
        if not there
    ]
    if config.attn == "flash" and missing:
        raise ValueError(f"--attn flash needs {' and '.join(missing)}; or leave it at auto")
    return "sdpa" if missing or config.attn == "sdpa" else "flash_attention_2"


def load_model(
    folder: str | Path, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The whole model on this process's CPU."""
    disable_progress_bar()  # one bar per rank and per load says nothing
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )


def load_policy(folder: str | Path, config: PolicyConfig, trainable: bool = True) -> Policy:
    """A sharded policy, or a sharded KL reference (`trainable=False`: kept in the compute type, no
    gradients)."""
    compute = getattr(torch, config.dtype)
    kept = getattr(torch, config.parameters) if trainable else compute
    policy = Policy(load_model(folder, kept, attention(config)), config.head_tokens)
    policy.requires_grad_(trainable).train(trainable)
    if trainable and config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    parallel.shard(policy, policy.model.model.layers, compute, trainable)
    return policy


def export(policy: Policy, tokenizer, folder: Path) -> None:
    """Write a plain Hugging Face folder in bf16, which from_pretrained and vLLM load as it is.
    Collective."""
    weights = {}
    for name, tensor in policy.full_weights(torch.bfloat16):
        if parallel.rank() == 0:
            weights[name] = tensor.cpu().contiguous()
    if parallel.rank() == 0:
        config = json.loads(policy.model.config.to_json_string(use_diff=True))
        config |= {"architectures": [type(policy.model).__name__], "dtype": "bfloat16"}
        with fresh_folder(folder) as aside:
            save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
            (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
            policy.model.generation_config.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
    parallel.barrier()
