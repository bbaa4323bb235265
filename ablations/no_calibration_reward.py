"""w_c = 0: RL on quality alone, then distillation as ever. Tests that without the calibration term
the self-scores drift to an overconfident constant (Sec. 3.1)."""

import cycle

cycle.main(options=("--reward.w_calibration", "0"))
