"""
The attention processor, the gated layers of a denoiser, what they keep, and the budget for it.

Imports `plan` and `denoiser`.
"""
