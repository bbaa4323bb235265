"""A model's Hugging Face folder: checks before anything expensive, size, what an export copies.

Weights are safetensors only, and no code of a model's is run.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from backend.packing import ATTENTION_NAME, Ends
from storage.files import read_json

# Dense, logits = head(norm(hidden)) without scaling, rotary positions: what packing.py computes and
# what the tests hold against plain forward passes, type by type.
MODEL_TYPES = ("llama", "qwen2", "qwen3", "mistral", "olmo2", "olmo3", "smollm3", "phi3")
# vLLM 0.32 samples these through transformers' own classes, which it patches in this process: then
# the policy cannot be loaded beside the engine.
NOT_WITH_VLLM = ("olmo2", "olmo3", "smollm3")
# Positions decide the rotation and nothing else does; "dynamic" and "longrope" depend on the length
# of the whole input, which is another in a pack.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# What an export takes from its source as it stands.
COPIED = ("generation_config.json", "tokenizer*", "vocab.json", "merges.txt",
          "special_tokens_map.json", "added_tokens.json", "chat_template*")  # fmt: skip


# --------------------------------------------------------------------------------------------------
# Checks


def check_model_folder(folder: str | Path, longest: int, sampler: str = "transformers") -> None:
    """Raise ValueError if the model cannot be used for rows of `longest` tokens or with the
    sampler. Weights are not read."""
    folder = Path(folder)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model {folder} is an adapter (adapter_config.json); merge it into its base model and "
            "give the merged folder"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model {folder}: no config.json; --model must be a Hugging Face model folder"
        )
    config = read_json(folder / "config.json")
    if config.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"model {folder}: type {config.get('model_type')!r} is not supported; its head may "
            "scale or cap logits, which policy.py does not implement. Supported: "
            f"{', '.join(MODEL_TYPES)}"
        )
    if sampler == "vllm" and config["model_type"] in NOT_WITH_VLLM:
        raise ValueError(
            f"model {folder}: type {config['model_type']!r} cannot be sampled by vLLM in the "
            "process that trains it; give --sampler transformers"
        )
    if config.get("quantization_config"):
        raise ValueError(
            f"model {folder} is quantised (quantization_config in config.json); training needs its "
            "bf16 or fp32 weights"
        )
    for rope in (config.get("rope_parameters") or {}, config.get("rope_scaling") or {}):
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"model {folder}: rotary positions of type {rope_type!r} depend on the length of "
                f"the input, which differs in a pack; supported: {', '.join(ROPE_TYPES)}"
            )
    limit = config.get("max_position_embeddings")
    if type(limit) is not int:
        raise ValueError(
            f"model {folder}: config.json has no max_position_embeddings, so the longest row is "
            "not known; add it"
        )
    if longest > limit:
        raise ValueError(
            f"model {folder} reads {limit} tokens, fewer than "
            f"prompt_tokens + sampling.max_tokens = {longest}; lower one of them"
        )
    window = attention_window(config)
    if window is not None and longest > window:
        raise ValueError(
            f"model {folder} uses sliding window attention over {window} tokens, which packing.py "
            f"does not implement, and rows have up to {longest}; lower --prompt_tokens or "
            "--sampling.max_tokens, or choose a model without it"
        )


def attention_window(config: Mapping) -> int | None:
    """Tokens that the narrowest layer looks back on; None if all look back on all."""
    layers = config.get("layer_types")
    if layers is not None and not any("sliding" in str(layer) for layer in layers):
        return None
    if layers is None and config.get("use_sliding_window") is False:
        return None
    window = config.get("sliding_window")
    if window is None and (config.get("use_sliding_window") or layers is not None):
        return 0  # a window of a size that config.json does not give
    return window


def check_weights(folder: str | Path) -> None:
    """Raise ValueError unless the folder's safetensors files hold the model's tensors, all of them
    and in their shapes. transformers would fill what is missing with random numbers."""
    folder = Path(folder)
    stored = weight_shapes(folder)
    model = _meta_model(folder)
    expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        expected.setdefault("lm_head.weight", expected["model.embed_tokens.weight"])
        stored.setdefault("lm_head.weight", expected["lm_head.weight"])
    problems = [
        (expected.keys() - stored.keys(), "lack"),
        (stored.keys() - expected.keys(), "hold, unknown to this model type,"),
        ({n for n in expected.keys() & stored.keys() if expected[n] != stored[n]},
         "have in another shape than config.json says"),
    ]  # fmt: skip
    for names, what in problems:
        if names:
            first, *others = sorted(names)
            more = f" and {len(others)} more" if others else ""
            raise ValueError(
                f"model {folder}: its safetensors files {what} {first}{more}; fetch the folder "
                "again, or give the causal language model that config.json describes"
            )


def weight_files(folder: Path) -> list[Path]:
    """The model's safetensors files: those of its index, or model.safetensors, or all. Raises
    ValueError."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(x, str) for x in listed.values()):
            raise ValueError(f"{index}: has no weight_map of file names; fetch it again")
        return sorted(folder / name for name in set(listed.values()))
    if (folder / "model.safetensors").is_file():  # others may hold the same in another form
        return [folder / "model.safetensors"]
    return sorted(folder.glob("*.safetensors"))


def weight_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in the folder's safetensors files. Rotary tables, which old
    files also hold, are left out. Raises ValueError."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(folder):
        if not path.is_file():
            raise ValueError(f"{path}: missing; fetch the model again")
        with open(path, "rb") as f:
            if f.read(40).startswith(b"version https://git-lfs"):
                raise ValueError(f"{path} is a Git LFS pointer, not the weights; fetch it again")
        try:
            with safe_open(path, "pt") as f:
                shapes |= {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path}: cannot be read as safetensors ({error}); fetch it again"
            ) from None
    return {name: s for name, s in shapes.items() if not name.endswith("rotary_emb.inv_freq")}


def weights_id(folder: Path) -> str:
    """Changes when the weight files change, so that answers of other weights are not reused."""
    stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.glob("*.safetensors")]
    return hashlib.blake2b(repr(sorted(stats)).encode(), digest_size=8).hexdigest()


# --------------------------------------------------------------------------------------------------
# Size


class Size(NamedTuple):
    """Sizes of a model that memory depends on: counts of numbers, and bytes where it says so."""

    kind: str  # model_type
    parameters: int  # a tied head counted once
    layers: int
    per_layer: int  # parameters of one decoder layer
    hidden: int
    vocabulary: int
    feed_forward: int  # width of the MLP
    queries: int  # of one token in one layer: heads x head size
    saved: dict[str, float]  # bytes a token that one layer saves for backward, by compute type
    kv_per_token: int  # key and value entries of one token, all layers
    heads_per_key: int  # query heads per key-value head
    tied: bool


def _meta_model(folder: str | Path):
    """The model without its weights. Raises ValueError."""
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # whatever a model class makes of a strange number
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{Path(folder) / 'config.json'}: describes no model that transformers can build "
            f"({text}); fetch it again"
        ) from None


def model_size(folder: str | Path) -> Size:
    """Read from the folder's config.json; needs no weights."""
    model = _meta_model(folder)
    config = model.config
    layer = model.model.layers[0]
    head_size = layer.self_attn.head_dim
    return Size(
        kind=config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        layers=config.num_hidden_layers,
        per_layer=sum(p.numel() for p in layer.parameters()),
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        feed_forward=config.intermediate_size,
        queries=config.num_attention_heads * head_size,
        saved={
            name: _saved_per_token(_meta_model(folder), getattr(torch, name))
            for name in ("bfloat16", "float32")
        },
        kv_per_token=config.num_hidden_layers * 2 * config.num_key_value_heads * head_size,
        heads_per_key=config.num_attention_heads // config.num_key_value_heads,
        tied=config.tie_word_embeddings,
    )


def _saved_per_token(model: PreTrainedModel, dtype: torch.dtype) -> float:
    """Bytes a token that the model's first layer saves for backward, found by running it on the
    meta device, where nothing is computed."""
    base, tokens = model.model.to(dtype), 64
    layer, base.layers = base.layers[0], base.layers[:1]
    base.config._attn_implementation = ATTENTION_NAME
    weights = {p.untyped_storage()._cdata for p in base.parameters()}
    saved: dict[int, torch.Tensor] = {}  # one tensor of each storage, which it keeps
    inside = False

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if inside and storage not in weights:
            saved[storage] = tensor
        return tensor

    def enter(*_) -> None:
        nonlocal inside
        inside = not inside

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(enter)
    with torch.device("meta"):
        ids, ends = torch.zeros(1, tokens, dtype=torch.long), torch.zeros(2, dtype=torch.int32)
    pack = {"lengths": [tokens], "ends": Ends(ends, ends, tokens, tokens)}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        base(input_ids=ids, position_ids=ids, use_cache=False, **pack)
    return sum(t.untyped_storage().nbytes() for t in saved.values()) / tokens


# --------------------------------------------------------------------------------------------------
# Tokenizer, generation settings, export


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json")  # fmt: skip


def load_tokenizer(folder: str | Path):
    """Raises ValueError, with the name of the file where it can be told."""
    present = [name for name in TOKENIZER_FILES if (Path(folder) / name).is_file()]
    for name in present:
        read_json(Path(folder) / name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer.encode("a")
        return tokenizer
    except Exception as error:  # the tokenizers library raises plain Exceptions
        text = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model {folder}: {', '.join(present) or 'no tokenizer.json'} make no tokenizer "
            f"({text}); fetch them again"
        ) from None


def generation_config(folder: str | Path) -> GenerationConfig:
    if (Path(folder) / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    return GenerationConfig.from_model_config(
        AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    )


def write_settings(source: Path, target: Path, model_class: str) -> None:
    """Write an export's config.json, and copy tokenizer, chat template and generation settings
    unchanged from the folder that it was trained from."""
    config = read_json(source / "config.json")
    config |= {"architectures": [model_class], "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    # transformers 5 keeps all of RoPE in rope_parameters; older ones read only these two.
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config.setdefault("rope_theta", rope["rope_theta"])
        if rope.get("rope_type", "default") != "default":
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            config.setdefault("rope_scaling", scaling)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True))
    for pattern in COPIED:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)
