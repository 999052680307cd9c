"""Tables, figures and the report page, all made from result files."""
