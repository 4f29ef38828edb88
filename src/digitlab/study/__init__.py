"""The search: a driver that leads a study and keeps its books, and workers that train.

Optuna's studies are opened here; `results` reads them, for charts, audits and bundles.
"""
