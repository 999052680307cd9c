"""Time and memory of this library beside public implementations: python -m benchmarks."""
