"""Twice the prompts at equal sample-passes: each cycle takes half of them. Tests how little data
elicitation needs (Sec. 1)."""

import cycle

cycle.main(options=("--window", "320"))
