"""Everything about the teacher: track-mjx checkpoints, its walker, and a teacher made from an expert controller."""
