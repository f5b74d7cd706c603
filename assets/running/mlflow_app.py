"""MLflow's application behind the `Guard`: what uvicorn's workers serve."""

import os

from mlflow.server.fastapi_app import app as mlflow_app

from assets.running.guard import HOST_VARIABLE, Guard

app = Guard(mlflow_app, os.environ[HOST_VARIABLE])
