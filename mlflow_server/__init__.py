"""MLflow's own tracking server on the database that training writes to: `python -m mlflow_server`.

Imports none of the project's other packages; importing it starts nothing and touches no network.
"""
