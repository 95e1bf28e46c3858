"""prefloop and its peers on the same work: `python -m benchmarks WORK`, see docs/benchmarks.md."""
