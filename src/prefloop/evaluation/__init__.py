"""Judging models: win rates, frontiers, calibration, health, one report."""
