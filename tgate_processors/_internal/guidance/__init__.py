"""
What the halves of guidance differ by, and what the denoiser gives: recorded where it is computed, else predicted.

The forms of guidance: batched, sequential, guider. Imports `plan` and `denoiser`.
"""
