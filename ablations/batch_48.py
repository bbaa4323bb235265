"""The baseline's batch of 48 prompts (Table 6) and a third of the cycles, at equal sample-passes.
Tests how much of SEE's lead over Adapted RLCR is the number of optimiser steps (Sec. 4.1)."""

import cycle

cycle.main(options=("--batch", "48", "--epochs", "4", "--cycles", "5"))
