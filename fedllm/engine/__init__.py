"""Engine - runs client-side functions; the local one batches a cohort over one base model."""
