"""Any number of distilled rollouts per prompt, instead of at most 4 (authors' configuration; the
paper does not name the limit)."""

import cycle

cycle.main(options=("--sft.per_prompt_limit", "1000000"))
