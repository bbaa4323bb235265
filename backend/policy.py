"""The language model: load, forward, micro-batches, export.

`Policy` is the FSDP root. Its forward computes backbone, head and log-probabilities in one call,
because a sharded weight must not be used outside the root's forward. The head runs on the scored
positions only, in chunks that are recomputed in backward, so that the full logits (tokens x
vocabulary) are never in memory (App. A: responses of up to 8,192 tokens, a vocabulary of 151k).

Parameters and AdamW state are fp32, compute is bf16. This departs from the authors' scripts, whose
parameters are bf16 (`--policy.parameters bfloat16`, preset official): at a learning rate of 1e-6
most updates of a bf16 weight round to zero.

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

# The tested architectures: dense, with logits = head(norm(hidden)) without scaling.
MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class PolicyConfig:
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
    micro_batch_tokens: int = 16384
    """Tokens of a micro-batch, padding included. Does not change the gradient, only memory and
    time."""
    head_tokens: int = 2048
    """Scored tokens whose logits are in memory at once: 2,048 x 151k vocabulary is 0.6 GB in
    bf16."""
    gradient_checkpointing: bool = True
    """Recompute each layer in backward instead of keeping its activations."""


class Scored(NamedTuple):
    """Values per token of a micro-batch, laid out as Batch.scored; 0 where not scored."""

    logp: torch.Tensor  # (B, T) log-probability of the token at the given temperature
    entropy: torch.Tensor  # (B, T) entropy of the token's distribution at that temperature, in nats
    logp_t1: torch.Tensor  # (B, T) log-probability at temperature 1, without gradient


class HeadLogProbs(torch.autograd.Function):
    """hidden (N, D), weight (V, D), targets (N,) -> logp, entropy, logp_t1, each (N,) fp32.

    Logits are computed for `chunk` tokens at a time, in the compute type, in forward and again in
    backward. Everything derived from them is fp32, for BLOCK tokens at a time, which fit in a CPU's
    cache. With logits z, p = softmax(z / temperature) and target y:

        logp    = log p_y                  d logp / d z    = (onehot_y - p) / temperature
        entropy = -sum_v p_v log p_v       d entropy / d z = -p (log p + entropy) / temperature
    """

    BLOCK = 32

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk):
        # Rows: logp, entropy, logp_t1, log_sum (log-sum-exp of the logits / temperature).
        values = torch.empty(4, len(targets), device=hidden.device)
        for start in range(0, len(targets), chunk):
            logits = F.linear(hidden[start : start + chunk], weight)  # (n, V)
            parts = values[:, start : start + chunk].split(HeadLogProbs.BLOCK, 1)
            y = targets[start : start + chunk].split(HeadLogProbs.BLOCK)
            for block, t, out in zip(logits.split(HeadLogProbs.BLOCK), y, parts, strict=True):
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
        d_weight = None  # (V, D)
        for start in range(0, len(targets), ctx.chunk):
            hidden_chunk = hidden[start : start + ctx.chunk]  # (n, D)
            logits = F.linear(hidden_chunk, weight)  # (n, V); overwritten by their gradient below
            parts = per_token[:, start : start + ctx.chunk].split(HeadLogProbs.BLOCK, 1)
            y = targets[start : start + ctx.chunk].split(HeadLogProbs.BLOCK)
            for block, t, part in zip(logits.split(HeadLogProbs.BLOCK), y, parts, strict=True):
                s, h, d_l, d_h = part  # (b, 1) each
                log_p = block.float().div_(ctx.temperature).sub_(s)  # (b, V)
                p = log_p.exp()  # (b, V)
                d = log_p.add_(h).mul_(d_h).add_(d_l).mul_(p).neg_()  # (b, V)
                d.scatter_add_(1, t[:, None], d_l)
                block.copy_(d.div_(ctx.temperature))
            d_hidden[start : start + ctx.chunk] = logits @ weight
            product = logits.T @ hidden_chunk
            d_weight = product if d_weight is None else d_weight.float().add_(product)
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
            calls = attention_calls(batch, c.num_attention_heads // c.num_key_value_heads, dtype)
            pack_arguments = {"prefix": batch.prefix, "calls": calls}
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
        zeros = torch.zeros(batch.scored.shape, device=hidden.device)  # (B, T)
        return Scored(*(zeros.masked_scatter(batch.scored, value) for value in values))

    def full_weights(
        self, dtype: torch.dtype = torch.bfloat16
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(Hugging Face name, gathered tensor) of each parameter; a tied head is not listed
        separately. Collective: every rank must exhaust the iterator, even if it needs no tensor."""
        for name, parameter in self.model.named_parameters():
            yield name, parallel.full_tensor(parameter.detach().to(dtype))


# --------------------------------------------------------------------------------------------------
# Load and export


def check_model_folder(folder: str | Path, longest: int) -> None:
    """Raise ValueError if the model cannot be used for rows of `longest` tokens. Weights are not
    loaded."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model {folder}: no config.json; --model must be a Hugging Face model folder"
        )
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"model {folder}: type {config.get('model_type')!r} is not supported; its head may "
            "scale or cap logits, which policy.py does not implement. Supported: "
            f"{', '.join(MODEL_TYPES)}"
        )
    if config.get("use_sliding_window"):
        raise ValueError(
            f"model {folder} uses sliding window attention, which packing.py does not implement; "
            f"choose a model of type {', '.join(MODEL_TYPES)} without it"
        )
    if longest > config["max_position_embeddings"]:
        raise ValueError(
            f"model {folder} reads {config['max_position_embeddings']} tokens, fewer than "
            f"prompt_tokens + sampling.max_tokens = {longest}; lower one of them"
        )


def weight_names(folder: str | Path) -> set[str]:
    """Names of the weights in the folder's safetensors files. Rotary tables, which old files also
    hold, are left out."""
    names: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as f:
            names |= set(f.keys())
    return {name for name in names if not name.endswith("rotary_emb.inv_freq")}


class Size(NamedTuple):
    """Sizes of a model that memory depends on: counts, not bytes."""

    kind: str  # model_type
    parameters: int  # a tied head counted once
    layers: int
    per_layer: int  # parameters of one decoder layer
    hidden: int
    vocabulary: int
    activations: int  # that one layer saves for backward, values per token
    kv_per_token: int  # key and value entries of one token, all layers
    heads_per_key: int  # query heads per key-value head
    tied: bool


def model_size(folder: str | Path) -> Size:
    """Read from the folder's config.json; needs no weights."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    # Activations: inputs and outputs of every linear layer; for the norms' inputs and fp32 copies
    # and the rotated heads 6 x hidden size.
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


def load_model(
    folder: str | Path, dtype: torch.dtype, attn_implementation: str = "sdpa"
) -> PreTrainedModel:
    """The full model, on CPU."""
    disable_progress_bar()  # it would show one bar per rank and load
    return AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        attn_implementation=attn_implementation,
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
    )


def load_policy(folder: str | Path, config: PolicyConfig, trainable: bool = True) -> Policy:
    """A sharded policy, or with `trainable=False` a sharded KL reference: parameters in the compute
    type, no gradients."""
    compute = getattr(torch, config.dtype)
    stored = getattr(torch, config.parameters) if trainable else compute
    policy = Policy(load_model(folder, stored, attention(config)), config.head_tokens)
    policy.requires_grad_(trainable).train(trainable)
    if trainable and config.gradient_checkpointing:
        policy.model.gradient_checkpointing_enable({"use_reentrant": False})
    parallel.shard(policy, policy.model.model.layers, compute, trainable)
    return policy


def export(policy: Policy, tokenizer, folder: Path) -> None:
    """Write a standard Hugging Face folder in bf16, which from_pretrained and vLLM can load.
    Collective."""
    weights = {}
    for name, tensor in policy.full_weights(torch.bfloat16):
        if parallel.rank() == 0:
            weights[name] = tensor.cpu().contiguous()
    if parallel.rank() == 0:
        config = json.loads(policy.model.config.to_json_string(use_diff=True))
        config |= {"architectures": [type(policy.model).__name__], "dtype": "bfloat16"}
        with fresh_folder(folder) as temporary:
            save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
            (temporary / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
            policy.model.generation_config.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    parallel.barrier()
