"""The search: a driver that leads a study and keeps its books, and workers that train.

The only room (with the report's charts) that imports optuna.
"""
