"""From files to batches: records, readers, checks and splits, examples, packing."""
