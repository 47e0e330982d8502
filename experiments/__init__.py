"""Everything around the engine: harness, datasets, metrics, run records, scale models."""
