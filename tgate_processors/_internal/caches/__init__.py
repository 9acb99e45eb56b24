"""
Caches of others on the same denoiser: found, adapted or refused.

Imports `plan`.
"""
