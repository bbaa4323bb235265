"""The block stands before the answer, which ends with [END]. Tests that the model evaluates what it
has written (Sec. 3.1): here its scores can only foretell it.
Evaluate: python -c "import ablations.scores_first, evaluate; evaluate.main()" --models ..."""

import re

import cycle
import prompts
from backend import sampler

TAG = r"\[/?SELF_EVAL\]|\[END\]"
FORM = re.compile(rf"\s*\[SELF_EVAL\]{prompts._BODY.pattern}((?:(?!{TAG}).)*)\[END\]\s*", re.DOTALL)
OLD = ("First answer", "Then append", " at the very end", "answer before [SELF_EVAL]",
       "it before [SELF_EVAL]", "text after [/SELF_EVAL]", "be [/SELF_EVAL]")  # fmt: skip
NEW = ("Answer", "But first write", "", "answer", "it before [END]", "text after [END]", "be [END]")
template = prompts.TEMPLATES["paper"]
for old, new in zip(OLD, NEW, strict=True):
    template = template.replace(old, new)


def find(text):
    found = FORM.fullmatch(text)
    return (found[6], tuple(map(found.start, range(1, 6)))) if found and found[6].strip() else None


prompts.find_block, sampler.CLOSE = find, "[END]"
prompts.render_response = lambda answer, s: f"{prompts.render_self_eval(s)}\n\n{answer}\n[END]"
prompts.TEMPLATES = prompts.TEMPLATES | {"paper": template}
if __name__ == "__main__":
    cycle.main()
