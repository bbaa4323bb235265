"""Few-shot examples with scores over the whole range, instead of mostly 8s (App. B.1). Tests how
far the examples prime the self-scores."""

import cycle

cycle.main(options=("--few_shot", "varied"))
