"""Phase 2 distils human labels of human-written responses (HelpSteer2) instead of the judge's
scores of the model's own. Tests that targets must lie on what the model produces (Sec. 3.2)."""

from dataclasses import replace

import cycle
from prompts import render_response, score_positions
from storage.files import FileError


class Labelled(cycle.Run):
    def select(self, buffer, number):
        rows, tokenizer = [], self.tokenizer
        for p in self.setup.window:
            for k, label in enumerate(p.references):
                text = render_response(label.response, label.scores)
                ids = tuple(tokenizer.encode(text, add_special_tokens=False))
                row = replace(buffer[0], prompt_id=p.id, sample=k, judge_scores=label.scores)
                row = replace(row, prompt_ids=self.setup.inputs.prompt_ids[p.id], response_ids=ids)
                rows.append(replace(row, score_positions=score_positions(ids, tokenizer)))
        if not rows:
            raise FileError(f"{self.config.data}: no labelled responses; give HelpSteer2's")
        return super().select([r for r in rows if r.score_positions], number)


cycle.Run = Labelled
cycle.main()
