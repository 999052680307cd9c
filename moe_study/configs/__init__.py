"""What is run: the arms, settings and seeds of each study, as data."""
