"""What every room may use: errors, paths, files, locks, retries, statistics, the environment.

Nothing of the project is imported here, and no framework.
"""
