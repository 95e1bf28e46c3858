"""What scores answers, and what scores say of a policy's health."""
