"""Reading and writing files: prompts, models, rollouts, metrics, run folders."""
