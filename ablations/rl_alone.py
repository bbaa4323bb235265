"""Phase 1 alone at SEE's window, steps and batch. Tests that the single reward is a slow teacher
and distillation a faster one (Sec. 3.2)."""

import cycle

cycle.main(options=("--no-distil",))
