"""Pages in a browser: drawing, MLflow's and Optuna's.

All answer this machine's own pages and programs alone, by the one guard.
"""
