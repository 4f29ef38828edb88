"""What every room may use: errors, paths, files, locks, retries, statistics, the environment.

Nothing else of the project is imported here.
"""
