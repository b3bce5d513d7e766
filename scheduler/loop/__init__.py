"""The loop of a study: ask, plan, place, run, judge, tell."""
