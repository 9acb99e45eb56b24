"""Quality and speed of T-GATE and of its rivals, side by side: the parts of evaluate.py."""
