"""Files: prompts and models in, rollouts, metrics and run folders out."""
