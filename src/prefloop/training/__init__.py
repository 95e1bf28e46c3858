"""The one loop, and the four methods that it serves."""
