"""The one loop, and the five methods that it serves."""
