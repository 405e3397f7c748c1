"""The coordinator: plans ranges, leases them to workers, and knows how the job stands."""
