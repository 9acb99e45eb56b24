"""What measures quality, speed and cost: `python -m examples.benchmarks.evaluate --help`."""
