"""What a study found: scores, intervals, losses, summaries."""
