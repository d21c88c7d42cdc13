"""What a person sees of a run: progress, clocks, charts, reports, comparisons, trackers. It changes nothing."""
