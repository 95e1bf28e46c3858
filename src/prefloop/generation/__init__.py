"""Generation: an engine that samples from the policy's live weights, and the commands around it."""
