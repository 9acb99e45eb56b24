"""
When: the schedule, the steps, the clock that decides which steps are full, the report, valid settings.

Pure Python without torch. Imports no other folder.
"""
