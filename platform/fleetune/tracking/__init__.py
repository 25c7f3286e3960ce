"""MLflow, fed from run directories."""
