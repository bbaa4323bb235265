"""A linear calibration reward. Tests that gamma > 1 keeps self-scores away from the judge's mean
(Sec. 3.1)."""

import cycle

cycle.main(options=("--reward.gamma", "1"))
