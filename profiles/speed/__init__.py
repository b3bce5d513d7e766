"""How fast a step runs: measured figures, roofline and throughput."""
