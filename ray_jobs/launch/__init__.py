"""Where a run starts: here, on a local Ray, or on a cluster."""
