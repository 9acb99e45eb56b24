"""
All that changes an object of the host, each with its inverse in the same file.

Imports all of the above.
"""
