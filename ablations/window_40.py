"""A quarter of the prompts at equal sample-passes. Tests how little data elicitation needs (Sec.
1)."""

import cycle

cycle.main(options=("--window", "40", "--epochs", "5"))
