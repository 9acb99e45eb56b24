"""
When: the schedule, the steps, the clock that decides which steps are full, the plan of a forward, the report.

Pure Python without torch. Imports no other folder.
"""
