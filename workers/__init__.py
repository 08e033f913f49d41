"""Everything that may need a GPU: labeling with teachers, training students, packing checkpoints."""
