"""Forward, micro-batches, export: .venv/bin/python -m pytest tests/test_policy.py"""

import json
import weakref
from collections import Counter

import pytest
import torch
from conftest import make_rollout
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from backend import parallel
from backend.model_folder import check_model_folder
from backend.packing import Row, share_out
from backend.policy import PolicyConfig, export, load_model, load_policy
from grpo import GRPOConfig, make_optimizer, policy_loss, response_row
from sft_masked import masked_loss

FP32 = PolicyConfig(dtype="float32")
KINDS = [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", True), ("qwen3", False),
         ("mistral", False), ("olmo2", False), ("olmo3", False), ("smollm3", True),
         ("phi3", False)]  # fmt: skip


def row(vocab: int) -> Row:
    g = torch.Generator().manual_seed(1)
    return Row(torch.randint(0, vocab, (14,), generator=g).tolist(), [False] * 5 + [True] * 9)


def test_parameters_are_fp32_and_compute_is_bf16(random_folder, tokenizer):
    policy = load_policy(random_folder(), PolicyConfig())
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    seen = []
    policy.model.model.register_forward_hook(lambda m, i, o: seen.append(o[0].dtype))
    [batch] = share_out([row(len(tokenizer))], [0], 1000).batches
    out = policy(batch)
    assert seen == [torch.bfloat16] and out.logp.dtype == torch.float32
    out.logp.sum().backward()
    assert {p.grad.dtype for p in policy.parameters()} == {torch.float32}


def test_the_head_runs_on_scored_tokens_only_and_in_chunks(random_folder, tokenizer, monkeypatch):
    """However long the prompt: 9 scored tokens, 4 at a time, in forward and in backward."""
    config = PolicyConfig("float32", head_tokens=4, gradient_checkpointing=False)
    policy, seen = load_policy(random_folder("llama", False), config), []
    linear = torch.nn.functional.linear

    def spy(x, weight, bias=None):
        if weight.shape[0] == len(tokenizer):
            seen.append(x.shape[0])
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", spy)
    for prompt in (5, 500):
        one = Row([*range(prompt), *range(9)], [False] * prompt + [True] * 9)
        [batch] = share_out([one], [0], 1000).batches
        policy(batch).logp.sum().backward()
    assert seen == [4, 4, 1] * 4


class Kernels(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, DTensor) for t in types):
            return NotImplemented  # its parts come by themselves
        self.calls[func._overloadpacket._qualified_op_name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("shared", "products"), [(True, 2), (False, 1)])
def test_all_of_a_layer_is_recomputed_but_its_attention(random_folder, shared, products):
    """By hand: 2 layers of 7 matrix products, of which backward does not need the last one's
    result; attention is a call for the prefix and one for the rows behind it, or one for padded
    rows. Gradients are compared in test_packing.py."""
    one = row(500)
    rows = [one, one._replace(ids=[*one.ids[:5], *range(9)])]
    matrix = {}
    for checkpointing in (True, False):
        config = PolicyConfig("float32", shared_prefix=shared, gradient_checkpointing=checkpointing)
        policy = load_policy(random_folder("llama"), config)
        [batch] = share_out(rows, [0, 0], 1000, shared).batches
        with Kernels() as kernels:
            policy(batch).logp.sum().backward()
        matrix[checkpointing] = kernels.calls["aten::mm"]
        name = "aten::_scaled_dot_product_flash_attention_for_cpu"
        assert kernels.calls[name] == kernels.calls[f"{name}_backward"] == 2 * products
    assert matrix[True] - matrix[False] == 2 * 6


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_what_each_rank_reads_is_what_transformers_loads(random_folder, kind, tied):
    """Parameters, the tables of rotary positions, and the tie."""
    folder = random_folder(kind, tied)
    policy, whole = load_policy(folder, FP32), load_model(folder, torch.float32)
    for read, loaded in ((policy.model.named_parameters, whole.named_parameters),
                         (policy.model.named_buffers, whole.named_buffers)):  # fmt: skip
        loaded = dict(loaded())
        for name, tensor in read():
            full = getattr(tensor, "full_tensor", lambda t=tensor: t)()
            assert torch.equal(full, loaded.pop(name)), name
        assert not loaded
    assert (policy.model.lm_head.weight is policy.model.model.embed_tokens.weight) == tied
    assert policy.model.config.to_dict().keys() == whole.config.to_dict().keys()


def test_a_file_of_another_type_and_one_beside_the_models(random_folder, tmp_path, tokenizer):
    """bf16 on file becomes fp32 parameters; only model.safetensors counts, as in the checks."""
    whole = load_model(random_folder(), torch.bfloat16)
    whole.save_pretrained(tmp_path)
    other = {name: torch.zeros_like(t) for name, t in whole.state_dict().items()}
    save_file(other, tmp_path / "older.safetensors")
    policy = load_policy(tmp_path, FP32)
    loaded = dict(whole.named_parameters())
    for name, p in policy.model.named_parameters():
        full = parallel.full_tensor(p)
        assert full.dtype == torch.float32 and torch.equal(full, loaded[name].float()), name


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 1e-3)])
def test_the_first_step_of_a_cycle_has_ratio_1_and_no_kl(random_folder, tokenizer, dtype, limit):
    config = PolicyConfig(dtype=dtype)
    policy = load_policy(random_folder(), config)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.01)  # the policy has moved since the base model was loaded
    reference = load_policy(random_folder(), config, trainable=False)
    parallel.copy_shards(policy, reference)
    rollouts = [make_rollout(tokenizer, answer="It is fine. " * k) for k in (1, 2, 3)]
    rows = [response_row(r.prompt_ids, r.response_ids) for r in rollouts]
    [batch] = share_out(rows, [0, 0, 0], 10_000).batches
    logp, ref = policy(batch, 0.8).logp, reference(batch, 0.8).logp
    old = torch.zeros_like(logp)  # from a separate pass, one row at a time
    with torch.no_grad():
        for one in share_out(rows, [0, 0, 0], 1).batches:
            old[one.index[0], : one.mask.shape[1]] = policy(one, 0.8).logp[0]
    ratio = (logp - old)[batch.mask].exp()
    assert (ratio - 1).abs().max() < (1e-4 if dtype == "float32" else 0.1)
    _, sums = policy_loss(logp, old, ref, torch.ones(3), batch.mask)
    assert sums["clipped"] == 0 and sums["kl"] / sums["tokens"] < limit


@pytest.mark.parametrize(("kind", "tied"), KINDS)
def test_export_loads_as_it_is(random_folder, tokenizer, tmp_path, kind, tied):
    policy = load_policy(random_folder(kind, tied), FP32)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01)
    export(policy, random_folder(kind, tied), tmp_path / "out")
    assert not (tmp_path / "out.tmp").exists()
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    assert back.dtype == torch.bfloat16 and back.config.tie_word_embeddings == tied
    names = dict(policy.model.named_parameters())
    for name, p in back.named_parameters():
        assert torch.equal(p, parallel.full_tensor(names[name]).bfloat16()), name
    again = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    text = 'naïve {"helpfulness": 8}'
    assert again.encode(text) == tokenizer.encode(text)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [type(back).__name__]


def test_a_hand_over_holds_one_tensor_at_a_time(random_folder):
    """No second copy of the model: each tensor is gone before the next is made."""
    policy = load_policy(random_folder(), PolicyConfig(), trainable=False)
    last, names = (lambda: None), []
    for name, tensor in policy.full_weights(torch.float32):  # another type: copies
        assert last() is None, name
        names.append(name)
        last = weakref.ref(tensor)
        del tensor
    assert names == [name for name, _ in policy.model.named_parameters()] and len(names) > 10


def test_a_restored_optimizers_step_is_where_its_parameter_is():
    """The fused AdamW of a GPU takes no step from the CPU; "meta" stands for the GPU here."""
    p = torch.nn.Parameter(torch.zeros(3, device="meta"))
    made = parallel.optimizer_tensors(torch.optim.AdamW([p]), {p: "p"})
    assert set(made) == {"p.step", "p.exp_avg", "p.exp_avg_sq"}
    assert {t.device.type for t in made.values()} == {"meta"}


def test_at_the_papers_rate_bf16_parameters_hardly_move(random_folder):
    """Why parameters are fp32 by default, and that preset official takes the authors' type."""
    changed = {}
    for dtype in ("float32", "bfloat16"):
        policy = load_policy(random_folder(), PolicyConfig(parameters=dtype))
        assert {p.dtype for p in policy.parameters()} == {getattr(torch, dtype)}
        before = [parallel.full_tensor(p.detach()).clone() for p in policy.parameters()]
        optimizer = make_optimizer(policy, GRPOConfig())
        for p in policy.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        after = [parallel.full_tensor(p.detach()) for p in policy.parameters()]
        moved = sum((a != b).sum().item() for a, b in zip(before, after, strict=True))
        changed[dtype] = moved / sum(b.numel() for b in before)
    assert changed["float32"] > 0.95 and changed["bfloat16"] < 0.05


def test_unusable_model_folders_are_named(tmp_path, random_folder):
    with pytest.raises(ValueError, match=r"no config.json"):
        check_model_folder(tmp_path, 9)
    (tmp_path / "config.json").write_text('{"model_type": "gemma2"}')
    with pytest.raises(ValueError, match="type 'gemma2' is not supported"):
        check_model_folder(tmp_path, 9)
    (tmp_path / "config.json").write_text(
        '{"model_type": "qwen2", "use_sliding_window": true, "max_position_embeddings": 99}'
    )
    with pytest.raises(ValueError, match="sliding window"):
        check_model_folder(tmp_path, 9)
    check_model_folder(random_folder(), 1024)
    with pytest.raises(ValueError, match="reads 1024 tokens, fewer than .* = 1025"):
        check_model_folder(random_folder(), 1025)


def test_masked_loss_by_hand():
    logp = torch.tensor([[-1.0, -2.0, float("nan")], [-3.0, -5.0, -7.0]])
    mask = torch.tensor([[False, True, False], [True, False, False]])
    assert masked_loss(logp, mask, 5).item() == pytest.approx((2 + 3) / 5)
