"""The judge scores each distilled answer four times and all four are targets: cross-entropy with
the judge's distribution (Sec. 3.2). A quarter of the answers, so that the updates are as many."""

from dataclasses import replace

import cycle
from backend import parallel
from judge import ask_all


class Soft(cycle.Run):
    def select(self, buffer, number):
        c, size = self.collector, self.config.sft.max_samples // 4
        mine = super().select(buffer, number)[:size][parallel.rank() :: parallel.world_size()]
        four = [(r, c.prompts[r.prompt_id], draw) for r in mine for draw in range(4)]
        asked = [c.judge.score(p.conversation, r.answer, draw=draw) for r, p, draw in four]
        names = [f"prompt {p.id}" for _, p, _ in four]
        scores = c.background.submit(ask_all(asked, "soft targets", names)).result()
        pairs = zip(four, scores, strict=True)
        return parallel.gather([replace(r, judge_scores=j) for (r, _, _), j in pairs if j])


cycle.Run = Soft
cycle.main()
