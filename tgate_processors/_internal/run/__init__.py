"""
One call of a pipeline. Nothing of it outlives the call, and copies of the pipeline share nothing of it.

Imports all of the above but `families`.
"""
