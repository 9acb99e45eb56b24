"""Drawn scenes with captions, a scorer that reads them back, and small pipelines that learn to draw them."""
