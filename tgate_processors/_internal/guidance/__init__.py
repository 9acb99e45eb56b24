"""
What the halves of guidance differ by, and what the denoiser gives: recorded in steps that compute it, predicted in others;
the forms of guidance.

Imports `plan` and `denoiser`.
"""
