"""Which modules an adapter is of: projections split and fused, experts one by one and stacked."""
