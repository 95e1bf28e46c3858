"""Faults at random moments: kills, signals, full disks, damaged checkpoints."""
