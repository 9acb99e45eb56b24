"""
What a schedule costs, without weights, and how a model settles.

Imports all of the above and `api`; nothing imports it.
"""
