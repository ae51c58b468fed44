"""Numbers that can be trusted: item-level metrics, full-ranking evaluation, baselines, intervals, ties, reports."""
