"""Where jobs are trained: in this process, in processes of this machine, or on a Ray cluster.

Workers know a job and nothing else: neither optuna nor mlflow is imported here.
"""
