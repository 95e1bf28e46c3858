"""prefloop: the loop from human preferences to a better language model."""
