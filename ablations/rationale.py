"""A line of reasons stands between the answer and the block; without it a response is malformed.
The judge does not see it. Tests that scores alone, at once, are enough (App. B.1).
Evaluate: python -c "import ablations.rationale, evaluate; evaluate.main()" --models ..."""

import cycle
import prompts
import rollout

MARK = "\n\nIn short: "
WHY = ("the sum is right and nothing else was asked.", "two tips, each with its use.",
       "the reason is right and brief.", "the cause, and what to do about it.",
       "it works, and the alternative is named.", "the cause and the steps, in order.")  # fmt: skip
ASK = f'- Then write one line that begins with "{MARK.strip()}" and says how good it is, and why.'
shown = prompts.FEW_SHOT["paper-like"]


def with_reasons(text):
    found = prompts.parse_self_eval(text)
    answer, _, why = found.answer.rpartition(MARK) if found else ("", "", "")
    return found._replace(answer=answer.strip()) if answer.strip() and why else None


rollout.parse_self_eval = with_reasons
shown = [e._replace(answer=e.answer + MARK + why) for e, why in zip(shown, WHY, strict=True)]
prompts.FEW_SHOT = prompts.FEW_SHOT | {"paper-like": tuple(shown)}
template = prompts.TEMPLATES["paper"].replace("- Then append", f"{ASK}\n- Then append")
prompts.TEMPLATES = prompts.TEMPLATES | {"paper": template}
if __name__ == "__main__":
    cycle.main()
