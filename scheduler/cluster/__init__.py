"""Ray: starting or joining a cluster, its nodes, and jobs submitted to it."""
