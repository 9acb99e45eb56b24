"""
When: the schedule, the steps, the controller that decides which are full, the plan of a forward, the report.

Pure Python without torch. Imports no other folder.
"""
