"""The study: configurations, data, training, evaluation, claims and report."""
