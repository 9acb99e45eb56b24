"""What trained the small pipelines and scores them: `python -m examples.testbeds.score_shapes --help`."""
