"""Whole runs on real data."""
