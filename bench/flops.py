"""FLOPs: how many a step asks for, and how many a second the machine's matrix products reach."""

import statistics
import time
from collections import Counter
from collections.abc import Callable

import torch
import torch.nn.attention.varlen  # noqa: F401, registers its operators
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM

aten = torch.ops.aten
# Products of query length x key length x head size: scores and output, and in backward the scores
# again and the gradients of probabilities, queries, keys and values.
_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu.default: (0, 2),
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: (1, 5),
    aten._scaled_dot_product_flash_attention.default: (0, 2),
    aten._scaled_dot_product_flash_attention_backward.default: (1, 5),
    aten._scaled_dot_product_efficient_attention.default: (0, 2),
    aten._scaled_dot_product_efficient_attention_backward.default: (1, 5),
}
# The same of a pack on a GPU. Where among the arguments the query is, the ends of its sequences.
_VARLEN = {
    torch.ops.torch_attn._varlen_attn.default: (0, 3, 2),
    torch.ops.torch_attn._varlen_attn_backward.default: (1, 6, 5),
}


def _causal_pairs(queries: torch.Tensor, keys: torch.Tensor) -> int:
    """Query-key pairs of sequences that end there: the last query sees all of its sequence's keys,
    each one before it one key less."""
    q, k = queries.diff().long(), keys.diff().long()
    return int((q * k - q * (q - 1) // 2).sum())


class Flops(TorchDispatchMode):
    """Counts matrix products and attention in a `with` block, which is slow. Attention is counted
    as its kernel is called: half of the square where it is causal, all of it where it has a mask.
    `by_part`: "attention", "head" (products with a side of `vocabulary`), "matrix products"."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.by_part: Counter[str] = Counter()
        self.vocabulary = vocabulary

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(t, torch.distributed.tensor.DTensor) for t in types):
            return NotImplemented  # its parts come by themselves
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in _ATTENTION:
            first, products = _ATTENTION[func]
            query, key = args[first : first + 2]
            causal = any(x is True for x in args)
            pairs = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
            self.by_part["attention"] += products * 2 * pairs * query.shape[3] // (1 + causal)
        elif func in _VARLEN:
            query, ends, products = _VARLEN[func]
            _, heads, size = args[query].shape
            pairs = _causal_pairs(*args[ends : ends + 2])
            self.by_part["attention"] += products * 2 * pairs * heads * size
        elif func._overloadpacket in flop_registry:
            sides = {n for x in (*args, out) if isinstance(x, torch.Tensor) for n in x.shape}
            part = "head" if self.vocabulary in sides else "matrix products"
            self.by_part[part] += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        return out


def count_flops(step: Callable[[], object], vocabulary: int = 0) -> Counter[str]:
    """By part, of one call of `step`, of which nothing runs compiled."""
    with torch.compiler.set_stance("force_eager"), Flops(vocabulary) as flops:
        step()
    return flops.by_part


class Products:
    """A side (sides.py) that only multiplies: by the weights of one of the model's layers, with as
    many tokens as our micro-batch has, forward and backward; and large squares, for comparison."""

    def __init__(self, model: str, tokens: int, dtype: str):
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
        layer = whole.model.layers[0].modules()
        self.shapes = [m.weight.shape for m in layer if isinstance(m, torch.nn.Linear)]
        self.tokens, self.dtype = tokens, getattr(torch, dtype)

    def rates(self) -> dict[str, float]:
        """FLOP/s."""
        return {
            "own": self._rate([(self.tokens, *shape) for shape in self.shapes]),
            "squares": self._rate([(4096, 4096, 4096)]),
        }

    def _rate(self, shapes: list[tuple[int, int, int]]) -> float:
        """Of n tokens, m numbers out, k in; the median of five rounds after one."""
        on_gpu = torch.cuda.is_available()
        of = {"dtype": self.dtype, "device": "cuda" if on_gpu else "cpu"}
        tensors = [
            (torch.randn(n, k, **of), torch.randn(m, k, **of), torch.randn(n, m, **of))
            for n, m, k in shapes
        ]
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            for x, weight, gradient in tensors:
                F.linear(x, weight)
                gradient @ weight
                gradient.T @ x
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return sum(6 * n * m * k for n, m, k in shapes) / statistics.median(seconds[1:])
