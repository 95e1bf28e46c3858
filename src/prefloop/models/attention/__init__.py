"""Attention over packed segments: the plan that a model is given, and its forms."""
