"""One process of tests/test_ledger.py and bench/judging.py: judges its share of numbered answers.

python judge_worker.py FOLDER RANK RANKS ANSWERS CONCURRENCY TIMEOUT
"""

import json
import sys
from pathlib import Path

from judge import LLMJudge, ask_all
from judging.client import Background, ChatClient
from judging.endpoint import ClientConfig, Endpoint, Service
from judging.ledger import Ledger
from storage.files import append_line
from storage.run_folder import Folder


def main(folder: str, rank: str, ranks: str, answers: str, concurrency: str, timeout: str) -> None:
    config = ClientConfig(backoff=0.05, backoff_max=1.0, timeout=float(timeout), attempts=12)
    service = Service("some-judge", Endpoint(), config)
    share = int(concurrency) // int(ranks)
    judge = LLMJudge(ChatClient(service, share, Ledger(Folder(Path(folder)).judge_cache)))
    turns = [{"role": "user", "content": "Say a number."}]

    async def one(k: int) -> None:
        scores = await judge.score(turns, f"Answer {k}.")
        append_line(Path(folder) / f"scores_{rank}.jsonl", {"answer": k, "scores": scores})

    mine = range(int(rank), int(answers), int(ranks))
    works, names = [one(k) for k in mine], [f"answer {k}" for k in mine]
    Background().submit(ask_all(works, f"rank {rank}", names)).result()
    print(json.dumps(judge.client.take_counts()))


if __name__ == "__main__":
    main(*sys.argv[1:])
