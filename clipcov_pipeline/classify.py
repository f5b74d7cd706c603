"""Where models that MLflow registered with version 0.1 look for their loader, which is in ``evaluation``."""

from clipcov_pipeline.evaluation.classifier import _load_pyfunc as _load_pyfunc
