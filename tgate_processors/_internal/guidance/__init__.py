"""
What the halves of guidance differ by, recorded in full steps and predicted in half steps; the forms of guidance.

Imports `plan` and `denoiser`.
"""
