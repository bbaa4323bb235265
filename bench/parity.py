"""Whether a model computes the same in this project's own ways as in transformers, row by row:

    python -m bench.parity MODEL          a Hugging Face folder, or a hub id that has been fetched

packs     the policy's log-probabilities and entropies, rows packed behind a shared prefix
padding   the same with padded rows
sampler   the log-probabilities of the decoding loop's own samples

Each line has the largest absolute difference from plain forward passes of single rows by
transformers, in float32 at temperatures 1 and 0.8; the exit status is 1 where one is above LIMIT.
For a new family, add its type to backend/model_folder.MODEL_TYPES first. Gradients are compared in
tests/test_packing.py, vLLM in tests/test_vllm.py and by the alarm of every run.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

sys.path.insert(0, str(Path(__file__).parent.parent))

from backend import parallel  # noqa: E402
from backend.model_folder import check_model_folder, check_weights, load_tokenizer  # noqa: E402
from backend.packing import Row, share_out  # noqa: E402
from backend.policy import PolicyConfig, load_model, load_policy  # noqa: E402
from backend.sampler import Request, SamplingParams, TransformersSampler  # noqa: E402
from grpo import response_row  # noqa: E402
from prompts import prompt_ids, render_response  # noqa: E402
from storage.hub import fetch_weights, model_folder  # noqa: E402

LIMIT = 1e-3  # nats; a wrong mask or position makes far more
TEMPERATURE = 0.8
QUESTIONS = ("Name a colour.", "Why is the sky blue, and why is it red in the evening?")
ANSWERS = ("Red.", "Air scatters short waves more than long ones.\n\n- by day\n- at night", "1 2 3")


def plain(model, row: Row, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities, entropies) of a row's scored tokens by one forward of the row alone."""
    ids = torch.tensor(row.ids, device=model.device)
    logits = model(input_ids=ids[None]).logits[0, :-1].float() / temperature  # (T - 1, V)
    logp = logits.log_softmax(-1)
    scored = torch.tensor(row.mask[1:], device=model.device)
    entropy = -(logp.exp() * logp).sum(-1)
    return logp.gather(1, ids[1:, None])[:, 0][scored].cpu(), entropy[scored].cpu()


def largest(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Largest absolute difference; infinite where one is not a number."""
    worst = max((a - b).abs().max().item() for a, b in pairs)
    return worst if worst == worst else float("inf")


def policy_difference(folder: Path, model, rows: Sequence[Row], shared_prefix: bool) -> float:
    policy = load_policy(folder, PolicyConfig("float32", shared_prefix=shared_prefix), False)
    groups = [i // len(ANSWERS) for i in range(len(rows))]
    pairs = []
    for batch in share_out(rows, groups, 1_000_000, shared_prefix).batches:
        got = policy(batch, TEMPERATURE)
        for b, i in enumerate(batch.index):
            at = batch.scored[b]
            logp, entropy = plain(model, rows[i], TEMPERATURE)
            logp_t1, _ = plain(model, rows[i], 1.0)
            pairs += [(got.logp[b][at].cpu(), logp), (got.entropy[b][at].cpu(), entropy)]
            pairs.append((got.logp_t1[b][at].cpu(), logp_t1))
    return largest(pairs)


def sampler_difference(folder: Path, model, tokenizer, prompts: Sequence[tuple[int, ...]]) -> float:
    sampler = TransformersSampler(load_model(folder, torch.float32), tokenizer, 4)
    requests = [Request(str(p), k, ids, 0) for p, ids in enumerate(prompts) for k in range(3)]
    params = SamplingParams(temperature=TEMPERATURE, max_tokens=24)
    pairs = []
    for s in sampler.sample(requests, params):
        row = response_row(s.request.prompt_ids, s.response_ids)
        pairs.append((torch.tensor(s.logp), plain(model, row, 1.0)[0]))
    return largest(pairs)


@torch.no_grad()
def differences(name: str) -> dict[str, float]:
    """Raises ValueError for what is not a model that can be used."""
    folder = model_folder(name)
    check_model_folder(folder, 0)
    tokenizer = load_tokenizer(folder)
    prompts = [prompt_ids(tokenizer, [{"role": "user", "content": q}], "short") for q in QUESTIONS]
    answers = [render_response(a, (k, 2, 8, 5, 1)) for k, a in enumerate(ANSWERS)]
    rows = [response_row(p, tokenizer.encode(a, add_special_tokens=False))
            for p in prompts for a in answers]  # fmt: skip
    check_model_folder(folder, max(len(row.ids) for row in rows) + 24)
    fetch_weights(name)
    check_weights(folder)
    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    model.to(parallel.device()).eval()
    return {
        "packs": policy_difference(folder, model, rows, True),
        "padding": policy_difference(folder, model, rows, False),
        "sampler": sampler_difference(folder, model, tokenizer, prompts),
    }


def run(name: str) -> int:
    """Print a line for each way; returns the exit status."""
    try:
        found = differences(name)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    for way, difference in found.items():
        verdict = "pass" if difference <= LIMIT else f"FAIL (above {LIMIT:g})"
        print(f"{way:<8} {difference:.1e} nats at most  {verdict}")
    return int(max(found.values()) > LIMIT)


def main() -> int:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder, or hub id")
    args = parser.parse_args()
    with parallel.process_group():
        return run(args.model)


if __name__ == "__main__":
    sys.exit(main())
