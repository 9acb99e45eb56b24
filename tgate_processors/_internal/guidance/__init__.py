"""
What the halves of guidance differ by, and what the denoiser gives: recorded where it is computed, else predicted; the forms
of guidance.

Imports `plan` and `denoiser`.
"""
