"""Not a test: one rank of test_vllm.py. Usage: engine_rank.py MODEL_FOLDER OUT

Writes OUT.RANK.json: what the engine sampled from handed-over weights, how far its figures
are from the trainer's, and what it said when it was given too little or was asked too late.
"""

import json
import sys
from pathlib import Path

import torch

from backend import parallel
from backend.model_folder import load_tokenizer
from backend.packing import Row, share_out
from backend.policy import PolicyConfig, load_policy
from backend.sampler import EngineConfig, Request, SamplingParams, VLLMSampler, seed_of

FREE = SamplingParams(temperature=1.0, top_p=1.0, top_k=0, max_tokens=24)
TEXTS = ("Say something about rain.", "Say something about tea, and then about maps.", "Why?")


def requests(tokenizer, seed: int = 0) -> list[Request]:
    """Three prompts of three rollouts on rank 0, one prompt on rank 1."""
    texts = TEXTS if parallel.rank() == 0 else TEXTS[:1]
    return [
        Request(t, k, tokenizer.encode(t), seed_of(seed, parallel.rank(), t, k))
        for t in texts
        for k in range(3)
    ]


def gap(policy, samples) -> float:
    """Mean |engine's - trainer's| log-probability per token, over all ranks."""
    rows = [
        Row([*s.request.prompt_ids, *s.response_ids],
            [False] * len(s.request.prompt_ids) + [True] * len(s.response_ids))
        for s in samples
    ]  # fmt: skip
    total = {"difference": 0.0, "tokens": 0}
    rows = parallel.gather(rows)
    samples = parallel.gather(samples)
    for batch in share_out(rows, [0] * len(rows), 200).batches:
        with torch.no_grad():
            forced = policy(batch).logp_t1  # (B, T)
        for b, i in enumerate(batch.index):
            sampled = torch.tensor(samples[i].logp)
            total["difference"] += (forced[b][batch.mask[b]] - sampled).abs().sum().item()
            total["tokens"] += len(sampled)
    total = parallel.all_sum(total)
    return total["difference"] / total["tokens"]


def failure(call) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"


def main(folder: str, out: str) -> None:
    tokenizer = load_tokenizer(folder)
    engine = EngineConfig(kv_cache_gb=0.05)
    with parallel.process_group():
        sampler = VLLMSampler(Path(folder), tokenizer, "bfloat16", 64, 8, 5, engine)
        policy = load_policy(folder, PolicyConfig())
        scoring = load_policy(folder, PolicyConfig(), trainable=False)  # may forward alone
        with torch.no_grad():
            for p in policy.parameters():
                p.mul_(1.3)

        def sample(seed: int = 0):
            asked = requests(tokenizer, seed)
            got = sorted(sampler.sample(asked, FREE), key=lambda s: asked.index(s.request))
            parallel.copy_shards(policy, scoring)
            return got, gap(scoring, got)

        said = {"first_random": torch.rand(1).item()}
        said["stale_gap"] = sample()[1]
        sampler.load_weights(policy, "c1s0")
        samples, said["gap"] = sample()
        said["texts"] = [s.response_ids for s in samples]
        said["again"] = [s.response_ids for s in sample()[0]]
        said["other_seed"] = [s.response_ids for s in sample(1)[0]]
        said["versions"] = [s.weight_version for s in samples]
        said["greedy"] = [
            s.response_ids
            for s in sampler.sample(requests(tokenizer), SamplingParams(0.0, max_tokens=4))
        ]

        # One token each for many seeds: which were drawn how often, and what the policy says.
        if parallel.rank() == 0:
            ids = tokenizer.encode(TEXTS[0])
            many = [Request("one", k, ids, seed_of("one", k)) for k in range(8000)]
            params = SamplingParams(temperature=0.8, top_p=0.9, top_k=25, max_tokens=1)
            said["drawn"] = [s.response_ids[0] for s in sampler.sample(many, params)]
        with torch.no_grad():  # every rank: a forward is a collective
            parallel.copy_shards(policy, scoring)
            prompt = tokenizer.encode(TEXTS[0])
            mask = [*[False] * len(prompt), True]
            rows = [Row([*prompt, v], mask) for v in range(len(tokenizer))]
            found = []
            for batch in share_out(rows, [0] * len(rows), 4096).batches:
                values = scoring(batch).logp_t1[batch.mask].tolist()
                found += zip(batch.index, values, strict=True)
            said["logp"] = [value for _, value in sorted(parallel.gather(found))]  # (V,)

        # Steps of training: the engine follows, in place, several times.
        for step in range(1, 4):
            with torch.no_grad():
                for p in policy.parameters():
                    p.mul_(0.9)
            sampler.load_weights(policy, f"c1s{step}")
            said[f"gap_{step}"] = sample()[1]

        # The engine's weights are older than their label, or the label is old.
        sampler.llm.update_weight_version("c1s2")
        said["stale_version"] = failure(sample)
        sampler.llm.update_weight_version("c1s3")

        # Nine rollouts through eight seats: when the caller leaves after the first, one is still
        # to come. It is given up, and the next hand-over and the next rollouts are good.
        stream = sampler.sample([*requests(tokenizer), *requests(tokenizer, 2)][:9], FREE)
        next(stream)
        stream.close()
        said["unfinished"] = sampler.llm.llm_engine.get_num_unfinished_requests()
        sampler.load_weights(policy, "c1s4")
        said["gap_after_close"] = sample()[1]

        # A hand-over while a rollout is being sampled would leave its prefix in the cache.
        engine = sampler.llm.llm_engine
        long = sampler._request_params(max_tokens=30, ignore_eos=True)
        engine.add_request("x", {"prompt_token_ids": list(range(1, 34))}, long)
        engine.step()
        said["mid_sampling"] = failure(lambda: sampler.load_weights(policy, "c1s5"))
        engine.abort_request(["x"])

        # Sleep and wake up: on CPU the same calls, which free nothing.
        sampler.sleeps = True
        sampler.sleep()
        sampler.load_weights(policy, "c1s5")
        said["gap_after_sleep"] = sample()[1]

        # The tied head left out: told by its name, and by the gap where the names are not compared.
        if policy.model.config.tie_word_embeddings:
            with torch.no_grad():
                for p in policy.parameters():
                    p.mul_(1.3)
            policy.model.config.tie_word_embeddings = False
            said["no_head"] = failure(lambda: sampler.load_weights(policy, "c1s6"))
            sampler._expected_names.discard("lm_head.weight")
            sampler.load_weights(policy, "c1s6")
            said["no_head_gap"] = sample()[1]

        Path(f"{out}.{parallel.rank()}.json").write_text(json.dumps(said))
        sampler.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
