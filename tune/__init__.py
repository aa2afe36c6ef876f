"""Sweeps with Ray Tune: what makes a recogniser good is searched, tracked in MLflow, and registered."""
