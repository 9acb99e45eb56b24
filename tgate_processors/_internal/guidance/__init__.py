"""
What the halves of guidance differ by, and what the denoiser gives: recorded where it is computed, else predicted.

The forms of guidance: batched, sequential, by halves; the loop of the user's own. Imports `plan` and `denoiser`.
"""
