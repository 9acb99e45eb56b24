"""
What the halves of guidance differ by: noted in full steps, predicted in half steps, and checked against the batch.

Imports `plan`, `denoiser` and `caches`.
"""
