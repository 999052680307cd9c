"""The networks of the study: classifier, vision transformer, language model."""
