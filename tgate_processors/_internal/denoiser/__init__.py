"""
What goes into a denoiser and comes out: its arguments as read, which of them are a batch, how they are halved.

Imports `plan`.
"""
