"""The transformers sampler: .venv/bin/python -m pytest tests/test_sampler.py"""

import pytest
import torch
from conftest import REQUESTS
from transformers.generation.logits_process import (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import prompts
from backend.packing import Row, share_out
from backend.policy import PolicyConfig, load_model, load_policy
from backend.sampler import Request, SamplingParams, TransformersSampler, _draw, seed_of

PARAMS = SamplingParams(max_tokens=120)


def requests(tokenizer, seed=3, n=3, count=4):
    return [
        Request(text, k, tokenizer.encode(prompts.policy_prompt(turns, "short")), seed)
        for text in REQUESTS[:count]
        for turns in [[{"role": "user", "content": text}]]
        for k in range(n)
    ]


@pytest.fixture(scope="module")
def sampler(parrot_folder, tokenizer):
    return TransformersSampler(load_model(parrot_folder, torch.float32), tokenizer, batch_rows=6)


def test_draws_follow_temperature_top_k_top_p():
    g = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(1, 40, generator=g)
    params = SamplingParams(temperature=0.8, top_p=0.9, top_k=25)
    scores = TemperatureLogitsWarper(0.8)(None, logits)
    expected = TopPLogitsWarper(0.9)(None, TopKLogitsWarper(25)(None, scores)).softmax(-1)[0]
    n = 40_000
    drawn = _draw(logits.expand(n, -1), params, g).bincount(minlength=40) / n
    assert ((drawn > 0) <= (expected > 0)).all()  # nothing outside the kept set
    sigma = (expected * (1 - expected) / n).sqrt()
    assert ((drawn - expected).abs() <= 5 * sigma).all()
    assert _draw(logits, SamplingParams(temperature=0), g).item() == logits.argmax().item()


def test_rollouts_stop_after_the_block_and_agree_with_teacher_forcing(
    sampler, parrot_folder, tokenizer
):
    samples = list(sampler.sample(requests(tokenizer), PARAMS))
    assert sorted((s.request.prompt_id, s.request.sample) for s in samples) == sorted(
        (q.prompt_id, q.sample) for q in requests(tokenizer)
    )
    well_formed = [s for s in samples if prompts.parse_self_eval(s.text)]
    assert len(well_formed) > len(samples) / 2
    for s in well_formed:
        assert s.finish_reason == "stop" and s.text.endswith(prompts.CLOSE)
        assert tokenizer.decode(s.response_ids) == s.text
        assert prompts.score_positions(s.response_ids, tokenizer) is not None
    policy = load_policy(parrot_folder, PolicyConfig(dtype="float32"))
    whole = [Row([*s.request.prompt_ids, *s.response_ids],
                 [False] * len(s.request.prompt_ids) + [True] * len(s.response_ids))
             for s in samples]  # fmt: skip
    with torch.no_grad():
        for batch in share_out(whole, [0] * len(whole), 1).batches:
            [i] = batch.index
            forced = policy(batch, 0.8).logp_t1[batch.mask]
            torch.testing.assert_close(forced, torch.tensor(samples[i].logp), rtol=0, atol=2e-4)


def test_length_and_end_of_sequence(sampler, tokenizer):
    cut = list(sampler.sample(requests(tokenizer), SamplingParams(max_tokens=3)))
    assert {s.finish_reason for s in cut} == {"length"} and {len(s.response_ids) for s in cut} == {
        3
    }
    assert sampler._finish_reason([5, 6, tokenizer.eos_token_id], PARAMS) == "stop"
    closed = tokenizer.encode("x [/SELF_EVAL]\n")
    assert sampler._finish_reason(closed, PARAMS) == "stop"
    assert sampler._finish_reason(closed[:-2], PARAMS) is None


def test_sampling_is_a_function_of_its_seed(sampler, tokenizer):
    def texts(seed):
        return [s.text for s in sampler.sample(requests(tokenizer, seed), PARAMS)]

    assert texts(3) == texts(3)
    assert texts(3) != texts(4)
    mixed = [q._replace(seed=k) for k, q in enumerate(requests(tokenizer))]
    with pytest.raises(ValueError, match="one seed per call"):
        list(sampler.sample(mixed, PARAMS))
    assert list(sampler.sample([], PARAMS)) == []


def test_a_finished_rollout_is_there_before_the_rest(sampler, tokenizer):
    stream = sampler.sample(requests(tokenizer), PARAMS)
    first = next(stream)
    assert first.finish_reason == "stop"
    assert len(list(stream)) == len(requests(tokenizer)) - 1


def test_weights_are_handed_over_whole(parrot_folder, random_folder, tokenizer):
    sampler = TransformersSampler(load_model(parrot_folder, torch.bfloat16), tokenizer, 6)
    policy = load_policy(parrot_folder, PolicyConfig(dtype="float32"))
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.5)
    sampler.load_weights(policy, "c2s7")
    assert sampler.weight_version == "c2s7"
    for (name, p), (_, q) in zip(
        sampler.model.named_parameters(), policy.full_weights(), strict=True
    ):
        assert torch.equal(p, q), name
    assert sampler.model.lm_head.weight is sampler.model.model.embed_tokens.weight
    assert next(sampler.sample(requests(tokenizer), PARAMS)).weight_version == "c2s7"
    untied = TransformersSampler(load_model(random_folder("qwen3", False), torch.float32),
                                 tokenizer, 6)  # fmt: skip
    policy = load_policy(random_folder("qwen3", True), PolicyConfig(dtype="float32"))
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        untied.load_weights(policy, "c2s7")


def test_seeds_are_the_same_in_every_process():
    assert seed_of(42, 1, 2, "a") == 2788279255
    assert seed_of(42, 1, 2, "a") != seed_of(42, 1, 2, "b")
