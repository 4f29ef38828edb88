"""Pages in a browser: drawing, MLflow's and Optuna's."""
