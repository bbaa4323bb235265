"""Half of the prompts at equal sample-passes. Tests how little data elicitation needs (Sec. 1)."""

import cycle

cycle.main(options=("--window", "80", "--epochs", "2"))
