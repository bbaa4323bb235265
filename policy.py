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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

import parallel
from files import fresh_folder

MODEL_TYPES = (
    "llama",
    "qwen2",
    "qwen3",
)  # dense, logits = head(norm(hidden)) without scaling: what we tested


@dataclass(frozen=True)
class PolicyConfig:
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type (App. E: bf16)."""
    parameters: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained parameters and of AdamW's state. bfloat16 as in the authors' scripts:
    most updates at the paper's learning rates round to nothing."""
    attn: Annotated[Literal["auto", "flash", "sdpa"], tyro.conf.arg(aliases=("--attn",))] = "auto"
    """Attention in training: flash-attn's kernels (auto: where CUDA and the package are there; not
    run), or PyTorch's scaled_dot_product_attention."""
    micro_batch_tokens: int = 16384
    """Tokens of a padded micro-batch (rows x longest row). Does not change the gradient, only
    memory and time."""
    head_tokens: int = 2048
    """Scored tokens whose logits exist at once: 2,048 x 151k vocabulary is 1.2 GB in fp32."""
    gradient_checkpointing: bool = True
    """Recompute each layer in backward instead of keeping its activations."""


class Scored(NamedTuple):
    """Per token of the micro-batch, 0 where not scored."""

    logp: torch.Tensor  # (B, T) log-probability of the token at the given temperature
    entropy: (
        torch.Tensor
    )  # (B, T) entropy in nats of the distribution the token was drawn from, same temperature
    logp_t1: torch.Tensor  # (B, T) log-probability at temperature 1, without gradient


class Policy(torch.nn.Module):
    """A causal language model that returns log-probabilities of chosen tokens."""

    def __init__(self, model: PreTrainedModel, head_tokens: int):
        super().__init__()
        self.model = model
        self.head_tokens = head_tokens

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        scored: torch.Tensor,
        temperature: float = 1.0,
    ) -> Scored:
        """ids, positions: (B, T) integers, right-padded; scored: (B, T) bool, False in column 0."""
        # Causal attention over right-padded rows needs no mask: no real token sees a padded one.
        hidden = self.model.model(
            input_ids=ids, position_ids=positions, use_cache=False
        ).last_hidden_state  # (B, T, D)
        before = hidden[:, :-1][scored[:, 1:]]  # (N, D): token t is predicted from position t - 1
        chunks = [
            checkpoint(self._head, h, t, temperature, use_reentrant=False)
            for h, t in zip(
                before.split(self.head_tokens), ids[scored].split(self.head_tokens), strict=True
            )
        ]
        empty = torch.zeros(scored.shape, device=ids.device)  # (B, T)
        return Scored(
            *(empty.masked_scatter(scored, torch.cat(parts)) for parts in zip(*chunks, strict=True))
        )

    def _head(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, ...]:
        """hidden (n, D), targets (n,) -> logp, entropy, logp_t1, each (n,)."""
        logits = self.model.lm_head(hidden).float()  # (n, V)
        log_probs = F.log_softmax(logits / temperature, dim=-1)  # (n, V)
        logp = log_probs.gather(1, targets[:, None])[:, 0]  # (n,)
        entropy = -(log_probs.exp() * log_probs).sum(-1)  # (n,)
        with torch.no_grad():
            logp_t1 = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)  # (n,)
        return logp, entropy, logp_t1

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


# --------------------------------------------------------------------------------------------------
# Micro-batches


class Row(NamedTuple):
    """One sequence and which of its tokens are scored: prompt + response, and a mask of the same
    length."""

    ids: Sequence[int]
    mask: Sequence[bool]


class Batch(NamedTuple):
    index: list[int]  # which rows stand in it; empty for a filler
    ids: torch.Tensor  # (B, T)
    positions: torch.Tensor  # (B, T)
    scored: torch.Tensor  # (B, T) bool: where log-probabilities are computed
    mask: (
        torch.Tensor
    )  # (B, T) bool: where they count; equals `scored` but in a filler, where it is False


def micro_batches(rows: Sequence[Row], max_tokens: int) -> list[Batch]:
    """Rows, longest first, packed into padded batches of at most `max_tokens` tokens (one row at
    least).

    All ranks get the same number of batches, because each forward under FSDP is a collective: a
    rank with fewer rows fills up with batches that count for nothing."""
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i].ids), i))
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * len(rows[groups[-1][0]].ids) <= max_tokens:
            groups[-1].append(i)
        else:
            groups.append([i])
    batches = [_pad(group, [rows[i] for i in group]) for group in groups]
    filler = _pad([], [Row([0, 0], [False, True])])
    filler = filler._replace(mask=torch.zeros_like(filler.mask))
    return batches + [filler] * (int(parallel.all_max(len(batches))) - len(batches))


def _pad(index: list[int], rows: Sequence[Row]) -> Batch:
    ids = torch.zeros(len(rows), max(len(row.ids) for row in rows), dtype=torch.long)  # (B, T)
    mask = torch.zeros(ids.shape, dtype=torch.bool)  # (B, T)
    for b, row in enumerate(rows):
        ids[b, : len(row.ids)] = torch.tensor(row.ids)
        mask[b, : len(row.ids)] = torch.tensor(row.mask)
    positions = torch.arange(ids.shape[1]).expand_as(ids)  # (B, T)
    to = parallel.device()
    return Batch(index, ids.to(to), positions.to(to), mask.to(to), mask.to(to))
