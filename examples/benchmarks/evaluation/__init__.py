"""Quality and speed of T-GATE and other methods, side by side: the parts of evaluate.py."""
