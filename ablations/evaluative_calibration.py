"""The calibration reward reads the three evaluative attributes alone. Tests that measuring it over
all five, complexity and verbosity too, is what shapes those (Sec. 3.1)."""

import cycle
import reward

all_five = reward.reward


def three(self_scores, judge, **weights):
    cut = reward.EVALUATIVE
    if self_scores is None:
        return all_five(None, None, **weights)
    return all_five(self_scores[:cut], judge[:cut], **weights)


reward.reward = three
cycle.main()
